"""Tables of what searches over all orders found, and where that is not what is claimed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from trainer.prove import Cell, Proven
from trainer.state.mechanisms import HOLDERS
from trainer.updates.mechanisms import COLUMNS, MODES

Rows = list[tuple[str, ...]]


def modes(proven: Sequence[Proven]) -> tuple[tuple[str, ...], Rows]:
    """Headers and rows: each mode, the orders that were covered, and in how many of them each guarantee is broken."""
    headers = ("update_mode", "strategy", "orders", *(name.replace("_", "\n") for name in COLUMNS))
    return headers, [
        (each.proof.name, each.proof.strategy, each.told_orders, *(_told(each.cells[name]) for name in COLUMNS))
        for each in proven
    ]


def state(proven: Sequence[Proven]) -> tuple[tuple[str, ...], Rows]:
    """Headers and rows: each mechanism, its guarantee and what came of it."""
    rows: Rows = [
        (f"state.{each.proof.name}", each.told_orders, name, _told(each.cells[name]))
        for each in proven
        for name in each.proof.guarantees
    ]
    return ("mechanism", "orders", "guarantee", "upheld"), rows


def examples(proven: Sequence[Proven], names: Sequence[str] = COLUMNS) -> tuple[tuple[str, ...], Rows]:
    """Headers and rows: for everything that is broken the token of the smallest order that shows it."""
    rows: Rows = [
        (each.proof.name, name, cell.kind, cell.token)
        for each in proven
        for name in (each.proof.guarantees or names)
        for cell in [each.cells[name]]
        if cell.token
    ]
    return ("case", "guarantee", "anomaly", "schedule.token"), rows


def cases(proven: Sequence[Proven]) -> tuple[tuple[str, ...], Rows]:
    """Headers and rows: what to type before `schedule=replay schedule.token=...`."""
    return ("case", "command"), [(each.proof.name, each.proof.command) for each in proven]


def differences(proven: Sequence[Proven]) -> list[str]:
    """Where a table of mechanisms claims something else than what the searches found; none when all is well."""
    return [*_of_modes(proven), *_of_state(proven)]


def _of_modes(proven: Sequence[Proven]) -> Iterator[str]:
    for mode in MODES.values():
        own = [each for each in proven if each.proof.name.partition("/")[0] == mode.name]
        for name in COLUMNS if own else ():
            # What a mode does not claim has to break in one of its searches, not in each.
            statuses = {each.cells[name].status for each in own}
            if name in mode.not_applicable:
                expected, holds = "not_applicable", statuses == {"not_applicable"}
            elif name in mode.claims:
                expected, holds = "upheld", statuses == {"upheld"}
            else:
                expected, holds = "broken", "broken" in statuses
            if not holds:
                yield f"update_mode={mode.name}: {name} is {', '.join(sorted(statuses))}, and the table says {expected}"


def _of_state(proven: Sequence[Proven]) -> Iterator[str]:
    for each in proven:
        key, _, name = each.proof.name.partition("=")
        if key not in HOLDERS:
            continue
        held = HOLDERS[key][name]
        # Thread-local is safe where each replica turns its mode on, as it does here.
        expected = "broken" if held.safe == "never" else "upheld"
        found = each.cells[held.guarantee].status
        if found != expected:
            yield f"state.{each.proof.name}: {held.guarantee} is {found}, and the table says {expected}"


def _told(cell: Cell) -> str:
    match cell.status:
        case "upheld":
            return "yes"
        case "broken":
            return f"no: {cell.orders:,}"
    return "n/a" if cell.status == "not_applicable" else "not checked"

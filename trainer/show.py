"""`python -m trainer show modes|state|guarantees|experiments|bytecode`: the program's own tables, as it holds them.

`show modes --prove` and `show state --prove` hold what they claim to searches over all orders.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from trainer.audit.guarantees import GUARANTEES
from trainer.config import nearest
from trainer.experiments import experiments
from trainer.state.mechanisms import HOLDERS, Holder
from trainer.updates.mechanisms import COLUMNS, MODES, Mechanism

# Where no terminal says how wide it is: wide enough for every table.
PIPE_COLUMNS = 220
# Below this width the modes are two tables, mechanisms and claims.
MODES_COLUMNS = 152

OWN_MODE = (
    "update_mode._target_=MODULE.NAME brings one of your own: it claims nothing, and is held to what require= names."
)
PROVE = "--prove"
PROVEN = "Two replicas. yes: held in every order that was covered; no: the number of those that break it."
IN_PIECES = " in_pieces: a kernel is announced as reading and writing each variable."
REPLAYED = "To see one: the case's command, with schedule=replay schedule.token=TOKEN in place of schedule=search."
# State -> how it comes, what goes wrong, the safe way, and the key that says who holds it here.
STATE: tuple[tuple[str, str, str, str, str], ...] = (
    (
        "weights, optimizer slots",
        "written without isolation",
        "lost updates, torn reads, mixed weights",
        "an update mode",
        "update_mode",
    ),
    (
        "batch statistics",
        "same",
        "lost updates in non-trainable state",
        "inside the same transaction, or reduced",
        "batch_statistics",
    ),
    (
        "gradients",
        "one .grad for all threads",
        "replicas' gradients add up or vanish",
        "a buffer per replica",
        "gradients",
    ),
    (
        "precision mode",
        "module global; threading.local",
        "leaks out of a scope; silently absent in replica threads",
        "inherited by replicas, or passed explicitly",
        "precision",
    ),
    (
        "first call",
        "a flag or a set, looked at, then set",
        "what is to happen once happens in several replicas",
        "made before replicas start",
        "first_call",
    ),
    ("loss scale", "shared counter", "growth and back-off decisions lost", "inside the transaction", "loss_scale"),
    (
        "random numbers",
        "process-wide generator",
        "masks repeat or depend on timing",
        "derived from (seed, step, sample index in the joint batch)",
        "random_numbers",
    ),
    ("data cursor", "one iterator for all", "samples seen twice or never", "shard by index", "cursor"),
    (
        "compiled-step identity",
        "per-process counter, copied by fork",
        "another function's body runs",
        "content hash",
        "compile_ids",
    ),
)


def show(arguments: list[str]) -> int:
    """Print the table that the arguments name, and return the exit status."""
    tables: dict[str, Callable[[int], list[Table]]] = {
        "modes": _modes,
        "state": _state,
        "guarantees": _guarantees,
        "experiments": _experiments,
        "bytecode": _bytecode,
    }
    asked = [argument for argument in arguments if argument != PROVE]
    if len(asked) != 1 or asked[0] not in tables or len(arguments) > 2:
        came = " ".join(asked) or "nothing"
        print(f"trainer: show takes one of {', '.join(tables)}; got {came}.{nearest(came, tables)}", file=sys.stderr)
        return 2
    if PROVE in arguments:
        return _prove(asked[0])
    console = _console()
    for table in tables[arguments[0]](console.width):
        console.print(table)
    return 0


def _prove(what: str) -> int:
    """Hold the table to searches over all orders, and return 1 where they found something else than it says."""
    # Here, so that the tables themselves are shown at once.
    from trainer import proofs
    from trainer.prove import ProofError, prove
    from trainer.report import proofs as told

    cases = {"modes": proofs.of_modes, "state": proofs.of_state}
    if what not in cases:
        print(f"trainer: --prove goes with show {' or show '.join(cases)}; got show {what}.", file=sys.stderr)
        return 2
    try:
        proven = prove(cases[what]())
    except ProofError as error:
        print(f"trainer: {error}.", file=sys.stderr)
        return 3
    console = _console()
    headers, rows = told.modes(proven) if what == "modes" else told.state(proven)
    console.print(_table(headers, rows, PROVEN + (IN_PIECES if what == "modes" else "")))
    console.print()
    console.print(_table(*told.examples(proven), REPLAYED, folds="schedule.token"))
    console.print()
    console.print(_table(*told.cases(proven)))
    found = told.differences(proven)
    for difference in found:
        print(f"trainer: {difference}.", file=sys.stderr)
    return 1 if found else 0


def _console() -> Console:
    wide = None if sys.stdout.isatty() or "COLUMNS" in os.environ else PIPE_COLUMNS
    return Console(width=wide, highlight=False, markup=False, emoji=False)


def _table(
    headers: Sequence[str], rows: Sequence[Sequence[str | Text]], caption: str = "", *, folds: str = ""
) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        header_style="bold",
        caption=caption,
        caption_justify="left",
    )
    for header, cells in zip(headers, zip(*rows, strict=True), strict=True):
        # Names and single words keep their width, and texts share what is left.
        breaks = header == folds or any(" " in str(cell) for cell in cells)
        table.add_column(header, no_wrap=not breaks, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _modes(width: int) -> list[Table]:
    rows: list[dict[str, str | Text]] = [
        {
            "update_mode": mode.name,
            "strategy": " ".join(mode.strategies),
            "read under": mode.read_under,
            "write based on": mode.base,
            "write under": mode.write_under,
            **{name.replace("_", "\n"): _claim(mode, name) for name in COLUMNS},
        }
        for mode in MODES.values()
        if mode.name != "custom"  # a user's own, of which nothing is known; the caption says so
    ]
    headers = tuple(rows[0])
    mechanism = ("update_mode", "read under", "write based on", "write under")
    claims = ("update_mode", *(header for header in headers if header not in mechanism))
    tables = [headers] if width >= MODES_COLUMNS else [mechanism, claims]
    return [
        _table(
            columns, [[row[column] for column in columns] for row in rows], OWN_MODE if columns == tables[-1] else ""
        )
        for columns in tables
    ]


def _claim(mode: Mechanism, guarantee: str) -> Text:
    if guarantee in mode.not_applicable:
        return Text("n/a", style="dim")
    return Text("yes", style="green") if guarantee in mode.claims else Text("no", style="yellow")


def _state(_width: int) -> list[Table]:
    headers = ("state", "as it comes", "what goes wrong", "safe holder", "held by")
    kinds = _table(headers, [(*row, _held_by(key)) for *row, key in STATE])
    mechanisms = [
        (f"state.{key}" if not index else "", held.name, _safe(held), " ".join(held.strategies), held.summary)
        for key, named in HOLDERS.items()
        for index, held in enumerate(named.values())
    ]
    caption = "safe stands for the first of each key, naive for what one gets without thinking of replicas."
    return [kinds, _table(("key", "mechanism", "safe", "strategy", "what it does"), mechanisms, caption)]


def _held_by(key: str) -> str:
    return "every update_mode" if key == "update_mode" else f"state.{key}"


def _safe(held: Holder) -> Text:
    match held.safe:
        case "always":
            return Text("yes", style="green")
        case "replica":
            return Text("if enabled_in=replica", style="yellow")
    return Text("no", style="yellow")


def _guarantees(_width: int) -> list[Table]:
    return [_table(("guarantee", "what it says"), list(GUARANTEES.items()))]


def _bytecode(_width: int) -> list[Table]:
    # Here, for it imports NumPy.
    from trainer.workloads.counter import bytecode
    from trainer.workloads.counter.ways import WAYS

    headers = ("instruction", "of the variable", "another thread comes in")
    tables = []
    for name, operation in bytecode.operations().items():
        rows = [(row.instruction, row.touches, row.switch) for row in bytecode.of_loop(operation.free)]
        table = _table(headers, rows)
        table.title, table.title_justify = f"\nworkload.operation={name}: {WAYS[name].written}", "left"
        tables.append(table)
    tables[-1].caption = "One round of each loop, with nothing held. Runs of workload=counter tell where threads wait."
    return tables


def _experiments(_width: int) -> list[Table]:
    return [_table(("experiment", "what it does"), list(experiments().items()))]

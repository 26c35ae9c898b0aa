"""A history as lanes of text: a column a replica, time down, an operation a line. Plain ASCII, standard library."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple

from trainer.schedule.operations import ABORT, BEGIN, COMPUTE, READ, UPDATE, WRITE, Event, History

MARK = "> "
ELIDED = "..."
# Up to this many operations are shown around a witness; of a longer history, the witness and what was left out.
SHOWN = 24


class _Line(NamedTuple):
    """One line; `replica` None for what was left out."""

    replica: int | None
    text: str
    marked: bool = False


def picture(history: History, events: Collection[int] | None = None, width: int = 80, shown: int = SHOWN) -> str:
    """Draw a history, or the witness of an anomaly in it.

    Lanes where they fit into `width`, else a list of lines that begin with the replica.

    Args:
        events: indices of the operations that make a witness, marked in the margin; None for no witness.
        width: characters a line may have. Lines of a list may be longer where names are.
        shown: operations that are shown beside a witness; where there are more, they are left out.
    """
    lines = list(_lines(history, frozenset(events or ()), shown if events is not None else None))
    replicas = sorted({line.replica for line in lines if line.replica is not None})
    return "\n".join(line.rstrip() for line in _lanes(lines, replicas, width) or _list(lines))


def _lines(history: History, witness: frozenset[int], shown: int | None) -> Iterable[_Line]:
    visible = [index for index, event in enumerate(history.events) if index in witness or event.operation.kind != BEGIN]
    whole = shown is None or len(visible) <= shown
    several_steps = any(event.step != history.events[0].step for event in history.events)
    begun: dict[int, int] = {}
    left_out = False
    for index in visible:
        if not whole and index not in witness:
            left_out = True
            continue
        if left_out:
            yield _Line(None, ELIDED)
            left_out = False
        event = history.events[index]
        if several_steps and begun.get(event.replica) != event.step:
            begun[event.replica] = event.step
            yield _Line(event.replica, f"step {event.step}:")
        yield _Line(event.replica, describe(event), index in witness)
    if left_out:
        yield _Line(None, ELIDED)


def describe(event: Event) -> str:
    """An operation with its versions: `read kernel @0`, `write kernel @2 (from 0)`."""
    operation = event.operation
    if operation.kind in (BEGIN, COMPUTE, ABORT):
        return operation.told.strip()
    text = operation.told
    if operation.kind not in (READ, WRITE, UPDATE):
        return text
    if event.versions:
        text += f" @{_numbers(event.versions)}"
    if operation.value:
        text += f" = {operation.value}"
    if event.bases:
        text += f" (from {_numbers(event.bases)})"
    return text


def _numbers(versions: tuple[int, ...]) -> str:
    """One number where all pieces have the same version."""
    distinct = versions[:1] if len(set(versions)) == 1 else versions
    return ",".join("nothing" if version < 0 else str(version) for version in distinct)


def _lanes(lines: list[_Line], replicas: list[int], width: int) -> list[str] | None:
    """None where lanes would be too narrow. A text may reach into the lanes to its right, which are empty there."""
    if not replicas:
        return None
    heads = [f"replica {replica}" for replica in replicas]
    last = max(len(text) for text in (heads[-1], *(line.text for line in lines if line.replica == replicas[-1])))
    room = width - len(MARK)
    lane = room // len(replicas)
    if len(replicas) > 1:
        lane = min(lane, (room - last) // (len(replicas) - 1))
    starts = {replica: len(MARK) + lane * column for column, replica in enumerate(replicas)}
    fits = all(starts[line.replica] + len(line.text) <= width for line in lines if line.replica is not None)
    if not fits or lane < max(len(head) for head in heads) + 2:
        return None
    drawn = [" " * len(MARK) + "".join(head.ljust(lane) for head in heads)]
    for line in lines:
        margin = MARK if line.marked else " " * len(MARK)
        drawn.append(margin.ljust(starts[line.replica] if line.replica is not None else 0) + line.text)
    return drawn


def _list(lines: list[_Line]) -> list[str]:
    head = max((len(f"replica {line.replica}") for line in lines if line.replica is not None), default=0)
    return [
        line.text.rjust(len(MARK) + len(line.text))
        if line.replica is None
        else f"{MARK if line.marked else ' ' * len(MARK)}{f'replica {line.replica}'.ljust(head)}  {line.text}"
        for line in lines
    ]

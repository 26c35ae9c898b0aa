"""Anomalies of state holders: a mode, a cursor, a first-call flag, a gradient buffer. Standard library only.

What holds for all of them: a write is based on the version that its step read last, so that two writes from one version
are two replicas that each took themselves for the only one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from trainer.audit.found import Found, found, told, who
from trainer.audit.lineage import Transaction
from trainer.schedule.operations import BUFFER, CURSOR, FLAG, MODE, READ, UPDATE, WRITE, History

# What is written to a mode that is put back to what it was before anybody set it.
UNSET = ("", "none")


class Touch(NamedTuple):
    """One read, write or update of one place."""

    event: int
    kind: str
    version: int
    base: int
    by: Transaction
    value: str


def anomalies(history: History, apart: dict[str, list[int]]) -> list[Found]:
    """What is found at holders.

    Args:
        apart: indices of the operations on holders, by what they are of.

    Thread-safety: pure.
    """
    seen: list[Found] = []
    for of, finder in _FINDERS.items():
        if of in apart:
            for place, touches in _touches(history, apart[of]).items():
                seen += finder(history, place, touches)
    return seen


def _touches(history: History, events: list[int]) -> dict[str, list[Touch]]:
    """Who did what to each place, in order."""
    places: dict[str, list[Touch]] = {}
    for index in events:
        event = history.events[index]
        operation = event.operation
        if operation.kind in (READ, WRITE, UPDATE):
            bases = event.bases or (-1,) * len(event.versions)
            for place, version, base in zip(operation.places, event.versions, bases, strict=True):
                touch = Touch(index, operation.kind, version, base, event[:2], operation.value)
                places.setdefault(place, []).append(touch)
    return places


def _written(touches: list[Touch]) -> dict[int, Touch]:
    return {touch.version: touch for touch in touches if touch.kind != READ}


def mode_leaks(history: History, place: str, touches: list[Touch]) -> Iterator[Found]:
    """A mode that is not at the end what it was at first, or that another replica set inside one's own scope.

    Version 0 is that nobody set it, and whoever restores that says so (`UNSET`). A write that brings back the value
    which a scope found when it began ends the scope. A mode that another replica set to the same value is no leak: it
    is the one asked for.
    """
    written = _written(touches)
    if not written:
        return
    values = {0: UNSET, **{version: (touch.value,) for version, touch in written.items()}}
    leaked = _left_on(history, place, touches, written)
    if leaked is not None:
        yield leaked
    # The scopes that each step is inside, each with its set and with what it found and will put back.
    scopes: dict[Transaction, list[tuple[Touch, tuple[str, ...] | None]]] = {}
    told_of: set[Transaction] = set()
    for touch in touches:
        open_scopes = scopes.setdefault(touch.by, [])
        if touch.kind != READ:
            before = open_scopes[-1][1] if open_scopes else ()
            if before is None or touch.value in before:
                open_scopes.pop()
            else:
                open_scopes.append((touch, values.get(touch.base)))
        elif open_scopes and touch.by not in told_of:
            own, setter = open_scopes[-1][0], written.get(touch.version)
            if setter is not None and setter.by != touch.by and setter.value != own.value:
                told_of.add(touch.by)
                because = (
                    f"{told(*touch.by)} set {place} to {own.value!r} and then read version {touch.version}, "
                    f"{setter.value!r}, which {told(*setter.by)} wrote"
                )
                events = (own.event, setter.event, touch.event)
                yield found(history, "mode_leak", "precision_as_asked", place, events, because)


def _left_on(history: History, place: str, touches: list[Touch], written: dict[int, Touch]) -> Found | None:
    last = written[max(written)]
    if last.value in UNSET:
        return None
    events = [last.event]
    because = f"{who(history, last.event)} wrote {place} version {last.version}, the last: it ends as {last.value!r}"
    # Where a scope put back what it had found, that it found another's is why.
    for touch in touches:
        setter = written.get(touch.version) if touch.kind == READ else None
        if touch.by == last.by and setter is not None and setter.by != last.by and setter.value == last.value:
            events += [setter.event, touch.event]
            because += f", which is what it had found: version {setter.version}, set by {told(*setter.by)}"
            break
    return found(history, "mode_leak", "precision_as_asked", place, events, f"{because}, not as it was at first")


def misdealt_samples(history: History, place: str, touches: list[Touch]) -> Iterator[Found]:
    """Batches that were taken twice, and numbers of batches that were jumped over."""
    written = _written(touches)
    takers: dict[int, Touch] = {}
    for touch in written.values():
        if touch.kind != WRITE or touch.base < 0:
            continue
        first = takers.setdefault(touch.base, touch)
        if first is not touch:
            because = (
                f"{told(*touch.by)} advanced {place} from version {touch.base}, from which {told(*first.by)} had "
                f"advanced it already: both took the same batch"
            )
            events = _with_reads(touches, first, touch)
            yield found(history, "duplicate_sample", "samples_once", place, events, because)
    for touch in written.values():
        before = written.get(touch.base)
        if before is None or not (before.value.isdecimal() and touch.value.isdecimal()):
            continue
        skipped = int(touch.value) - int(before.value) - 1
        if skipped > 0:
            because = (
                f"{told(*touch.by)} advanced {place} from {before.value} to {touch.value}: "
                f"{skipped} in between given to nobody"
            )
            witness = (before.event, touch.event)
            yield found(history, "skipped_sample", "samples_once", place, witness, because)


def repeated_first_calls(history: History, place: str, touches: list[Touch]) -> Iterator[Found]:
    """Replicas that each found the flag as it was at first, and then set it."""
    first: Touch | None = None
    told_of: set[Transaction] = set()
    for touch in _written(touches).values():
        if touch.base != 0:
            continue
        if first is None:
            first = touch
        elif touch.by != first.by and touch.by not in told_of:
            told_of.add(touch.by)
            because = (
                f"{told(*touch.by)} set {place} from version 0, which it read before {told(*first.by)} set it: both "
                f"made the first call"
            )
            events = _with_reads(touches, first, touch)
            yield found(history, "repeated_first_call", "initialized_once", place, events, because)


def mixed_gradients(history: History, place: str, touches: list[Touch]) -> Iterator[Found]:
    """Gradients that are gone when their replica reads them back, or have another's in them, one finding a step.

    An update adds a gradient to what the buffer holds. A write replaces it: by nothing where there are updates, too,
    else by a gradient.
    """
    adds = any(touch.kind == UPDATE for touch in touches)
    holds: dict[int, dict[int, Touch]] = {0: {}}
    own: dict[Transaction, Touch] = {}
    told_of: set[Transaction] = set()
    for touch in touches:
        if touch.kind == READ:
            if touch.by in own and touch.by not in told_of and holds[touch.version].keys() != {touch.by[0]}:
                told_of.add(touch.by)
                yield _mixed(history, place, touches, own[touch.by], touch, holds[touch.version])
            continue
        before = holds[touch.base] if touch.kind == UPDATE else {}
        if touch.kind == UPDATE or not adds:
            before = {**before, touch.by[0]: touch}
            own[touch.by] = touch
        holds[touch.version] = before


def _mixed(
    history: History, place: str, touches: list[Touch], own: Touch, read: Touch, holds: dict[int, Touch]
) -> Found:
    """Another's gradient, where there is one in what was read; else whoever put the own one away."""
    other = next((each for replica, each in holds.items() if replica != own.by[0]), None)
    if other is not None:
        what = f"which has {told(*other.by)}'s in it"
    else:
        other = next(each for each in touches if each.event > own.event and each.kind == WRITE)
        what = f"after {told(*other.by)} had cleared it"
    because = f"{told(*own.by)} put its gradient into {place} and read version {read.version}, {what}"
    witness = (own.event, other.event, read.event)
    return found(history, "mixed_gradient", "gradients_unmixed", place, witness, because)


def _with_reads(touches: list[Touch], *writes: Touch) -> list[int]:
    """Indices of some writes and of the reads that they are based on."""
    events = [write.event for write in writes]
    for write in writes:
        reads = [
            touch.event
            for touch in touches
            if touch.kind == READ and (touch.by, touch.version) == (write.by, write.base) and touch.event < write.event
        ]
        events += reads[-1:]
    return events


_FINDERS: dict[str, Callable[[History, str, list[Touch]], Iterator[Found]]] = {
    MODE: mode_leaks,
    CURSOR: misdealt_samples,
    FLAG: repeated_first_calls,
    BUFFER: mixed_gradients,
}

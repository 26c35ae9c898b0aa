"""Anomalies of state holders: a mode, a cursor, a first-call flag, a gradient buffer. Standard library only.

What holds for all of them: a write is based on the version that its step read last, so that two writes from one version
are two replicas that each took themselves for the only one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from trainer.audit.found import Found, found, told
from trainer.audit.lineage import Transaction
from trainer.audit.mode_anomalies import mode_leaks
from trainer.audit.touch import Touch, writes
from trainer.schedule.operations import BUFFER, CURSOR, FLAG, MODE, READ, UPDATE, WRITE, History


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


def misdealt_samples(history: History, place: str, touches: list[Touch]) -> Iterator[Found]:
    """Batches that were taken twice, and numbers of batches that were jumped over."""
    written = writes(touches)
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
    for touch in writes(touches).values():
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

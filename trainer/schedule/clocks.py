"""Which operations of an order came before which for a reason, and which only by chance. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence

from trainer.schedule.operations import CHANGES, Operation

# The operations done, each with the clock of its replica.
Prefix = frozenset[tuple[int, tuple[int, ...]]]


class Clocks:
    """Vector clocks: which operations came before which for a reason.

    Two operations conflict when they touch one place and at least one of them changes it. A lock is a place that
    whoever goes in or out changes, but for readers who share it.

    Source: Mattern 1989 (vector clocks).
    """

    def __init__(self, num_replicas: int) -> None:
        self._own = [(0,) * num_replicas for _ in range(num_replicas)]
        self._changed: dict[str, tuple[int, ...]] = {}
        self._read: dict[str, tuple[int, ...]] = {}
        self.events: list[tuple[int, tuple[int, ...]]] = []

    @property
    def prefix(self) -> Prefix:
        # Of two operations by the same replica the clocks differ, so that a set loses none.
        return frozenset(self.events)

    def count(self, own: int, operation: Operation) -> None:
        clock = self._own[own]
        places: Sequence[str] = operation.places or (operation.name,)
        for place in places:
            clock = _later(clock, self._changed.get(place))
            if operation.kind in CHANGES:
                clock = _later(clock, self._read.get(place))
        clock = (*clock[:own], clock[own] + 1, *clock[own + 1 :])
        for place in places:
            if operation.kind in CHANGES:
                self._changed[place] = clock
                self._read.pop(place, None)
            else:
                self._read[place] = _later(clock, self._read.get(place))
        self._own[own] = clock
        self.events.append((own, clock))

    def meet(self, replicas: Sequence[int], name: str) -> None:
        """All of these go on from here together."""
        clock = self._own[replicas[0]]
        for own in replicas[1:]:
            clock = _later(clock, self._own[own])
        for own in replicas:
            self._own[own] = (*clock[:own], clock[own] + 1, *clock[own + 1 :])
            self.events.append((own, self._own[own]))


def _later(clock: tuple[int, ...], other: tuple[int, ...] | None) -> tuple[int, ...]:
    return clock if other is None or other is clock else tuple(map(max, clock, other))

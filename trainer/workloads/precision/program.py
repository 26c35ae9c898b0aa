"""What the programs have in common: what a replica does in one round, and where it stops meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from trainer.workloads.precision.calls import Call, Caller


@dataclass(frozen=True)
class Stops:
    """Where a replica lets others go on, by whoever hosts it.

    Attributes:
        pause: others may come in between. Plain threads yield once; under MirroredStrategy it is a cross-replica call,
            in which every replica takes part.
        meet: all replicas come here before any of them goes on.
    """

    pause: Callable[[], object]
    meet: Callable[[], object]


class Program(Protocol):
    """One round of one program is one step of its replicas.

    Attributes:
        caller: makes the calls.
    """

    caller: Caller

    def begin(self) -> None:
        """What the main thread does before there are replicas."""

    def replica(self, own: int, step: int, stops: Stops) -> Call:
        """What one replica does in one round, and the call that it makes in it.

        Thread-safety: called by each replica's own thread, all of them at once.
        """

    def amiss(self, own: int) -> str:
        """The kind of anomaly that it is when this replica's call finds another mode; nothing for one that is none."""

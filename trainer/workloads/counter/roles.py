"""What each replica does: counts, reads what others count, or waits until they have counted down to zero."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import numpy as np

from trainer.config import Config
from trainer.workloads.counter.isolation import Isolation
from trainer.workloads.counter.pace import Pace
from trainer.workloads.counter.shared import Numbers, Operation, Shared, Variable
from trainer.workloads.counter.ways import GRADIENT, num_writers, start_of, way_of


@dataclass
class Reads:
    """What one reader has seen; its own thread's to write.

    Attributes:
        beside: reads that were begun while somebody still counted.
        torn: snapshots whose elements were not all equal, though every increment adds the same to all.
        first: the number of the first of them, and what it showed.
    """

    made: int = 0
    beside: int = 0
    torn: int = 0
    first: str = ""

    def add(self, values: Numbers) -> None:
        """Look at one snapshot: [elements], or [elements, places]."""
        least, most = values.min(axis=0), values.max(axis=0)
        if (least != most).any():
            self.torn += 1
            if not self.first:
                column = values.reshape(len(values), -1)[:, int(np.argmax(least != most))]
                low, high = int(column.argmin()), int(column.argmax())
                shows = f"element {low} shows {column[low]:,.15g}, element {high} {column[high]:,.15g}"
                self.first = f"{self.made}: {shows}"
        self.made += 1


@dataclass
class Left:
    """What replicas have left besides the variable.

    Attributes:
        reads: of each reader.
        waits_for_ever: whether the replica that waits for zero has been left alone without it.
        through: which of those that count have made their last increment.
        private: what each of those that count privately counts in; None between two, and for all others.
    """

    reads: list[Reads] = field(default_factory=list)
    waits_for_ever: bool = False
    through: list[bool] = field(default_factory=list)
    private: list[Shared | None] = field(default_factory=list)


class Roles:
    """The replicas of one run over one variable.

    Attributes:
        amounts: what each of those that count adds.

    Args:
        operation: how an increment is written; None for gradient steps.
    """

    def __init__(
        self, config: Config, variable: Variable, shared: Shared, operation: Operation | None, isolation: Isolation
    ) -> None:
        self.config, self.variable, self.shared = config, variable, shared
        self.isolation, self._operation = isolation, operation
        self._steps = config.train.steps
        self._writers = num_writers(config)
        self._down = config.workload.counts == "down"
        self.amounts = [variable.amount(self._number(own)) for own in range(self._writers)]
        self.left = Left(through=[False] * self._writers, private=[None] * self._writers)
        if not self._down:
            self.left.reads = [Reads() for _ in range(config.num_replicas - self._writers)]
        self._done = threading.Event()
        variable.fill(shared, start_of(config))

    def body(self, own: int, pace: Pace) -> None:
        """What one replica's thread runs."""
        if own >= self._writers:
            self._wait(pace) if self._down else self._read(own, pace)
            return
        if self._down:
            self._count_down(own, pace)
        elif self.config.workload.private_increments > 1:
            self._count_privately(own, pace)
        elif self.config.workload.section_increments == 1:
            for count in pace.chunks(self._steps):
                self.isolation.add(own, count, self.amounts[own])
        else:
            self._count_in_sections(own, pace)
        self.left.through[own] = True

    def _number(self, own: int) -> float:
        """What a replica adds: in gradient steps its own number, from 1 on, so that every one adds something."""
        if way_of(self.config).base == GRADIENT:
            return own + 1
        return -1 if self._down else 1

    def _count_in_sections(self, own: int, pace: Pace) -> None:
        """One critical section round several increments, or round all."""
        assert self._operation is not None
        size = self.config.workload.section_increments or self._steps
        for first in range(0, self._steps, size):
            with self.isolation.section():
                for count in pace.chunks(min(size, self._steps - first)):
                    self._operation.free(self.shared, count, self.amounts[own])
            if pace.ended:
                return

    def _count_privately(self, own: int, pace: Pace) -> None:
        """Count in a variable of one's own, and add it to the shared one now and then.

        What it gives up: others see the count late, and what a thread has not merged when it ends is gone with it.
        """
        assert self._operation is not None
        size = self.config.workload.private_increments
        for first in range(0, self._steps, size):
            mine = self.left.private[own] = self.variable.make()
            for count in pace.chunks(min(size, self._steps - first)):
                self._operation.free(mine, count, self.amounts[own])
            if pace.ended:
                return
            # First: what is merged is not private any more, but for who looks at this very moment.
            self.left.private[own] = None
            self.isolation.add(own, 1, mine.total)

    @property
    def unmerged(self) -> int:
        """Increments that replicas have made in variables of their own, where nobody else sees them."""
        private = [each for each in self.left.private if each is not None]
        return sum(int(self.variable.values(each.total).max()) for each in private)

    def _count_down(self, own: int, pace: Pace) -> None:
        """Count jobs down one by one; whoever then sees zero wakes the replica that waits for it."""
        for count in pace.single(self._steps):
            self.isolation.add(own, count, self.amounts[own])
            if not self.variable.values(self.isolation.snapshot()).any():
                self._done.set()

    def _wait(self, pace: Pace) -> None:
        self.left.waits_for_ever = not pace.wait_for_zero(self._done, lambda: all(self.left.through))

    def _read(self, own: int, pace: Pace) -> None:
        reads = self.left.reads[own - self._writers]
        for _ in pace.single(self._steps):
            reads.beside += not all(self.left.through)
            reads.add(self.variable.values(self.isolation.snapshot()))

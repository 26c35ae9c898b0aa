"""In what portions a replica makes its increments: in chunks, as fast as it can, or one by one under a schedule."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Protocol

from trainer.audit.records import ReplicaRecord
from trainer.schedule.operations import BEGIN
from trainer.schedule.point import mark

# What a chunk should take, so that progress shows and a stop is heeded.
CHUNK_SECONDS = 0.05
FIRST_CHUNK = 16
POLL_SECONDS = 0.02


class Pace(Protocol):
    """One replica's own.

    Attributes:
        done: increments made; its own thread's to write.
    """

    done: int

    def chunks(self, increments: int) -> Iterator[int]:
        """How many to make next, until all are made or the run is to end."""

    def single(self, increments: int) -> Iterator[int]:
        """The same, one at a time."""

    @property
    def ended(self) -> bool:
        """Whether the run is to end before all are made."""

    def wait_for_zero(self, done: threading.Event, alone: Callable[[], bool]) -> bool:
        """Wait until `done` is set; False where it never will be, because the waiting replica is `alone`."""


class FreePace:
    """The operating system's threads.

    Thread-safety: its own replica's thread; `done` may be read by others.
    """

    def __init__(self, replica: ReplicaRecord, ended: threading.Event) -> None:
        self.done = 0
        self._replica, self._ended = replica, ended
        self._chunk = FIRST_CHUNK

    def chunks(self, increments: int) -> Iterator[int]:
        left = increments
        while left > 0 and not self._ended.is_set():
            count = min(self._chunk, left)
            began = time.perf_counter()
            yield count
            seconds = time.perf_counter() - began
            # No more than twice as many: what others do meanwhile makes times differ.
            self._chunk = max(1, min(2 * self._chunk, int(count * CHUNK_SECONDS / max(seconds, 1e-9))))
            left -= count
            self._made(count)

    def single(self, increments: int) -> Iterator[int]:
        for _ in range(increments):
            if self._ended.is_set():
                return
            yield 1
            self._made(1)

    @property
    def ended(self) -> bool:
        return self._ended.is_set()

    def wait_for_zero(self, done: threading.Event, alone: Callable[[], bool]) -> bool:
        # Who is alone before the look at `done` has missed nothing.
        while not self._ended.is_set():
            left_alone = alone()
            if done.wait(POLL_SECONDS):
                return True
            if left_alone:
                return False
        return True

    def _made(self, count: int) -> None:
        self.done += count
        self._replica.steps_done = self.done


class TurnPace:
    """A schedule's: each increment is a transaction of its own in the history."""

    ended = False

    def __init__(self, replica: ReplicaRecord) -> None:
        self.done = 0
        self._replica = replica

    def chunks(self, increments: int) -> Iterator[int]:
        for _ in range(increments):
            mark(BEGIN)
            yield 1
            self.done += 1
            self._replica.steps_done = self.done

    single = chunks

    def wait_for_zero(self, done: threading.Event, alone: Callable[[], bool]) -> bool:
        mark(BEGIN)
        done.wait()  # where nobody sets it, the schedule says that this is a deadlock
        return True

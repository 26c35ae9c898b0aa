"""Who says which batch comes next. Standard library only.

Batches are numbered through the run: batch n is replica n % num_replicas's of step n // num_replicas in the batch plan.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from trainer.schedule.operations import CURSOR, READ, WRITE
from trainer.schedule.point import point

Batch = TypeVar("Batch")
Given = TypeVar("Given", covariant=True)


class Cursor(Protocol[Given]):
    def take(self, replica_id: int, step: int) -> tuple[int, Given]:
        """The number and the samples of the batch that a replica is to use at a step.

        Thread-safety: called by all replicas' threads at once; whether each gets its own is what they differ in.
        """


class Sharded(Generic[Batch]):
    """Safe: a batch is looked up by its place in the plan, and nothing moves."""

    def __init__(self, fetch: Callable[[int], Batch], num_replicas: int) -> None:
        self._fetch, self._num_replicas = fetch, num_replicas

    def take(self, replica_id: int, step: int) -> tuple[int, Batch]:
        number = step * self._num_replicas + replica_id
        return number, self._fetch(number)


class SharedIterator(Generic[Batch]):
    """Unsafe: one position for all. Between looking at it and moving it a batch is fetched, as a loader does."""

    def __init__(self, fetch: Callable[[int], Batch], num_batches: int) -> None:
        self._fetch, self._num_batches = fetch, num_batches
        self._next = 0

    @property
    def position(self) -> int:
        """The number of the next batch, while no replica takes one."""
        return self._next

    @position.setter
    def position(self, number: int) -> None:
        self._next = number

    def take(self, replica_id: int, step: int) -> tuple[int, Batch]:
        point(READ, "cursor", of=CURSOR)
        number = self._next
        batch = self._fetch(number % self._num_batches)
        point(WRITE, "cursor", of=CURSOR, value=number)
        self._next = number + 1
        return number, batch

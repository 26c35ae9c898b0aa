"""Gradient steps on one tf.Variable: threads that take a gradient and subtract it, under each update mode.

The gradient of sum(v * id) does not depend on v: whatever a thread has read, it subtracts the same, and as the kernel
behind `assign_sub` holds the variable's lock every order of steps ends in the same value. The gradient of
sum(v * v) / 2 is v: a step that was computed from an older value subtracts another amount than it should, though no
step is lost.

All numbers are powers of two and small integers, so that float64 adds them exactly in any order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import tensorflow as tf

from trainer.schedule.locks import Barrier, Lock, SharedLock
from trainer.schedule.operations import COMPUTE, CONTRIBUTION, READ, WRITE
from trainer.schedule.point import mark, point, points
from trainer.workloads.counter.shared import Numbers, Section, Shared, array
from trainer.workloads.counter.ways import JOINT, RATE

Take = Callable[[Any, Any], Any]


def independent(value: Any, number: Any) -> Any:
    """What a step subtracts: `RATE` times the gradient of sum(v * number) at a value."""
    with tf.GradientTape() as tape:
        tape.watch(value)
        loss = tf.reduce_sum(value * number)
    return RATE * tape.gradient(loss, value)


def dependent(value: Any, number: Any) -> Any:
    """The same for sum(v * v) / 2."""
    with tf.GradientTape() as tape:
        tape.watch(value)
        loss = tf.reduce_sum(value * value) / 2
    return RATE * tape.gradient(loss, value)


TAKEN: dict[str, Take] = {"gradient_step": independent, "dependent_gradient_step": dependent}


class GradientSteps:
    """A mode in which every replica subtracts by itself: what is held round the step, its reading and its writing."""

    def __init__(self, mode: str, take: Take, shared: Shared, num_writers: int) -> None:
        self.shared, self.take = shared, take
        self._given: list[Numbers] = [np.zeros(1)] * num_writers
        self.whole, self.reading, self.writing = _held(mode)

    def add(self, own: int, count: int, amount: Any) -> None:
        for _ in range(count):
            with self.whole():
                with self.reading():
                    value = self.shared.total.read_value()
                taken = self.take(value, amount)
                mark(COMPUTE)
                with self.writing():
                    self.shared.total.assign_sub(taken)
            self._given[own] = self._given[own] + array(taken.numpy())

    @property
    def given(self) -> Sequence[Numbers]:
        return self._given

    def section(self) -> Section:
        return nullcontext()

    def snapshot(self) -> Any:
        with self.whole(), self.reading():
            return self.shared.total.read_value()

    def abort(self) -> None:
        """Nobody waits: every lock is given back by whoever holds it."""


def _held(mode: str) -> tuple[Callable[[], Section], Callable[[], Section], Callable[[], Section]]:
    """What is held round a whole step, round its reading and round its writing."""
    if mode == "lock_free":
        return nullcontext, nullcontext, nullcontext
    if mode == "reader_writer":
        shared_lock = SharedLock("shared lock")
        return nullcontext, shared_lock.read, shared_lock.write
    lock = Lock("lock")
    if mode == "serialized":
        return lambda: lock, nullcontext, nullcontext
    return nullcontext, lambda: lock, lambda: lock


class OptimisticSteps(GradientSteps):
    """As `Optimistic`: a gradient of a value that is no longer there is thrown away, and taken again under the lock."""

    def __init__(self, mode: str, take: Take, shared: Shared, num_writers: int) -> None:
        super().__init__("lock_free", take, shared, num_writers)
        self.lock = Lock("lock")
        self.version = 0

    def add(self, own: int, count: int, amount: Any) -> None:
        for _ in range(count):
            version = self.version
            taken = self._taken(amount)
            with self.lock:
                if version != self.version or version % 2:
                    taken = self._taken(amount)
                self.version += 1
                self.shared.total.assign_sub(taken)
                self.version += 1
            self._given[own] = self._given[own] + array(taken.numpy())

    def _taken(self, amount: Any) -> Any:
        taken = self.take(self.shared.total.read_value(), amount)
        mark(COMPUTE)
        return taken


class JointSteps(GradientSteps):
    """As `Joint`: replica 0 subtracts the mean of what all have taken, or under `unscaled_sum` the sum."""

    def __init__(self, mode: str, take: Take, shared: Shared, num_writers: int) -> None:
        super().__init__("lock_free", take, shared, num_writers)
        self.scale = 1 / num_writers if mode == "all_reduce" else 1.0
        self.put_in: list[Any] = [0] * num_writers
        self.names = [f"contribution of replica {own}" for own in range(num_writers)]
        self.barrier = Barrier(num_writers, "barrier")

    def add(self, own: int, count: int, amount: Any) -> None:
        for _ in range(count):
            value = self.shared.total.read_value()
            point(WRITE, self.names[own], of=CONTRIBUTION)
            self.put_in[own] = self.take(value, amount)
            mark(COMPUTE)
            self.barrier.wait()  # every contribution is there, and nobody reads any more
            if own == 0:
                points(READ, "contributions", self.names, of=CONTRIBUTION)
                self.shared.total.assign_sub(self.scale * sum(self.put_in))
            self.barrier.wait()  # nobody reads before that

    def abort(self) -> None:
        self.barrier.abort()


def steps_of(mode: str) -> type[GradientSteps]:
    if mode in JOINT:
        return JointSteps
    return OptimisticSteps if mode == "optimistic" else GradientSteps

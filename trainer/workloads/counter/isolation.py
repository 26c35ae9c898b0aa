"""What an update mode holds round increments. The increments themselves are in `on_torch.py` and `on_tensorflow.py`.

Each class is one mechanism of `trainer/updates/mechanisms.py`, for one variable. They stand in the same order, and do
the same as the update modes of training in `trainer/updates/transactions.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any, Protocol

from trainer.schedule.locks import AnyReadWriteLock, Barrier, Lock, SharedLock
from trainer.schedule.operations import ABORT, BEGIN, COMPUTE, CONTRIBUTION, READ, WRITE
from trainer.schedule.point import mark, point, points
from trainer.workloads.counter.shared import Numbers, Operation, Section, Shared


class Isolation(Protocol):
    """One mode over one variable.

    Attributes:
        given: what each replica has subtracted in gradient steps in all.

    Thread-safety: called by all replicas' threads at once.
    """

    @property
    def given(self) -> Sequence[Numbers]: ...

    def add(self, own: int, count: int, amount: Any) -> None:
        """Add `amount`, `count` times, each time as a transaction of its own."""

    def section(self) -> Section:
        """A critical section round several increments, which are then made with nothing more held."""

    def snapshot(self) -> Any:
        """A copy of the value, read as the mode reads."""

    def abort(self) -> None:
        """Wake whoever waits for another replica; they raise `threading.BrokenBarrierError`."""


class Alone:
    """What modes have in common in which no replica waits for another's contribution."""

    given: Sequence[Numbers] = ()

    def __init__(self, operation: Operation, shared: Shared, num_writers: int) -> None:
        self.operation, self.shared = operation, shared

    def section(self) -> Section:
        return nullcontext()

    def snapshot(self) -> Any:
        return self.operation.copy(self.shared)

    def abort(self) -> None:
        """Nobody waits: every lock is given back by whoever holds it."""


class Locked(Alone):
    """Safe: one lock, from reading to writing; readers take it, too. For increments `serialized` is the same."""

    def __init__(self, operation: Operation, shared: Shared, num_writers: int) -> None:
        super().__init__(operation, shared, num_writers)
        self.lock = Lock("lock")

    def add(self, own: int, count: int, amount: Any) -> None:
        self.operation.locked(self.shared, count, amount, self.lock)

    def section(self) -> Section:
        return self.lock

    def snapshot(self) -> Any:
        with self.lock:
            return self.operation.copy(self.shared)


class ReaderWriter(Alone):
    """Safe: as `Locked`, but readers read side by side."""

    def __init__(self, operation: Operation, shared: Shared, num_writers: int) -> None:
        super().__init__(operation, shared, num_writers)
        self.shared_lock = SharedLock("shared lock")

    def add(self, own: int, count: int, amount: Any) -> None:
        self.operation.locked(self.shared, count, amount, Exclusive(self.shared_lock))

    def section(self) -> Section:
        return Exclusive(self.shared_lock)

    def snapshot(self) -> Any:
        with self.shared_lock.read():
            return self.operation.copy(self.shared)


class Exclusive:
    """A shared lock's writing side that one thread can enter again and again.

    Thread-safety: none; each thread has its own.
    """

    def __init__(self, lock: AnyReadWriteLock) -> None:
        self._lock = lock
        self._inside: AbstractContextManager[None] = nullcontext()

    def __enter__(self) -> None:
        self._inside = self._lock.write()
        self._inside.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, stack: TracebackType | None
    ) -> None:
        self._inside.__exit__(kind, error, stack)


class Optimistic(Alone):
    """Safe: read without a lock; write under it if nothing was written since, else read again.

    The version is odd while a write is under way, so that a read that overlaps one never counts.

    Source: Kung and Robinson 1981 (optimistic concurrency control); the odd version is a sequence lock's.
    """

    def __init__(self, operation: Operation, shared: Shared, num_writers: int) -> None:
        super().__init__(operation, shared, num_writers)
        self.lock = Lock("lock")
        self.version = 0

    def add(self, own: int, count: int, amount: Any) -> None:
        read, write = self.operation.read, self.operation.write
        assert read is not None
        assert write is not None
        for _ in range(count):
            version = self.version
            new = read(self.shared, amount)
            mark(COMPUTE)
            with self.lock:
                if version != self.version or version % 2:
                    new = read(self.shared, amount)
                    mark(COMPUTE)  # what was read before is thrown away
                self.version += 1
                write(self.shared, new)
                self.version += 1

    def snapshot(self) -> Any:
        version = self.version
        found = self.operation.copy(self.shared)
        if version == self.version and version % 2 == 0:
            return found
        mark(ABORT)  # what was read is thrown away
        mark(BEGIN)
        with self.lock:
            return self.operation.copy(self.shared)


class Unprotected(Alone):
    """Unsafe: nothing is held. `lock_free` where the increment is one kernel, `overwrite` where it reads first."""

    def add(self, own: int, count: int, amount: Any) -> None:
        self.operation.free(self.shared, count, amount)


class WriteLocked(Alone):
    """Unsafe: the write is locked, but what it is based on was read before, so it undoes what landed in between."""

    def __init__(self, operation: Operation, shared: Shared, num_writers: int) -> None:
        super().__init__(operation, shared, num_writers)
        self.lock = Lock("lock")

    def add(self, own: int, count: int, amount: Any) -> None:
        read, write = self.operation.read, self.operation.write
        assert read is not None
        assert write is not None
        for _ in range(count):
            new = read(self.shared, amount)
            with self.lock:
                write(self.shared, new)


class Joint(Alone):
    """Safe: replica 0 adds the sum of what all put in, while every replica waits.

    A count is summed, never averaged, so that `unscaled_sum` is the same.
    """

    def __init__(self, operation: Operation, shared: Shared, num_writers: int) -> None:
        super().__init__(operation, shared, num_writers)
        self.put_in: list[Any] = [0] * num_writers
        self.names = [f"contribution of replica {own}" for own in range(num_writers)]
        self.barrier = Barrier(num_writers, "barrier")

    def add(self, own: int, count: int, amount: Any) -> None:
        for _ in range(count):
            point(WRITE, self.names[own], of=CONTRIBUTION)
            self.put_in[own] = amount
            mark(COMPUTE)
            self.barrier.wait()  # every contribution is there
            if own == 0:
                points(READ, "contributions", self.names, of=CONTRIBUTION)
                self.operation.free(self.shared, 1, sum(self.put_in))
            self.barrier.wait()  # nobody puts in the next one before that

    def abort(self) -> None:
        self.barrier.abort()


MODES: dict[str, type[Alone]] = {
    "all_reduce": Joint,
    "unscaled_sum": Joint,
    "serialized": Locked,
    "locked": Locked,
    "per_variable_lock": Locked,
    "reader_writer": ReaderWriter,
    "optimistic": Optimistic,
    "lock_free": Unprotected,
    "write_locked": WriteLocked,
    "overwrite": Unprotected,
}

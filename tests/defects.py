"""Planted defects for `test_defects.py`: each a safe form and, below it, the same with one line wrong.

Update modes are brought as a user brings them; state holders take the place of a built-in unsafe one. A base that is
read and then replaced, rather than added to, is what shows a lost update without cutting kernels up.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from trainer.schedule.locks import Barrier, Lock, RLock, SharedLock
from trainer.schedule.operations import BUFFER, CONTRIBUTION, CURSOR, FLAG, GENERATOR, READ, UPDATE, WRITE
from trainer.schedule.point import point
from trainer.state.cursor import SharedIterator
from trainer.state.first_call import DoubleChecked
from trainer.state.gradients import SharedGrad
from trainer.state.precision import ProcessGlobal
from trainer.state.random_numbers import Generated
from trainer.updates.all_reduce import AllReduce
from trainer.updates.shared_vector import Replica, SharedVector
from trainer.updates.transactions import Alone, Compute, Locked, Optimistic, PerVariableLock

# One lock round the base and the write.


class Replacing(Alone):
    """Safe: the base is read, and what is made of it written, under one lock."""

    def step(self, replica: Replica, compute: Compute) -> None:
        with self.lock:
            self.shared.copy_to(replica)
        compute(replica)
        with self.lock:
            base = self.shared.vector.clone()
            self.shared.replace(replica, base + self.shared.delta(replica, base=base))


class BaseUnlocked(Replacing):
    """The base is read before the lock is taken."""

    def step(self, replica: Replica, compute: Compute) -> None:
        with self.lock:
            self.shared.copy_to(replica)
        compute(replica)
        base = self.shared.vector.clone()
        with self.lock:
            self.shared.replace(replica, base + self.shared.delta(replica, base=base))


class BaseUnderALockOfItsOwn(Replacing):
    """The base is read under the lock, which is then let go of and taken again."""

    def step(self, replica: Replica, compute: Compute) -> None:
        with self.lock:
            self.shared.copy_to(replica)
        compute(replica)
        with self.lock:
            base = self.shared.vector.clone()
        with self.lock:
            self.shared.replace(replica, base + self.shared.delta(replica, base=base))


class WriteUnlocked(Replacing):
    """The lock is released before the write."""

    def step(self, replica: Replica, compute: Compute) -> None:
        with self.lock:
            self.shared.copy_to(replica)
        compute(replica)
        with self.lock:
            base = self.shared.vector.clone()
        self.shared.replace(replica, base + self.shared.delta(replica, base=base))


class SnapshotUnlocked(Replacing):
    """The snapshot is read without the lock: no update is lost, but a gradient may be of two versions."""

    def step(self, replica: Replica, compute: Compute) -> None:
        self.shared.copy_to(replica)
        compute(replica)
        with self.lock:
            base = self.shared.vector.clone()
            self.shared.replace(replica, base + self.shared.delta(replica, base=base))


class WriteLockedOnly(Replacing):
    """The lock is round the write alone, which goes by the snapshot."""

    whole_snapshot: ClassVar[bool] = True

    def step(self, replica: Replica, compute: Compute) -> None:
        self.shared.copy_to(replica)
        compute(replica)
        with self.lock:
            self.shared.replace(replica, replica.snapshot + self.shared.delta(replica, base=replica.snapshot))


class LockOfItsOwn(Alone):
    """Safe: as `Replacing`, with the lock looked up; there is one."""

    def __init__(self, shared: SharedVector, replicas: Sequence[Replica]) -> None:
        super().__init__(shared, replicas)
        self.locks = [self.lock for _ in replicas]

    def step(self, replica: Replica, compute: Compute) -> None:
        lock = self.locks[replica.replica_id]
        with lock:
            self.shared.copy_to(replica)
        compute(replica)
        with lock:
            base = self.shared.vector.clone()
            self.shared.replace(replica, base + self.shared.delta(replica, base=base))


class LockPerReplica(LockOfItsOwn):
    """Each replica has a lock to itself."""

    def __init__(self, shared: SharedVector, replicas: Sequence[Replica]) -> None:
        super().__init__(shared, replicas)
        self.locks = [Lock("lock") for _ in replicas]


class AddsTwice(Locked):
    """An update is added twice."""

    def step(self, replica: Replica, compute: Compute) -> None:
        with self.lock:
            self.shared.copy_to(replica)
        compute(replica)
        with self.lock:
            delta = self.shared.delta(replica, base=self.shared.vector)
            self.shared.add(replica, delta)
            self.shared.vector.add_(delta)


class ReadsAndWrites(Alone):
    """Safe: many read side by side, one writes."""

    def __init__(self, shared: SharedVector, replicas: Sequence[Replica]) -> None:
        super().__init__(shared, replicas)
        self.shared_lock = SharedLock("shared lock")

    def step(self, replica: Replica, compute: Compute) -> None:
        with self.shared_lock.read():
            self.shared.copy_to(replica)
        compute(replica)
        with self.shared_lock.write():
            base = self.shared.vector.clone()
            self.shared.replace(replica, base + self.shared.delta(replica, base=base))


class WritesUnderTheReadLock(ReadsAndWrites):
    """The write is made under the lock that readers share."""

    def step(self, replica: Replica, compute: Compute) -> None:
        with self.shared_lock.read():
            self.shared.copy_to(replica)
        compute(replica)
        with self.shared_lock.read():
            base = self.shared.vector.clone()
            self.shared.replace(replica, base + self.shared.delta(replica, base=base))


class OneVariableUnlocked(PerVariableLock):
    """One variable is written outside of its lock."""

    def step(self, replica: Replica, compute: Compute) -> None:
        self.shared.note_version(replica)
        for lock, part in self.locks:
            with lock:
                self.shared.copy_part(replica, part)
        compute(replica)
        self.shared.commit(replica)
        for lock, part in self.locks[:-1]:
            with lock:
                self.shared.add_part(replica, part)
        self.shared.add_part(replica, self.locks[-1][1])


class StatisticsInside(Alone):
    """Safe: statistics are read and written where the weights are."""

    def step(self, replica: Replica, compute: Compute) -> None:
        statistics = self.shared.layout.regions["statistics"]
        with self.lock:
            self.shared.copy_to(replica)
        compute(replica)
        with self.lock:
            delta = self.shared.delta(replica, base=self.shared.vector)
            read = self.shared.vector[statistics].clone()
            self.shared.commit(replica)
            self.shared.vector[: statistics.start] += delta[: statistics.start]
            self.shared.vector[statistics] = read + delta[statistics]


class StatisticsOutside(StatisticsInside):
    """Statistics are written after the lock was released."""

    def step(self, replica: Replica, compute: Compute) -> None:
        statistics = self.shared.layout.regions["statistics"]
        with self.lock:
            self.shared.copy_to(replica)
        compute(replica)
        with self.lock:
            delta = self.shared.delta(replica, base=self.shared.vector)
            read = self.shared.vector[statistics].clone()
            self.shared.commit(replica)
            self.shared.vector[: statistics.start] += delta[: statistics.start]
        self.shared.vector[statistics] = read + delta[statistics]


class EachItsOwn(Alone):
    """Safe: each replica reads all variables and writes one, under one lock."""

    def step(self, replica: Replica, compute: Compute) -> None:
        with self.lock:
            self.shared.copy_to(replica)
            compute(replica)
            self.shared.commit(replica)
            self.shared.add_part(replica, self.shared.variables[replica.replica_id])


class EachItsOwnUnlocked(EachItsOwn):
    """What one reads, the other may write meanwhile."""

    def step(self, replica: Replica, compute: Compute) -> None:
        self.shared.copy_to(replica)
        compute(replica)
        with self.lock:
            self.shared.commit(replica)
            self.shared.add_part(replica, self.shared.variables[replica.replica_id])


# Locks that never come.


class InOneOrder(Alone):
    """Safe: everybody takes the two locks in one order."""

    def __init__(self, shared: SharedVector, replicas: Sequence[Replica]) -> None:
        super().__init__(shared, replicas)
        self.locks = [Lock("lock of weights"), Lock("lock of slots")]

    def step(self, replica: Replica, compute: Compute) -> None:
        outer, inner = self.locks
        with outer, inner:
            self.shared.copy_to(replica)
            compute(replica)
            self.shared.add(replica, self.shared.delta(replica, base=self.shared.vector))


class InOppositeOrders(InOneOrder):
    """Replica 1 takes them the other way round."""

    def step(self, replica: Replica, compute: Compute) -> None:
        outer, inner = self.locks if replica.replica_id == 0 else self.locks[::-1]
        with outer, inner:
            self.shared.copy_to(replica)
            compute(replica)
            self.shared.add(replica, self.shared.delta(replica, base=self.shared.vector))


class TakenTwice(Alone):
    """Safe: a lock that is taken again by who holds it lets it in."""

    def __init__(self, shared: SharedVector, replicas: Sequence[Replica]) -> None:
        super().__init__(shared, replicas)
        self.lock = RLock("lock")

    def step(self, replica: Replica, compute: Compute) -> None:
        with self.lock:
            self.shared.copy_to(replica)
            compute(replica)
            self.write(replica)

    def write(self, replica: Replica) -> None:
        with self.lock:
            self.shared.add(replica, self.shared.delta(replica, base=self.shared.vector))


class TakenTwicePlain(TakenTwice):
    """The lock is a plain one."""

    def __init__(self, shared: SharedVector, replicas: Sequence[Replica]) -> None:
        super().__init__(shared, replicas)
        self.lock = Lock("lock")


class Occupied(Alone):
    """Safe: a flag under a condition, waited for in a loop."""

    def __init__(self, shared: SharedVector, replicas: Sequence[Replica]) -> None:
        super().__init__(shared, replicas)
        self.changed = threading.Condition(threading.Lock())
        self.occupied = False

    def step(self, replica: Replica, compute: Compute) -> None:
        self.enter()
        self.shared.copy_to(replica)
        self.leave()
        compute(replica)
        self.enter()
        base = self.shared.vector.clone()
        self.shared.replace(replica, base + self.shared.delta(replica, base=base))
        self.leave()

    def enter(self) -> None:
        with self.changed:
            while self.occupied:
                self.changed.wait()
            self.occupied = True

    def leave(self) -> None:
        with self.changed:
            self.occupied = False
            self.changed.notify()


class WaitsOnce(Occupied):
    """The flag is not looked at again after the wait: somebody else may have come first."""

    def enter(self) -> None:
        with self.changed:
            if self.occupied:
                self.changed.wait()
            self.occupied = True


class WakesNobody(Occupied):
    """Who leaves does not say so."""

    def leave(self) -> None:
        with self.changed:
            self.occupied = False


# All together.


class Joint(AllReduce):
    """Safe: `AllReduce`, with room for contributions before there are any."""

    def __init__(self, shared: SharedVector, replicas: Sequence[Replica]) -> None:
        super().__init__(shared, replicas)
        for replica in replicas:
            replica.contribution = torch.zeros(shared.layout.read_size)

    def step(self, replica: Replica, compute: Compute) -> None:
        self.shared.copy_to(replica)
        point(WRITE, self.joint.contributions[replica.replica_id], of=CONTRIBUTION)
        compute(replica)
        self.barrier.wait()
        self.joint.add_share(replica)
        if replica.replica_id == 0:
            self.joint.commit()
        self.barrier.wait()


class WithoutTheFirstBarrier(Joint):
    def step(self, replica: Replica, compute: Compute) -> None:
        self.shared.copy_to(replica)
        point(WRITE, self.joint.contributions[replica.replica_id], of=CONTRIBUTION)
        compute(replica)
        self.joint.add_share(replica)
        if replica.replica_id == 0:
            self.joint.commit()
        self.barrier.wait()


class WithoutTheSecondBarrier(Joint):
    def step(self, replica: Replica, compute: Compute) -> None:
        self.shared.copy_to(replica)
        point(WRITE, self.joint.contributions[replica.replica_id], of=CONTRIBUTION)
        compute(replica)
        self.barrier.wait()
        self.joint.add_share(replica)
        if replica.replica_id == 0:
            self.joint.commit()


class TooFewParties(Joint):
    """The barriers let one replica less go on than there are."""

    def __init__(self, shared: SharedVector, replicas: Sequence[Replica]) -> None:
        super().__init__(shared, replicas)
        self.barrier = Barrier(len(replicas) - 1, "barrier")


class TooManyParties(Joint):
    """The barriers wait for one replica more than there are."""

    def __init__(self, shared: SharedVector, replicas: Sequence[Replica]) -> None:
        super().__init__(shared, replicas)
        self.barrier = Barrier(len(replicas) + 1, "barrier")


class ShareTwice(Joint):
    """Replica 0 adds its share twice."""

    def step(self, replica: Replica, compute: Compute) -> None:
        self.shared.copy_to(replica)
        point(WRITE, self.joint.contributions[replica.replica_id], of=CONTRIBUTION)
        compute(replica)
        self.barrier.wait()
        self.joint.add_share(replica)
        if replica.replica_id == 0:
            self.joint.add_share(replica)
            self.joint.commit()
        self.barrier.wait()


class OneShareOfTwo(Joint):
    """Replica 1's share is nobody's."""

    def step(self, replica: Replica, compute: Compute) -> None:
        self.shared.copy_to(replica)
        point(WRITE, self.joint.contributions[replica.replica_id], of=CONTRIBUTION)
        compute(replica)
        self.barrier.wait()
        if replica.replica_id == 0:
            self.joint.add_share(replica)
            self.joint.commit()
        self.barrier.wait()


# Versions in place of locks.


class Unchecked(Optimistic):
    """The version is not looked at again."""

    def step(self, replica: Replica, compute: Compute) -> None:
        self.shared.copy_to(replica)
        compute(replica)
        with self.lock:
            self.version += 1
            self.shared.add(replica, self.shared.delta(replica, base=self.shared.vector))
            self.version += 1


class CheckedTooEarly(Optimistic):
    """The version is looked at before the lock is taken."""

    def step(self, replica: Replica, compute: Compute) -> None:
        version = self.version
        self.shared.copy_to(replica)
        compute(replica)
        late = version != self.version or version % 2
        with self.lock:
            if late:
                self.shared.copy_to(replica)
                compute(replica)
            self.version += 1
            self.shared.add(replica, self.shared.delta(replica, base=self.shared.vector))
            self.version += 1


class CountedOnce(Optimistic):
    """The version is raised before the write and not after it: an even one may be half there."""

    def step(self, replica: Replica, compute: Compute) -> None:
        version = self.version
        self.shared.copy_to(replica)
        compute(replica)
        with self.lock:
            if version != self.version or version % 2:
                self.shared.copy_to(replica)
                compute(replica)
            self.version += 1
            self.shared.add(replica, self.shared.delta(replica, base=self.shared.vector))


class Sequenced(Alone):
    """Safe: a copy during which something was written is made again, under the lock.

    Source: the sequence lock, with a lock in place of trying again for ever.
    """

    def __init__(self, shared: SharedVector, replicas: Sequence[Replica]) -> None:
        super().__init__(shared, replicas)
        self.version = 0

    def step(self, replica: Replica, compute: Compute) -> None:
        version = self.version
        self.shared.copy_to(replica)
        if version % 2 or version != self.version:
            with self.lock:
                self.shared.copy_to(replica)
        compute(replica)
        with self.lock:
            self.version += 1
            self.shared.add(replica, self.shared.delta(replica, base=self.shared.vector))
            self.version += 1


class ReadOnce(Sequenced):
    """A copy is never made again."""

    def step(self, replica: Replica, compute: Compute) -> None:
        self.shared.copy_to(replica)
        compute(replica)
        with self.lock:
            self.version += 1
            self.shared.add(replica, self.shared.delta(replica, base=self.shared.vector))
            self.version += 1


# Buffers, which nobody announces.


class OwnDelta(Alone):
    """Safe: what is to be added is kept in a buffer a replica."""

    def __init__(self, shared: SharedVector, replicas: Sequence[Replica]) -> None:
        super().__init__(shared, replicas)
        self.deltas = [torch.zeros(shared.layout.size) for _ in replicas]

    def step(self, replica: Replica, compute: Compute) -> None:
        with self.lock:
            self.shared.copy_to(replica)
        compute(replica)
        delta = self.deltas[replica.replica_id]
        delta.copy_(self.shared.delta(replica, base=self.shared.vector))
        with self.lock:
            self.shared.add(replica, delta)


class OneDelta(OwnDelta):
    """There is one buffer for all."""

    def __init__(self, shared: SharedVector, replicas: Sequence[Replica]) -> None:
        super().__init__(shared, replicas)
        self.deltas = [torch.zeros(shared.layout.size)] * len(replicas)


class OneScratch(Alone):
    """As `lock_free`, by way of a buffer that all replicas have in common and no schedule knows of."""

    def __init__(self, shared: SharedVector, replicas: Sequence[Replica]) -> None:
        super().__init__(shared, replicas)
        self.scratch = torch.zeros(shared.layout.size)

    def step(self, replica: Replica, compute: Compute) -> None:
        self.shared.copy_to(replica)
        compute(replica)
        self.scratch.copy_(self.shared.delta(replica, base=self.shared.vector))
        self.shared.add(replica, self.scratch)


class OneSnapshot(Locked):
    """All replicas have one snapshot."""

    def __init__(self, shared: SharedVector, replicas: Sequence[Replica]) -> None:
        super().__init__(shared, replicas)
        for replica in replicas[1:]:
            replica.snapshot, replica.prefix = replicas[0].snapshot, replicas[0].prefix


# Precision.


class WholeScope(ProcessGlobal):
    """Safe: one mode for all, and a lock from setting it to putting it back."""

    def clear(self) -> None:
        super().clear()
        self._lock = Lock("mode lock")  # one for each order

    @contextmanager
    def scope(self, dtype: str) -> Iterator[None]:
        with self._lock:
            before = self.current()
            self._set(dtype)
            try:
                yield
            finally:
                self._set(before)


class EndsLocked(WholeScope):
    """The lock is round setting it and round putting it back, but not round what is in between."""

    @contextmanager
    def scope(self, dtype: str) -> Iterator[None]:
        with self._lock:
            before = self.current()
            self._set(dtype)
        try:
            yield
        finally:
            with self._lock:
                self._set(before)


class PutsBackItsOwn(WholeScope):
    """What the scope set is put back, not what was there before."""

    @contextmanager
    def scope(self, dtype: str) -> Iterator[None]:
        with self._lock:
            self._set(dtype)
            try:
                yield
            finally:
                self._set(dtype)


class PutsNothingBack(WholeScope):
    @contextmanager
    def scope(self, dtype: str) -> Iterator[None]:
        with self._lock:
            self._set(dtype)
            yield


# First calls.


class SetTooEarly(DoubleChecked):
    """The flag is set before the first call is made: others go on without it."""

    @contextmanager
    def call(self) -> Iterator[bool]:
        point(READ, "first call", of=FLAG)
        if not self._done:
            with self._lock:
                point(READ, "first call", of=FLAG)
                if not self._done:
                    point(WRITE, "first call", of=FLAG)
                    self._done = True
                    yield True
                    return
        yield False


class SetTooLate(DoubleChecked):
    """The flag is set after the lock was released."""

    @contextmanager
    def call(self) -> Iterator[bool]:
        point(READ, "first call", of=FLAG)
        if not self._done:
            with self._lock:
                point(READ, "first call", of=FLAG)
                first = not self._done
                if first:
                    yield True
            if first:
                point(WRITE, "first call", of=FLAG)
                self._done = True
                return
        yield False


class CheckedOnce(DoubleChecked):
    """The flag is not looked at again under the lock."""

    @contextmanager
    def call(self) -> Iterator[bool]:
        point(READ, "first call", of=FLAG)
        if not self._done:
            with self._lock:
                yield True
                point(WRITE, "first call", of=FLAG)
                self._done = True
                return
        yield False


# Cursors.


class LockedIterator(SharedIterator[Any]):
    """Safe: one position for all, looked at and moved under a lock."""

    def __init__(self, fetch: Callable[[int], Any], num_batches: int) -> None:
        super().__init__(fetch, num_batches)
        self._lock = Lock("cursor lock")

    def take(self, replica_id: int, step: int) -> tuple[int, Any]:
        with self._lock:
            point(READ, "cursor", of=CURSOR)
            number = self._next
            point(WRITE, "cursor", of=CURSOR, value=number)
            self._next = number + 1
        return number, self._fetch(number % self._num_batches)


class LookLocked(LockedIterator):
    """The lock is round looking at it only."""

    def take(self, replica_id: int, step: int) -> tuple[int, Any]:
        with self._lock:
            point(READ, "cursor", of=CURSOR)
            number = self._next
        point(WRITE, "cursor", of=CURSOR, value=number)
        self._next = number + 1
        return number, self._fetch(number % self._num_batches)


class MovedTwice(LockedIterator):
    """The position is moved by two."""

    def take(self, replica_id: int, step: int) -> tuple[int, Any]:
        with self._lock:
            point(READ, "cursor", of=CURSOR)
            number = self._next
            point(WRITE, "cursor", of=CURSOR, value=number)
            self._next = number + 2
        return number, self._fetch(number % self._num_batches)


# Gradients.


class LockedGrad(SharedGrad):
    """Safe: one buffer for all, under a lock from clearing it to reading it."""

    def __init__(self, layout: Any) -> None:
        super().__init__(layout)
        self._lock = Lock("gradient lock")

    def put(self, contribution: Tensor) -> Tensor:
        own = contribution.clone()
        with self._lock:
            self._clear()
            self._add(own)
            self._read(contribution)
        self._own.mixed = not torch.equal(contribution, own)
        return contribution

    def _clear(self) -> None:
        point(WRITE, ".grad", of=BUFFER)
        self._buffer.zero_()

    def _add(self, own: Tensor) -> None:
        point(UPDATE, ".grad", of=BUFFER)
        for span in self._spans:
            self._buffer[span].add_(own[span])

    def _read(self, contribution: Tensor) -> None:
        point(READ, ".grad", of=BUFFER)
        for span in self._spans:
            contribution[span] = self._buffer[span]


class ClearedAfterUse(LockedGrad):
    """The buffer is cleared after use, when the lock was released: by then another's gradient may be in it."""

    def put(self, contribution: Tensor) -> Tensor:
        own = contribution.clone()
        with self._lock:
            self._add(own)
            self._read(contribution)
        self._clear()
        self._own.mixed = not torch.equal(contribution, own)
        return contribution


# Random numbers.


class LockedGenerator(Generated):
    """Unsafe for all its lock: each draw is whole, as it was without, and who comes first gets the first numbers."""

    _lock = threading.Lock()  # never held at an announcement

    def bits(self, *, layer_index: int, num_elements: int, batch: int | None) -> Any:
        assert batch is not None
        point(UPDATE, "generator", of=GENERATOR)
        with self._lock:
            return self._draw((batch, num_elements))

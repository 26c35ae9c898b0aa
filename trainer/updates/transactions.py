"""Update modes of `strategy=threads` in which every replica commits by itself, in its own time.

Each mode is one method, `step`: read what the gradient is computed from, compute it, write the update. They differ in
what is held meanwhile and in what the write is based on; nothing else does. `prepare` is no part of that: it takes no
shared value, and makes what it can of the update before a lock is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, Protocol

from torch import Tensor

from trainer.schedule.locks import Lock, SharedLock
from trainer.updates.shared_vector import Replica, SharedVector

# Computes `replica.contribution` from `replica.snapshot`. May be called more than once in a step.
Compute = Callable[[Replica], None]


class UpdateMode(Protocol):
    """How one replica's read-modify-write of the shared variables is isolated from the others'."""

    # Whether the write is based on the snapshot, which then covers slots as well as what a step reads.
    whole_snapshot: ClassVar[bool]

    def __init__(self, shared: SharedVector, replicas: Sequence[Replica]) -> None: ...

    def step(self, replica: Replica, compute: Compute) -> None:
        """One update: fill `replica.snapshot`, call `compute`, put `replica.contribution` into the shared variables.

        Thread-safety: called by all replicas' threads at once, each with its own `replica`.
        """

    def applied(self, replica: Replica) -> Tensor:
        """What the last `step` gave to the optimizer, if it `keeps`: float32 [read_size], valid until its next one."""

    def added(self, replica: Replica) -> Tensor | None:
        """What the last `step` set out to add to the shared variables: float32 [layout.size], as `applied`.

        None where another replica answers for an update that all made together.
        """

    def abort(self) -> None:
        """Wake whoever waits for another replica; they raise `threading.BrokenBarrierError`."""


def reads_in_place(kind: type[UpdateMode]) -> bool:
    """Whether a mode's replicas read the shared values in place: their snapshots are no copies.

    A class says so beside a `step` in which nobody writes from when a replica reads until its gradient is there. A
    `step` of a subclass's own need not be like that, so what counts is the class that has it.
    """
    owner = next((each for each in kind.__mro__ if "step" in vars(each)), kind)
    return bool(vars(owner).get("reads_in_place", False))


class Alone:
    """What modes have in common in which no replica waits for another's contribution."""

    whole_snapshot: ClassVar[bool] = False

    def __init__(self, shared: SharedVector, replicas: Sequence[Replica]) -> None:
        self.shared = shared
        self.lock = Lock("lock")

    def applied(self, replica: Replica) -> Tensor:
        return replica.contribution

    def added(self, replica: Replica) -> Tensor | None:
        return replica.delta

    def abort(self) -> None:
        """Nobody waits: every lock is given back by whoever holds it."""


class Serialized(Alone):
    """Safe: one replica at a time, from reading to writing. No gradient is stale, and nothing runs side by side."""

    reads_in_place: ClassVar[bool] = True

    def step(self, replica: Replica, compute: Compute) -> None:
        with self.lock:
            self.shared.copy_to(replica)
            compute(replica)
            self.shared.prepare(replica)
            self.shared.add(replica, self.shared.delta(replica, base=self.shared.vector))


class Locked(Alone):
    """Safe: the update reads the current values and writes them under one lock, so no other write falls between."""

    def step(self, replica: Replica, compute: Compute) -> None:
        with self.lock:
            self.shared.copy_to(replica)
        compute(replica)
        self.shared.prepare(replica)
        with self.lock:
            self.shared.add(replica, self.shared.delta(replica, base=self.shared.vector))


class ReaderWriter(Alone):
    """Safe: as `Locked`, but replicas may copy side by side."""

    def __init__(self, shared: SharedVector, replicas: Sequence[Replica]) -> None:
        super().__init__(shared, replicas)
        self.shared_lock = SharedLock("shared lock", queues=False)

    def step(self, replica: Replica, compute: Compute) -> None:
        with self.shared_lock.read():
            self.shared.copy_to(replica)
        compute(replica)
        self.shared.prepare(replica)
        with self.shared_lock.write():
            self.shared.add(replica, self.shared.delta(replica, base=self.shared.vector))


class Optimistic(Alone):
    """Safe: copy without a lock; commit under it if nothing was written since, else throw the gradient away.

    The version is odd while a write is under way, so a copy that overlaps one never passes the check. What came too
    late is done again under the lock: each update costs two gradients at most, and nobody starves.

    Source: Kung and Robinson 1981 (optimistic concurrency control); the odd version is a sequence lock's.
    """

    def __init__(self, shared: SharedVector, replicas: Sequence[Replica]) -> None:
        super().__init__(shared, replicas)
        self.version = 0

    def step(self, replica: Replica, compute: Compute) -> None:
        version = self.version
        self.shared.copy_to(replica)
        compute(replica)
        self.shared.prepare(replica)
        with self.lock:
            if version != self.version or version % 2:
                self.shared.copy_to(replica)
                compute(replica)
                self.shared.prepare(replica)
            self.version += 1
            self.shared.add(replica, self.shared.delta(replica, base=self.shared.vector))
            self.version += 1


class PerVariableLock(Alone):
    """Keeps every update, but no two variables together: each variable and its slots have a lock of their own.

    Between two variables another replica's update may be in one already and in the other not yet.
    """

    def __init__(self, shared: SharedVector, replicas: Sequence[Replica]) -> None:
        super().__init__(shared, replicas)
        self.locks = [(Lock(f"lock of {part.name}"), part) for part in shared.variables]

    def step(self, replica: Replica, compute: Compute) -> None:
        self.shared.note_version(replica)
        for lock, part in self.locks:
            with lock:
                self.shared.copy_part(replica, part)
        compute(replica)
        self.shared.commit(replica)
        for lock, part in self.locks:
            with lock:
                self.shared.add_part(replica, part)


class LockFree(Alone):
    """Unsafe: as `Locked` without the lock. The in-place add is one kernel, but a kernel is not atomic.

    Source: Niu et al. 2011 (Hogwild!).
    """

    def step(self, replica: Replica, compute: Compute) -> None:
        self.shared.copy_to(replica)
        compute(replica)
        self.shared.prepare(replica)
        self.shared.add(replica, self.shared.delta(replica, base=self.shared.vector))


class SlotsUnlocked(Alone):
    """Unsafe: weights are updated under the lock, but slots are written back from the snapshot without it."""

    whole_snapshot: ClassVar[bool] = True

    def step(self, replica: Replica, compute: Compute) -> None:
        with self.lock:
            self.shared.copy_to(replica)
        compute(replica)
        delta = self.shared.delta(replica, base=replica.snapshot)
        self.shared.replace_slots(replica.snapshot + delta)
        with self.lock:
            self.shared.add_weights(replica, delta)


class WriteLocked(Alone):
    """Unsafe: the write is locked, but what it is based on was read before, so it undoes what landed in between."""

    whole_snapshot: ClassVar[bool] = True

    def step(self, replica: Replica, compute: Compute) -> None:
        self.shared.copy_to(replica)
        compute(replica)
        self.shared.prepare(replica)
        with self.lock:
            self.shared.replace(replica, replica.snapshot + self.shared.delta(replica, base=replica.snapshot))


class Overwrite(Alone):
    """Unsafe: as `WriteLocked` without the lock."""

    whole_snapshot: ClassVar[bool] = True

    def step(self, replica: Replica, compute: Compute) -> None:
        self.shared.copy_to(replica)
        compute(replica)
        self.shared.prepare(replica)
        self.shared.replace(replica, replica.snapshot + self.shared.delta(replica, base=replica.snapshot))

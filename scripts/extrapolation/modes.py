"""Update modes as they are simulated: one function each, one step, with what is held meanwhile.

They follow `trainer/updates/transactions.py` and `all_reduce.py`, class by class. What is not here: `slots_unlocked`,
whose loss depends on the optimizer; what `lock_free` loses inside a kernel, which no window of a profile shows; modes
of `strategy=mirrored`, whose replicas wait for each other and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable

from extrapolation.group import Replica
from extrapolation.machine import Doing

Step = Callable[[Replica, Doing], Doing]


def all_reduce(replica: Replica, between: Doing) -> Doing:
    group = replica.group
    replica.look()  # nobody writes outside the barriers, and the values are read in place
    yield from replica.compute()
    yield from replica.meet(group.barriers[0], _then(replica.barrier_time(), between))
    # Each adds its share of the vector, of all gradients.
    yield from replica.write()
    yield from replica.meet(group.barriers[1], replica.barrier_time())
    group.landed += 1
    replica.staleness = 0


def serialized(replica: Replica, between: Doing) -> Doing:
    group = replica.group
    yield from replica.acquire(group.lock.acquire(replica.thread))
    yield from replica.read()
    yield from replica.compute()
    yield from replica.write()
    replica.commit()
    group.lock.release()


def locked(replica: Replica, between: Doing) -> Doing:
    group = replica.group
    yield from replica.acquire(group.lock.acquire(replica.thread))
    yield from replica.read()
    group.lock.release()
    yield from replica.compute()
    yield from replica.acquire(group.lock.acquire(replica.thread))
    yield from replica.write()
    replica.commit()
    group.lock.release()


def reader_writer(replica: Replica, between: Doing) -> Doing:
    lock = replica.group.shared_lock
    yield from replica.acquire(lock.acquire_shared(replica.thread))
    yield from replica.read()
    lock.release_shared()
    yield from replica.compute()
    yield from replica.acquire(lock.acquire(replica.thread))
    yield from replica.write()
    replica.commit()
    lock.release()


def optimistic(replica: Replica, between: Doing) -> Doing:
    group = replica.group
    version = group.version
    yield from replica.read()
    yield from replica.compute()
    yield from replica.acquire(group.lock.acquire(replica.thread))
    if version != group.version or version % 2:
        replica.again += 1
        yield from replica.read()
        yield from replica.compute()
    group.version += 1
    yield from replica.write()
    replica.commit()
    group.version += 1
    group.lock.release()


def per_variable_lock(replica: Replica, between: Doing) -> Doing:
    group = replica.group
    replica.look()
    share = group.draws.read() / len(group.locks)
    for lock in group.locks:
        yield from replica.acquire(lock.acquire(replica.thread))
        yield from replica.kernel(share)
        lock.release()
    yield from replica.compute()
    replica.commit()  # as the trainer does: before the first variable is written
    share = group.draws.write() / len(group.locks)
    for lock in group.locks:
        yield from replica.acquire(lock.acquire(replica.thread))
        yield from replica.kernel(share)
        lock.release()


def lock_free(replica: Replica, between: Doing) -> Doing:
    yield from replica.read()
    yield from replica.compute()
    yield from replica.write()
    replica.commit()


def write_locked(replica: Replica, between: Doing) -> Doing:
    group = replica.group
    yield from replica.read_in_turn()
    yield from replica.compute()
    yield from replica.acquire(group.lock.acquire(replica.thread))
    yield from replica.write_in_turn()
    replica.commit()
    group.lock.release()


def overwrite(replica: Replica, between: Doing) -> Doing:
    yield from replica.read_in_turn()
    yield from replica.compute()
    yield from replica.write_in_turn()
    replica.commit()


MODES: dict[str, Step] = {
    "all_reduce": all_reduce,
    "serialized": serialized,
    "locked": locked,
    "reader_writer": reader_writer,
    "optimistic": optimistic,
    "per_variable_lock": per_variable_lock,
    "lock_free": lock_free,
    "write_locked": write_locked,
    "overwrite": overwrite,
}
# Of these, updates that are written over are counted; of lock_free, kernels tear inside, and nothing is said.
LOSING = ("write_locked", "overwrite")
NOT_TOLD = ("lock_free",)


def _then(first: Doing, second: Doing) -> Doing:
    try:
        yield from first
        yield from second
    finally:
        first.close()
        second.close()

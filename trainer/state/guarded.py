"""A value with its lock and the rules of a section: how one begins, how it ends, what an exception in it leaves behind.

Invariant: `_value`, `_poison` and `_waiting` are read under some access and changed under write access (`_waiting`
under the lock of `_changed`).

Guarantee: a change that somebody waits for is not missed. Who waits counts itself in `_waiting` before it gives its
access up; a writer looks at the count before it gives its own up; the two exclude each other.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Generic, Literal, NamedTuple, TypeVar

from trainer.state.call_site import call_site, raised_at
from trainer.state.lock_order import LockOrder
from trainer.state.locks import Access, ExclusiveLock, Lock, ReentrantLock
from trainer.state.read_write_lock import ReadWriteLock, UpgradableLock

T = TypeVar("T")

LockKind = Literal["exclusive", "re_entrant", "read_write", "upgradable"]

KINDS: dict[str, Callable[[str], Lock]] = {
    lock.kind: lock for lock in (ExclusiveLock, ReentrantLock, ReadWriteLock, UpgradableLock)
}

_serials = itertools.count(1)  # next() is one C call, so no two threads get the same


class Poisoned(RuntimeError):
    """An exception left a write section, so the value may be half changed. It is `__cause__`."""


class Poison(NamedTuple):
    error: BaseException
    where: str


class Guarded(Generic[T]):
    """What handles work on. The public face is `Synchronized`.

    Thread-safety: `_enter` from any thread; everything else by a thread that is inside.
    """

    __slots__ = (
        "__weakref__",
        "_changed",
        "_lock",
        "_order",
        "_plain",
        "_poison",
        "_poisoning",
        "_serial",
        "_value",
        "_waiting",
        "name",
    )

    def __init__(self, value: T, lock: LockKind, name: str | None, poisoning: bool, order: LockOrder | None) -> None:
        if lock not in KINDS:
            raise ValueError(f"lock must be one of {', '.join(KINDS)}; got {lock!r}.")
        # Never used again, unlike id(): the order of acquire_locked and the edges of LockOrder rest on it.
        self._serial = next(_serials)
        self.name = f"{type(value).__name__}#{self._serial}" if name is None else name
        self._value = value
        self._lock = KINDS[lock](self.name)
        self._poisoning = poisoning
        self._poison: Poison | None = None
        self._order = order
        self._changed = threading.Condition(threading.Lock())
        self._waiting = 0  # in wait_for
        # For with_lock(): the lock, if there is nothing else to do but to take it.
        self._plain = self._lock if order is None and isinstance(self._lock, ExclusiveLock) else None

    def _enter(self, access: Access, timeout_seconds: float | None, repairing: bool) -> bool:
        order, site = self._order, ""
        if order is not None:
            # A try does not wait, so it cannot deadlock; what is acquired while it is held can.
            site = call_site() if timeout_seconds == 0 else order.acquiring(self._serial, self.name)
        if not self._lock.acquire(access, timeout_seconds):
            return False
        if self._poison is not None and not repairing:
            self._lock.release(access)
            self._refuse()
        if order is not None:
            order.acquired(self._serial, self.name, site)
        return True

    def _leave(self, access: Access, error: BaseException | None, mended: bool) -> None:
        try:
            if access == "write":
                self._end_write(error, mended)
        finally:
            self._lock.release(access)
            if self._order is not None:
                self._order.released(self._serial)

    def _end_write(self, error: BaseException | None, mended: bool) -> None:
        if error is not None:
            self._spoil(error)
        elif mended:
            self._poison = None
        if self._waiting:
            self._announce()

    def _refuse(self) -> None:
        poison = self._poison
        if poison is not None:
            raise Poisoned(
                f"{self.name} is poisoned: {poison.error!r} left a write section at {poison.where}. "
                "repair() gives the value to look at and mend; clear_poison() lets everybody in again."
            ) from poison.error

    def _spoil(self, error: BaseException) -> None:
        # The first error is the one to tell: what came later may be its consequence.
        if self._poisoning and self._poison is None:
            self._poison = Poison(error, raised_at(error))

    def _announce(self) -> None:
        with self._changed:
            self._changed.notify_all()

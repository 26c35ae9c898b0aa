"""What a section gives to its thread: the value while the lock is held, and nothing before or after.

A handle is made without the lock, acquires it where `with` begins and is dead where `with` ends, for good: a section is
entered once, so that a handle that was kept cannot come to life again.

There is no `handle.append(x)` for `handle.value.append(x)`: a value's names would collide with the handle's own, type
checkers would see nothing, and it would be no safer.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import get_ident
from types import TracebackType
from typing import Generic, Never, Self, TypeVar

from trainer.state.guarded import Guarded
from trainer.state.locks import Access, AlreadyHeld, LockTimeout, NoSuchAccess, wait_limit

T = TypeVar("T")


class DeadHandle(RuntimeError):
    """A handle was used by a thread that does not hold its lock: before, after or beside the `with` block."""


class ReadOnlyHandle(TypeError):
    """The value was to be set without write access."""


class WaitTimeout(TimeoutError):
    """What `wait_for` waited for did not come about in time. The lock is held again."""


class ReadHandle(Generic[T]):
    """Read access to a value.

    It cannot stop a method of the value from changing it: `handle.value.append(x)` under a read lock is a data race.

    Thread-safety: for the thread that entered it. Any other gets `DeadHandle`.
    """

    __slots__ = ("_access", "_of", "_repairing", "_thread", "_timeout_seconds", "_used", "_wait_timeout")

    def __init__(self, of: Guarded[T], access: Access, timeout_seconds: float | None, repairing: bool = False) -> None:
        self._of = of
        self._access = access
        self._timeout_seconds = timeout_seconds
        self._repairing = repairing
        self._thread = 0  # that is inside; 0 before, after, and while it waits for a condition
        self._used = False
        self._wait_timeout: WaitTimeout | None = None

    @property
    def access(self) -> Access:
        """What the handle has, or had: `read`, `upgrade` or `write`."""
        return self._access

    @property
    def value(self) -> T:
        if self._thread != get_ident():
            self._refuse()
        return self._of._value

    @value.setter
    def value(self, value: Never) -> None:
        self._check()
        raise ReadOnlyHandle(f"{self._of.name}: {self._access} access does not set the value; write access does.")

    def wait_for(self, predicate: Callable[[T], object], timeout_seconds: float | None = None) -> None:
        """Until `predicate(value)` is true: gives the lock up, and has it back on return.

        The predicate is asked under the lock: at once, whenever a write section of anybody has ended, and when time
        is up. It must not change the value. Meanwhile others write, so that what was read before may no longer be so.
        Having the lock back is not limited by `timeout_seconds`.

        Raises:
            AlreadyHeld: an outer section of this thread holds the lock too, and would lose it unawares.
            Poisoned: somebody's write section failed meanwhile.
            WaitTimeout: it did not come true in time. If that leaves a write section, it does not poison: the lock
                has been given up since anything was changed.
        """
        self._check()
        of = self._of
        limit = wait_limit(timeout_seconds)
        if of._lock.nested:
            raise AlreadyHeld(f"{of.name}: wait_for() would give up the lock that an outer section still relies on.")
        if predicate(of._value):
            return
        if of._order is not None:
            of._order.acquiring(of._serial, of.name, again=True)
        # Once, not at every turn: two that wait would wake each other for ever.
        if self._access == "write" and of._waiting:
            of._announce()
        deadline = None if limit < 0 else time.monotonic() + limit
        while True:
            self._wait_for_change(None if deadline is None else max(0.0, deadline - time.monotonic()))
            if not self._repairing:
                of._refuse()
            if predicate(of._value):
                return
            if deadline is not None and time.monotonic() >= deadline:
                self._wait_timeout = WaitTimeout(
                    f"{of.name}: the condition did not come true within {timeout_seconds} s."
                )
                raise self._wait_timeout

    def _wait_for_change(self, timeout_seconds: float | None) -> None:
        of, thread = self._of, self._thread
        try:
            with of._changed:
                of._waiting += 1
                try:
                    self._thread = 0
                    of._lock.release(self._access)
                    of._changed.wait(timeout_seconds)
                finally:
                    of._waiting -= 1
        finally:
            # Also on Ctrl-C: the block that it ends gives the lock back.
            if not self._thread:
                of._lock.acquire(self._access)
                self._thread = thread

    def __enter__(self) -> Self:
        if not self._enter(self._timeout_seconds):
            raise LockTimeout.of(self._of.name, self._access, self._timeout_seconds)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._thread != get_ident():
            if self._used and not self._thread:
                return  # Ctrl-C kept wait_for() from having the lock back: there is nothing to release
            self._refuse()
        self._thread = 0
        spoils = None if error is self._wait_timeout else error
        self._of._leave(self._access, spoils, mended=self._repairing and error is None)

    def _enter(self, timeout_seconds: float | None) -> bool:
        if self._used:
            raise DeadHandle(f"{self._of.name}: a handle is entered once; ask for another.")
        if not self._of._enter(self._access, timeout_seconds, self._repairing):
            return False
        self._used = True
        self._thread = get_ident()
        return True

    def _give_back(self) -> None:
        """Leaves a section in which nothing was done."""
        self._thread = 0
        self._of._leave(self._access, None, mended=False)

    def _check(self) -> None:
        if self._thread != get_ident():
            self._refuse()

    def _refuse(self) -> Never:
        if self._thread:
            why = "another thread holds the lock through this handle."
        elif self._used:
            why = "the handle is dead: its lock has been released."
        else:
            why = "the handle does not hold the lock yet; use it as 'with ... as handle'."
        raise DeadHandle(f"{self._of.name}: {why}")

    def _handle(self) -> Self:
        return self


class WriteHandle(ReadHandle[T]):
    """Write access to a value; from `ulock()`, upgrade access that may become write access.

    Thread-safety: for the thread that entered it. Any other gets `DeadHandle`.
    """

    __slots__ = ()

    @property
    def value(self) -> T:
        if self._thread != get_ident():
            self._refuse()
        return self._of._value

    @value.setter
    def value(self, value: T) -> None:
        self._check()
        if self._access != "write":
            raise ReadOnlyHandle(f"{self._of.name}: {self._access} access does not set the value; write access does.")
        self._of._value = value

    def upgrade(self, timeout_seconds: float | None = None) -> None:
        """From upgrade to write access, once the readers that are inside have left. Nobody writes in between.

        Does not deadlock by itself: one thread at a time has upgrade access. If this thread holds another lock that
        one of those readers waits for, it does.

        Raises:
            LockTimeout: not in time; upgrade access is kept.
            NoSuchAccess: the handle does not have upgrade access.
        """
        self._check()
        of = self._of
        if self._access != "upgrade":
            raise NoSuchAccess(
                f"{of.name}: upgrade() goes from upgrade to write access; this handle has {self._access}."
            )
        if of._order is not None and timeout_seconds != 0:
            of._order.acquiring(of._serial, of.name, again=True)
        if not of._lock.upgrade(timeout_seconds):
            raise LockTimeout.of(of.name, "write", timeout_seconds)
        self._access = "write"

    def downgrade(self) -> None:
        """One step down without letting go: from write to upgrade (if the lock has that) or read, from upgrade to read.

        From write access it is the end of a write section: waiting readers go in, and exceptions no longer poison.

        Raises:
            NoSuchAccess: the kind of lock has nothing weaker.
        """
        self._check()
        of = self._of
        # Before anybody is let in, who would else find the poison that was mended.
        if self._access == "write" and len(of._lock.accesses) > 1:
            of._end_write(None, mended=self._repairing)
        self._access = of._lock.downgrade(self._access)

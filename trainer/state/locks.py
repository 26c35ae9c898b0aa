"""What all kinds of locks have in common, and the two that have one access only. Standard library only.

Accesses, weakest first: `read` goes together with other reads; `upgrade` goes together with reads, is held by one
thread at a time and may become `write` without leaving; `write` is alone. A kind says which of them it has.

Assumption, for every kind: who acquired an access gives it back, in the same thread.
"""

from __future__ import annotations

import threading
from typing import ClassVar, Literal, Protocol, Self

from trainer.schedule.locks import RLock

Access = Literal["read", "upgrade", "write"]


class LockTimeout(TimeoutError):
    """The access asked for was not to be had within the time given. Nothing was acquired."""

    # Not an __init__ with these parameters: an exception is pickled, to another process, by its message alone.
    @classmethod
    def of(cls, name: str, access: Access, timeout_seconds: float | None) -> Self:
        return cls(f"{name}: no {access} access within {timeout_seconds} s.")


class AlreadyHeld(RuntimeError):
    """A thread asked for a lock that it holds, and that would wait for itself for ever."""


class NoSuchAccess(TypeError):
    """A kind of lock was asked for an access that it does not have."""


class Lock(Protocol):
    """What `Synchronized` needs of a lock."""

    kind: ClassVar[str]
    accesses: ClassVar[tuple[Access, ...]]

    def __init__(self, name: str = ...) -> None: ...

    @property
    def nested(self) -> bool:
        """Whether the calling thread, which is inside, is so more than once."""

    def acquire(self, access: Access, timeout_seconds: float | None = None) -> bool:
        """Go in; False if that was not possible in time. None waits for ever, 0 does not wait.

        Raises:
            AlreadyHeld: the thread is inside already and the kind is not re-entrant.
            NoSuchAccess: the kind does not have it.
            ValueError: `timeout_seconds` is negative or not a number.
        """

    def release(self, access: Access) -> None:
        """Leave. `access` is what the thread has now."""

    def upgrade(self, timeout_seconds: float | None = None) -> bool:
        """From upgrade to write access once no reader is inside; False, and nothing has changed, if not in time."""

    def downgrade(self, held: Access) -> Access:
        """To the kind's next weaker access, which is returned, with nobody else writing in between. Never waits.

        Raises:
            NoSuchAccess: there is no weaker one.
        """


def wait_limit(timeout_seconds: float | None) -> float:
    """As `threading` wants it: -1 waits for ever, and no number is above `TIMEOUT_MAX`."""
    if timeout_seconds is None:
        return -1.0
    if not timeout_seconds >= 0:  # NaN too
        raise ValueError(f"timeout_seconds must be at least 0, or None to wait for ever; got {timeout_seconds}.")
    return min(timeout_seconds, threading.TIMEOUT_MAX)


class ExclusiveLock:
    """One thread at a time, whatever the access. Who waits is served in no particular order.

    `core` is re-entrant only so that a thread that asks a second time gets in far enough to be told: it keeps its
    owner's identity in C, which costs less than asking for the thread's at every turn.

    Thread-safety: any thread. `depth` belongs to whoever holds `core`.
    """

    __slots__ = ("core", "depth", "name")
    kind: ClassVar[str] = "exclusive"
    accesses: ClassVar[tuple[Access, ...]] = ("write",)
    reentrant: ClassVar[bool] = False

    def __init__(self, name: str = "the lock") -> None:
        self.name = name
        self.core = RLock(name)  # the schedule's own where there is one
        self.depth = 0  # sections that the holder is inside of

    @property
    def nested(self) -> bool:
        return self.depth > 1

    def acquire(self, access: Access, timeout_seconds: float | None = None) -> bool:
        if not self.core.acquire(timeout=wait_limit(timeout_seconds)):
            return False
        if self.depth and not self.reentrant:
            self.core.release()
            raise AlreadyHeld(f"{self.name}: this thread holds it already; lock='re_entrant' would let it in again.")
        self.depth += 1
        return True

    def release(self, access: Access) -> None:
        self.depth -= 1
        self.core.release()

    def upgrade(self, timeout_seconds: float | None = None) -> bool:
        raise NoSuchAccess(f"{self.name}: lock='{self.kind}' has no upgrade access.")

    def downgrade(self, held: Access) -> Access:
        raise NoSuchAccess(f"{self.name}: lock='{self.kind}' has no access weaker than write.")


class ReentrantLock(ExclusiveLock):
    """As `ExclusiveLock`, but the thread that holds it may go in again; it is free after as many releases.

    Thread-safety: any thread.
    """

    __slots__ = ()
    kind: ClassVar[str] = "re_entrant"
    reentrant: ClassVar[bool] = True

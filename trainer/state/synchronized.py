"""A value and its lock in one object, so that the value is not to be had without the lock. Standard library only.

    accounts = Synchronized({"x": 25, "y": 100}, name="accounts")
    accounts.with_lock(lambda balances: balances.update(x=30))
    with accounts.lock() as handle:
        handle.value["x"] -= 5

Guarantees:
- A handle gives the value to the thread that holds the lock, while it does, and to nobody else.
- An exception that leaves a write section poisons the value: whoever comes next is told, instead of going on with what
  may be half a change.
- Who waits for a condition is woken whenever a write section ends, however it ends.

Assumptions: a reference to the value, or to what is inside it, is not kept past the section; read sections do not
change the value. Python cannot hold anybody to either.

Source: folly::Synchronized and c10::Synchronized; poisoning after Rust's std::sync::Mutex.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from types import TracebackType
from typing import Any, NoReturn, Protocol, TypeVar, overload

from trainer.state.guarded import Guarded, LockKind, Poisoned
from trainer.state.handles import DeadHandle, ReadHandle, ReadOnlyHandle, WaitTimeout, WriteHandle
from trainer.state.lock_order import LockOrder, LockOrderError
from trainer.state.locks import AlreadyHeld, LockTimeout, NoSuchAccess, wait_limit

__all__ = [
    "AlreadyHeld",
    "DeadHandle",
    "LockOrder",
    "LockOrderError",
    "LockTimeout",
    "NoSuchAccess",
    "Poisoned",
    "ReadHandle",
    "ReadOnlyHandle",
    "Synchronized",
    "WaitTimeout",
    "WriteHandle",
    "acquire_locked",
]

T = TypeVar("T")
R = TypeVar("R")

_ONE_ACCESS = ("exclusive", "re_entrant")
_SHARED = ("read_write", "upgradable")
_KINDS_WITH = {
    "lock": _ONE_ACCESS,
    "with_lock": _ONE_ACCESS,
    "rlock": _SHARED,
    "with_rlock": _SHARED,
    "wlock": _SHARED,
    "with_wlock": _SHARED,
    "ulock": ("upgradable",),
}
_UNCHANGED: Any = object()


class Synchronized(Guarded[T]):
    """A value that is used under its lock.

    `lock()`, `rlock()`, `wlock()`, `ulock()` acquire nothing by themselves: they make a handle for `with`. Each
    acquisition takes `timeout_seconds`: None waits for ever, 0 tries; when time is up it raises `LockTimeout`. While
    the value is poisoned, each raises `Poisoned`. A thread that would wait for itself gets `AlreadyHeld`.

    Thread-safety: every method, from any thread.
    """

    __slots__ = ()

    def __init__(
        self,
        value: T,
        lock: LockKind = "exclusive",
        *,
        name: str | None = None,
        poisoning: bool = True,
        order: LockOrder | None = None,
    ) -> None:
        """
        Args:
            value: not to be used otherwise from here on.
            lock: `exclusive` and `re_entrant` have `lock()`; `read_write` has `rlock()` and `wlock()`; `upgradable`
                has `ulock()` too.
            name: for messages; the value's type and a number if there is none.
            poisoning: whether an exception that leaves a write section poisons the value.
            order: checks the order of acquisitions among all that share it.
        """
        super().__init__(value, lock, name, poisoning, order)

    def lock(self, timeout_seconds: float | None = None) -> WriteHandle[T]:
        self._require("lock")
        return WriteHandle(self, "write", timeout_seconds)

    def rlock(self, timeout_seconds: float | None = None) -> ReadHandle[T]:
        self._require("rlock")
        return ReadHandle(self, "read", timeout_seconds)

    def wlock(self, timeout_seconds: float | None = None) -> WriteHandle[T]:
        self._require("wlock")
        return WriteHandle(self, "write", timeout_seconds)

    def ulock(self, timeout_seconds: float | None = None) -> WriteHandle[T]:
        """Read access that may `upgrade()` to write access; goes together with readers, not with another `ulock()`."""
        self._require("ulock")
        return WriteHandle(self, "upgrade", timeout_seconds)

    def with_lock(self, fn: Callable[[T], R], timeout_seconds: float | None = None) -> R:
        """`fn(value)` under the lock; what it returns. A write section."""
        lock = self._plain
        if lock is None or timeout_seconds is not None:
            return self._with("with_lock", WriteHandle(self, "write", timeout_seconds), fn)
        # ExclusiveLock.acquire() and a handle's end, written out: their calls cost several times what the lock does.
        core = lock.core
        try:
            core.acquire()  # not `with core`: it costs twice as much in CPython 3.11
            if lock.depth or self._poison is not None:
                result = self._with("with_lock", WriteHandle(self, "write", None), fn)
            else:
                lock.depth = 1
                try:
                    result = fn(self._value)
                except BaseException as error:
                    self._spoil(error)
                    raise
                finally:
                    lock.depth = 0
                    if self._waiting:
                        self._announce()
        except BaseException:
            # Ctrl-C may have come just after the lock was acquired, and just before: then there is nothing to release.
            with suppress(RuntimeError):
                core.release()
            raise
        core.release()
        return result

    def with_rlock(self, fn: Callable[[T], R], timeout_seconds: float | None = None) -> R:
        """`fn(value)` under read access; what it returns. `fn` must not change the value."""
        return self._with("with_rlock", ReadHandle(self, "read", timeout_seconds), fn)

    def with_wlock(self, fn: Callable[[T], R], timeout_seconds: float | None = None) -> R:
        """`fn(value)` under write access; what it returns."""
        return self._with("with_wlock", WriteHandle(self, "write", timeout_seconds), fn)

    def copy(self, timeout_seconds: float | None = None) -> T:
        """A deep copy, made under read access: it shares nothing with the value, so it may be used without a lock."""
        with ReadHandle(self, "read", timeout_seconds) as handle:
            return copy.deepcopy(handle.value)

    def exchange(self, value: T, timeout_seconds: float | None = None) -> T:
        """Sets the value and returns what it was."""
        with self._handle(timeout_seconds) as handle:
            old, handle.value = handle.value, value
        return old

    def swap(self, other: Synchronized[T], timeout_seconds: float | None = None) -> None:
        """Exchanges the values of the two; their locks stay. Two threads may do it in opposite orders."""
        if other is self:
            return
        with acquire_locked(self, other, timeout_seconds=timeout_seconds) as (mine, others):
            mine.value, others.value = others.value, mine.value

    @property
    def poisoned_by(self) -> BaseException | None:
        """The exception that poisoned the value, None if it is not poisoned. May have changed when it is looked at."""
        poison = self._poison
        return None if poison is None else poison.error

    def repair(self, timeout_seconds: float | None = None) -> WriteHandle[T]:
        """A write section that poison does not keep out. It clears the poison, unless it is left by an exception."""
        return WriteHandle(self, "write", timeout_seconds, repairing=True)

    def clear_poison(self, value: T = _UNCHANGED, timeout_seconds: float | None = None) -> None:
        """Lets everybody in again: with this value, or with the one that there is."""
        with self.repair(timeout_seconds) as handle:
            if value is not _UNCHANGED:
                handle.value = value

    def __repr__(self) -> str:
        # Without the value: it would be read without the lock.
        return f"<Synchronized {self.name}: lock='{self._lock.kind}'>"

    def __reduce__(self) -> NoReturn:
        # copy.copy() would make a second object with the same lock and the same value, which knew nothing of the first.
        raise TypeError(f"{self.name}: a Synchronized is not copied or pickled; copy() gives a copy of its value.")

    def _handle(self, timeout_seconds: float | None = None) -> WriteHandle[T]:
        return WriteHandle(self, "write", timeout_seconds)

    def _with(self, method: str, handle: ReadHandle[T], fn: Callable[[T], R]) -> R:
        self._require(method)
        with handle:
            return fn(self._value)

    def _require(self, method: str) -> None:
        kinds = _KINDS_WITH[method]
        if self._lock.kind not in kinds:
            needed = " or ".join(f"lock='{kind}'" for kind in kinds)
            raise NoSuchAccess(f"{self.name}: {method}() needs {needed}; this has lock='{self._lock.kind}'.")


H = TypeVar("H", bound=ReadHandle[Any])
H_co = TypeVar("H_co", bound=ReadHandle[Any], covariant=True)
H1 = TypeVar("H1", bound=ReadHandle[Any])
H2 = TypeVar("H2", bound=ReadHandle[Any])
H3 = TypeVar("H3", bound=ReadHandle[Any])


class Lockable(Protocol[H_co]):
    """A handle that was not entered yet, or a `Synchronized`, which stands for its write access."""

    def _handle(self) -> H_co: ...


@overload
def acquire_locked(
    first: Lockable[H1], second: Lockable[H2], /, *, timeout_seconds: float | None = None
) -> AbstractContextManager[tuple[H1, H2]]: ...
@overload
def acquire_locked(
    first: Lockable[H1], second: Lockable[H2], third: Lockable[H3], /, *, timeout_seconds: float | None = None
) -> AbstractContextManager[tuple[H1, H2, H3]]: ...
@overload
def acquire_locked(
    *wanted: Lockable[H], timeout_seconds: float | None = None
) -> AbstractContextManager[tuple[H, ...]]: ...
def acquire_locked(*wanted: Lockable[Any], timeout_seconds: float | None = None) -> AbstractContextManager[Any]:
    """All of them or none: `with acquire_locked(a.wlock(), b.rlock(), c) as (x, y, z):`. A tuple of their handles.

    Whatever the order of the arguments, locks are acquired in the order in which their objects were made. So threads
    that get all their locks in one such call cannot deadlock; a thread that comes with a lock in its hand can.

    Args:
        wanted: handles not entered yet, in any mix; a plain `Synchronized` stands for its write access.
        timeout_seconds: for all together. A handle's own limit holds beside it.

    Raises:
        LockTimeout: one of them was not to be had in time. None is held, and none is poisoned by it.
        ValueError: an object is there twice.

    Thread-safety: from any thread.
    """
    return _Together(tuple(each._handle() for each in wanted), timeout_seconds)


class _Together:
    """Thread-safety: for one thread, once."""

    def __init__(self, handles: tuple[ReadHandle[Any], ...], timeout_seconds: float | None) -> None:
        self._handles = handles
        self._in_order = sorted(handles, key=lambda handle: handle._of._serial)
        for one, next_one in zip(self._in_order, self._in_order[1:], strict=False):
            if one._of is next_one._of:
                raise ValueError(
                    f"acquire_locked() got {one._of.name} twice; once, with the stronger access, is enough."
                )
        self._limit = wait_limit(timeout_seconds)
        self._timeout_seconds = timeout_seconds

    def __enter__(self) -> tuple[ReadHandle[Any], ...]:
        deadline = time.monotonic() + self._limit
        held: list[ReadHandle[Any]] = []
        try:
            for handle in self._in_order:
                own = handle._timeout_seconds
                left = None if self._limit < 0 else max(0.0, deadline - time.monotonic())
                if not handle._enter(min((limit for limit in (own, left) if limit is not None), default=None)):
                    asked = own if left is None or (own is not None and own <= left) else self._timeout_seconds
                    raise LockTimeout.of(handle._of.name, handle._access, asked)
                held.append(handle)
        except BaseException:
            # Nothing was done under them yet, so this is no failed write section.
            for handle in reversed(held):
                handle._give_back()
            raise
        return self._handles

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for handle in reversed(self._in_order):
            handle.__exit__(kind, error, traceback)

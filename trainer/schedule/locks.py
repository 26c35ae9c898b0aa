"""Locks and barriers for code that is to run freely and under a schedule.

    self.lock = Lock("lock")

is `threading.Lock()` in a free run, and under a schedule a lock that the schedule knows of. So is every lock that a
user's own code makes from `threading` while `known_to_the_schedule` is in force: `Condition`, `Event`, `Semaphore`,
`Barrier` and `queue.Queue` are made of those.

Not known, and so waited for in vain under a schedule: locks made in C, as in `queue.SimpleQueue`; locks made by modules
that were imported before the user's own; whatever threads wait for that a replica starts by itself.
"""

from __future__ import annotations

import _thread
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType
from typing import Any, Protocol, TypeVar

from trainer.schedule.free_barrier import FreeBarrier
from trainer.schedule.free_shared_lock import FreeSharedLock
from trainer.schedule.modelled_locks import ModelledBarrier, ModelledLock, ModelledReadWriteLock, ModelledRLock
from trainer.schedule.point import listener

T = TypeVar("T")

# Code that makes locks for whoever asks it to.
_MAKERS = frozenset((__name__, "threading", "queue", "trainer.schedule.attributes"))

_SERIAL = re.compile(r"#\d+")

_making: _Names | None = None
_see: Callable[[Any, str], Any] | None = None


class _Names:
    """Numbers things of one name, so that every run of one program calls them the same.

    What a replica makes is numbered by itself, so that the names do not depend on who came first. Numbers that count
    through the process, as those that `Synchronized` gives, are left out.
    """

    def __init__(self, prefix: str = "") -> None:
        self._prefix = prefix
        self._made: dict[str, int] = {}

    def of(self, name: str) -> str:
        name = self._prefix + _SERIAL.sub("", name)
        heard = listener()
        if heard is not None:
            name = f"{name} of replica {heard[1]}"
        self._made[name] = self._made.get(name, 0) + 1
        return name if self._made[name] == 1 else f"{name} {self._made[name]}"


@contextmanager
def modelled(prefix: str = "") -> Iterator[None]:
    """Make every lock that is made in here one that schedules know of.

    Args:
        prefix: of their names, where locks stay from one time to the next.
    """
    yield from _make(_Names(prefix))


@contextmanager
def unmodelled() -> Iterator[None]:
    """Make ordinary locks again, for what is announced as a whole: none of them may be held at an announcement."""
    yield from _make(None)


def _make(names: _Names | None) -> Iterator[None]:
    global _making
    before, _making = _making, names
    try:
        yield
    finally:
        _making = before


@contextmanager
def known_to_the_schedule() -> Iterator[None]:
    """Inside `modelled`: the same for locks that other people's code makes from `threading`.

    It replaces what `threading` makes its own things of, for the whole process; a lock that no replica uses works as
    always. To be in force while replicas run, too: `Condition.wait` makes a lock each time.
    """
    names = {"Lock": _named_lock, "RLock": _named_rlock, "_allocate_lock": _named_lock}
    before = {name: getattr(threading, name) for name in names}
    for name, make in names.items():
        setattr(threading, name, make)
    try:
        yield
    finally:
        for name, make in before.items():
            setattr(threading, name, make)


@contextmanager
def shown_to(see: Callable[[Any, str], Any] | None) -> Iterator[None]:
    """Have everything that is made in here for a free run replaced by what `see` makes of it and its name."""
    global _see
    before, _see = _see, see
    try:
        yield
    finally:
        _see = before


def _shown(real: T, name: str) -> T:
    if _see is None:
        return real
    shown: T = _see(real, name)
    return shown


class AnyLock(AbstractContextManager[Any], Protocol):
    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool: ...

    def release(self) -> None: ...


class AnyBarrier(Protocol):
    def wait(self) -> Any: ...

    def abort(self) -> None: ...


class AnyReadWriteLock(Protocol):
    def read(self) -> AbstractContextManager[None]: ...

    def write(self) -> AbstractContextManager[None]: ...


def Lock(name: str = "lock") -> AnyLock:
    return _shown(threading.Lock(), name) if _making is None else ModelledLock(_making.of(name))


def RLock(name: str = "rlock") -> AnyLock:
    return _shown(threading.RLock(), name) if _making is None else ModelledRLock(_making.of(name))


def Barrier(parties: int, name: str = "barrier") -> AnyBarrier:
    return _shown(FreeBarrier(parties), name) if _making is None else ModelledBarrier(parties, _making.of(name))


def SharedLock(name: str = "lock", *, queues: bool = True) -> AnyReadWriteLock:
    """A lock that many may read under or one may write under.

    Args:
        queues: whether writers go in the order of their coming; otherwise whoever can, which is faster where sections
            are short (`free_shared_lock.py`).
    """
    if _making is not None:
        return ModelledReadWriteLock(_making.of(name))
    if not queues:
        return _shown(FreeSharedLock(), name)
    # Here, not above: its own locks are made by this module.
    from trainer.state.read_write_lock import ReadWriteLock

    with shown_to(None):
        lock = ReadWriteLock(name)
    return _shown(lock, name)


def _named_lock() -> AnyLock:
    if _making is None:
        return _thread.allocate_lock()
    made_in = sys._getframe(1)
    # The lock that `Condition.wait` waits at until it is notified.
    kind = "notification" if made_in.f_code is threading.Condition.wait.__code__ else "lock"
    return ModelledLock(_making.of(f"{kind} of {_asker(made_in)}"))


def _named_rlock() -> AnyLock:
    if _making is None:
        lock: AnyLock = threading._CRLock()  # type: ignore[attr-defined]
        return lock
    return ModelledRLock(_making.of(f"rlock of {_asker(sys._getframe(1))}"))


def _asker(frame: FrameType) -> str:
    """The function that a lock is made for. Not its line: that would change with every edit above it."""
    while frame.f_globals.get("__name__") in _MAKERS and frame.f_back is not None:
        frame = frame.f_back
    name = frame.f_code.co_qualname
    return str(frame.f_globals.get("__name__", name)) if name == "<module>" else name

"""Locks of an update mode in training, watched and named, so that whoever waits in vain can be told.

The locks of `trainer/schedule/locks.py` have names. Those that a user's own mode makes from `threading`, while its
module is imported and it is built, are named by the line that makes them: `self.turn = threading.Lock()` in
`mine.py` is `turn (mine.py:12)`. `Condition`, `Event` and `Semaphore` are made of such locks.

Not watched: locks made in C, later or by other modules than the user's own, barriers, and any lock in a run whose steps
are traced, which stands before the locks itself. Whoever waits there is told by the line that it waits at.
"""

from __future__ import annotations

import _thread
import linecache
import re
import site
import sys
import sysconfig
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from trainer.config import Config, Custom
from trainer.schedule.locks import shown_to
from trainer.strategies.lock_watch import LockWatch

# Whose locks are nobody's to name: the standard library's, installed packages' and our own.
_LIBRARIES = (sysconfig.get_path("stdlib"), *site.getsitepackages(), site.getusersitepackages())
_ASSIGNED = re.compile(r"^\s*(?:self\.)?(\w+)\s*(?::[^=]*)?=[^=]")

# Who watches now. A module that has taken `Lock` from `threading` by name keeps it for other runs in this process.
_watch: LockWatch | None = None
_numbers: Counter[str] = Counter()  # locks by the line that made them


@contextmanager
def watching(config: Config) -> Iterator[LockWatch | None]:
    """Have the locks of the update mode watched that is brought and built in here.

    None, and nothing is changed, where the mode is a built-in one and no fault is to be injected.
    """
    users = isinstance(config.update_mode, Custom)
    if not (users or config.faults) or config.audit.trace_steps:
        yield None
        return
    watch = LockWatch(handed_on=True)
    with shown_to(watch.see), _made_from_threading(watch) if users else _nothing():
        yield watch


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@contextmanager
def _made_from_threading(watch: LockWatch) -> Iterator[None]:
    """Replace what `threading` makes locks by, for the whole process; locks that are not the user's are as always."""
    global _watch
    lock, rlock = threading.Lock, threading.RLock
    threading.Lock, threading.RLock = _lock, _rlock  # type: ignore[assignment]
    _watch = watch
    _numbers.clear()
    try:
        yield
    finally:
        _watch = None
        threading.Lock, threading.RLock = lock, rlock


def _lock() -> Any:
    real, name = _thread.allocate_lock(), _name(sys._getframe(1))
    return real if _watch is None or not name else _watch.see(real, name)


def _rlock() -> Any:
    real: Any = threading._CRLock()  # type: ignore[attr-defined]
    name = _name(sys._getframe(1))
    return real if _watch is None or not name else _watch.see_reentrant(real, name)


def _name(frame: FrameType) -> str:
    """What a lock is called by the line that makes it; nothing where nobody watches, or it is a library's own."""
    asker = _asker(frame) if _watch is not None else None
    if asker is None:
        return ""
    file, line = asker.f_code.co_filename, asker.f_lineno
    assigned = _ASSIGNED.match(linecache.getline(file, line))
    what = assigned[1] if assigned else f"lock of {asker.f_code.co_qualname}"
    name = f"{what} ({file.rpartition('/')[2]}:{line})"
    _numbers[name] += 1
    return name if _numbers[name] == 1 else f"{name} {_numbers[name]}"


def _asker(frame: FrameType | None) -> FrameType | None:
    """The user's frame that a lock is made for; None where it is a library's own."""
    while frame is not None and frame.f_globals.get("__name__") in ("threading", "queue"):
        frame = frame.f_back
    if frame is None or frame.f_code.co_filename.startswith((*_LIBRARIES, "<frozen")):
        return None
    return None if str(frame.f_globals.get("__name__", "")).startswith("trainer.") else frame

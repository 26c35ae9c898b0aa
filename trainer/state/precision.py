"""Where the precision mode lives: the dtype that layers are to compute in. Standard library only.

Layers ask `current()` each time they are called (`trainer/workloads/policy.py`). A holder differs from the others in
what `scope` and `enable` write and in what a replica's thread is handed. Safe and unsafe ones stand side by side.

What threads share is announced just before it is read or written (`trainer/schedule/point.py`).
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

from trainer.schedule.locks import unmodelled
from trainer.schedule.operations import ENABLED, MODE, READ, UPDATE, WRITE
from trainer.schedule.point import point
from trainer.state.synchronized import Synchronized

# Calls a function in a replica's thread, with what was handed over to the replica.
Runner = Callable[[Callable[[], Any]], Any]


class PrecisionHolder(Protocol):
    def current(self) -> str | None:
        """The mode that the calling thread is in: float32, bfloat16 or float16; None when nobody turned one on."""

    def scope(self, dtype: str) -> AbstractContextManager[None]:
        """Turn a mode on for the time of a `with` block."""

    def enable(self, dtype: str | None) -> None:
        """Turn a mode on, or all modes off, until somebody turns on another."""

    def hand_over(self) -> Runner:
        """What a replica takes from whoever starts it: called by the starter, once for each replica."""

    def clear(self) -> None:
        """As if nobody had turned a mode on, in the calling thread and wherever what it holds is seen."""


def _plainly(function: Callable[[], Any]) -> Any:
    return function()


class Explicit:
    """Safe: there is no mode. The compute dtype is an argument of every call: nothing to leak, nothing to miss.

    So nothing can be turned on either: whoever wants a dtype passes it.
    """

    def current(self) -> str | None:
        return None

    def scope(self, dtype: str) -> AbstractContextManager[None]:
        return nullcontext()

    def enable(self, dtype: str | None) -> None:
        """There is nothing to turn on."""

    def hand_over(self) -> Runner:
        return _plainly

    def clear(self) -> None:
        """There is nothing to clear."""


class Inherited:
    """Safe: a context variable, and each replica runs in a copy of its starter's context.

    It sees what its starter had turned on, and what it sets itself nobody else sees.
    """

    def __init__(self) -> None:
        self._mode: contextvars.ContextVar[str | None] = contextvars.ContextVar("precision", default=None)

    def current(self) -> str | None:
        return self._mode.get()

    @contextmanager
    def scope(self, dtype: str) -> Iterator[None]:
        token = self._mode.set(dtype)
        try:
            yield
        finally:
            self._mode.reset(token)

    def enable(self, dtype: str | None) -> None:
        self._mode.set(dtype)

    def hand_over(self) -> Runner:
        return contextvars.copy_context().run  # one copy each: no two replicas can be inside the same one

    def clear(self) -> None:
        self._mode.set(None)


class ThreadLocal:
    """Safe where each replica turns its mode on itself; else unsafe: a new thread has none."""

    def __init__(self) -> None:
        self._held = threading.local()

    def current(self) -> str | None:
        return getattr(self._held, "mode", None)

    @contextmanager
    def scope(self, dtype: str) -> Iterator[None]:
        before = self.current()
        self._held.mode = dtype
        try:
            yield
        finally:
            self._held.mode = before

    def enable(self, dtype: str | None) -> None:
        self._held.mode = dtype

    def hand_over(self) -> Runner:
        return _plainly

    def clear(self) -> None:
        self._held.__dict__.clear()  # the calling thread's


class ProcessGlobal:
    """Unsafe: one mode for all threads. Whoever leaves its scope first puts back what was there before *it* came."""

    def __init__(self) -> None:
        self._mode: str | None = None

    def current(self) -> str | None:
        point(READ, "precision mode", of=MODE)
        return self._mode

    @contextmanager
    def scope(self, dtype: str) -> Iterator[None]:
        before = self.current()
        self._set(dtype)
        try:
            yield
        finally:
            self._set(before)

    def enable(self, dtype: str | None) -> None:
        self._set(dtype, stays=True)

    def hand_over(self) -> Runner:
        return _plainly

    def clear(self) -> None:
        self._set(None)

    def _set(self, dtype: str | None, *, stays: bool = False) -> None:
        point(WRITE, "precision mode", of=MODE, value=_told(dtype, stays=stays))
        self._mode = dtype


class LockedGlobal:
    """Unsafe: as `ProcessGlobal`. The lock keeps each get and set whole, but not the scope from set to restore."""

    def __init__(self) -> None:
        with unmodelled():  # its lock is never held at an announcement
            self._mode: Synchronized[str | None] = Synchronized(None, name="precision mode")

    def current(self) -> str | None:
        point(READ, "precision mode", of=MODE)
        return self._mode.with_lock(lambda mode: mode)

    @contextmanager
    def scope(self, dtype: str) -> Iterator[None]:
        before = self._exchange(dtype)
        try:
            yield
        finally:
            self._exchange(before)

    def enable(self, dtype: str | None) -> None:
        self._exchange(dtype, stays=True)

    def hand_over(self) -> Runner:
        return _plainly

    def clear(self) -> None:
        self._exchange(None)

    def _exchange(self, dtype: str | None, *, stays: bool = False) -> str | None:
        # Whole: nothing comes between get and set.
        point(UPDATE, "precision mode", of=MODE, value=_told(dtype, stays=stays))
        return self._mode.exchange(dtype)


def _told(dtype: str | None, *, stays: bool) -> str:
    """What is written, in words: that no scope is to take it back is said, for the audit cannot see it."""
    return f"{dtype or 'none'}, {ENABLED}" if stays else dtype or "none"


PRECISION_HOLDERS: dict[str, Callable[[], PrecisionHolder]] = {
    "explicit": Explicit,
    "inherited": Inherited,
    "thread_local": ThreadLocal,
    "locked_global": LockedGlobal,
    "process_global": ProcessGlobal,
}

"""Spans of the first steps of a free run: what replicas waited for, what they held, read, wrote and computed.

Nothing of what is traced is split, reordered or made to wait. Methods are put over an object's own and locks before
other locks; when every replica has taken its steps, all of it is taken away again, and the run goes on as if it had
never been there.

Standard library only.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from threading import get_ident
from time import perf_counter_ns
from types import TracebackType
from typing import Any

from trainer.audit.spans import BARRIER_WAIT, CRITICAL_SECTION, LOCK_WAIT, MAX_SPANS, STEP, Span, Trace

Told = Mapping[str, Any]


class Lane:
    """One replica's spans. Thread-safety: its own thread; a lock that another thread gives back appends to it, too."""

    def __init__(self, replica: int) -> None:
        self.replica = replica
        self.step = 0
        self.began = 0
        self.spans: list[Span] = []

    def add(self, kind: str, name: str, start: int, stop: int, args: Told | None = None) -> None:
        self.spans.append(Span(self.replica, self.step, kind, name, start, stop, args or {}))


def steps_named(first: int, number: int) -> str:
    return f"step {first}" if number == 1 else f"steps {first} to {first + number - 1}"


class Tracer:
    """Traces the first steps of every replica.

    Args:
        steps: of each lane.
        lanes: what each is called, where lanes are not the replicas.

    Attributes:
        told_apart: the kinds of spans that are looked for, which whoever watches a run adds to.

    Thread-safety: replicas may call at once; everything else is the main thread's, before they start.
    """

    def __init__(self, num_replicas: int, steps: int, lanes: tuple[str, ...] = ()) -> None:
        self._num_replicas, self._steps, self._names = num_replicas, steps, lanes
        self._lanes = [Lane(own) for own in range(len(lanes) or num_replicas)]
        self._most = MAX_SPANS // len(self._lanes)  # spans of a lane
        self._here: dict[int, Lane] = {}  # of threads by their identity, while they are traced
        self._left = len(self._lanes)
        self._leaving = threading.Lock()  # over `_left`
        self._covered: list[tuple[Any, str]] = []
        self._owners: list[Any] = []
        self.told_apart = {STEP} if lanes else {STEP, LOCK_WAIT, CRITICAL_SECTION, BARRIER_WAIT}

    def trace(self) -> Trace:
        spans = [span for lane in self._lanes for span in list(lane.spans)]
        return Trace(self._num_replicas, spans, told_apart=tuple(sorted(self.told_apart)), lanes=self._names)

    # Before the run.

    def see(self, real: Any, name: str) -> Any:
        """A lock, a barrier or a read-write lock, to be used in place of the real one."""
        if hasattr(real, "wait"):
            return TracedBarrier(real, name, self)
        return TracedReadWriteLock(real, name, self) if hasattr(real, "read") else TracedLock(real, name, self)

    def see_locks_of(self, owner: object) -> None:
        """Trace the locks and barriers that are attributes of an object, by their names, and no longer than needed."""
        self._owners.append(owner)
        for name, value in list(getattr(owner, "__dict__", {}).items()):
            if isinstance(value, _LOCKS):
                setattr(owner, name, self.see(value, name))

    def cover(self, owner: object, method: str, by: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Put a function that is made of an object's method over it."""
        setattr(owner, method, by(getattr(owner, method)))
        if not any(other is owner and covered == method for other, covered in self._covered):
            self._covered.append((owner, method))

    def time(
        self,
        owner: object,
        method: str,
        kind: str,
        name: Callable[..., str],
        args: Callable[..., Told] = lambda *given: {},
    ) -> None:
        """Trace every call of an object's method.

        Args:
            name, args: what to call it and what to say of it, by what the method is given; asked after the call.
        """

        def over(plain: Callable[..., Any]) -> Callable[..., Any]:
            def timed(*given: Any, **named: Any) -> Any:
                lane = self.here()
                if lane is None:
                    return plain(*given, **named)
                start = perf_counter_ns()
                result = plain(*given, **named)
                stop = perf_counter_ns()
                lane.add(kind, name(*given), start, stop, args(*given))
                return result

            return timed

        self.told_apart.add(kind)
        self.cover(owner, method, over)

    # What replicas do.

    def here(self) -> Lane | None:
        """The calling replica's lane; None where it is not traced, or not any more."""
        return self._here.get(get_ident())

    def begin(self, own: int) -> None:
        """The replica's step begins, if it is one of those to be traced."""
        lane = self._lanes[own]
        if lane.step < self._steps:
            self._here[get_ident()] = lane
            lane.began = perf_counter_ns()

    def end(self, steps: int = 1) -> None:
        """The calling replica's step ends, or several that it took together."""
        lane = self.here()
        if lane is None:
            return
        args = {"steps": steps} if steps != 1 else {}
        lane.add(STEP, steps_named(lane.step, steps), lane.began, perf_counter_ns(), args)
        lane.step += steps
        if lane.step < self._steps and len(lane.spans) < self._most:
            return
        lane.step = self._steps
        del self._here[get_ident()]
        with self._leaving:
            self._left -= 1
            last = not self._left
        if last:
            self._take_away()

    def _take_away(self) -> None:
        """Leave nothing of this behind. Replicas may be anywhere: whoever is inside a traced lock leaves it as such,
        and its real lock is the one that others now ask for."""
        for owner, method in self._covered:
            delattr(owner, method)
        for owner in self._owners:
            for name, value in list(getattr(owner, "__dict__", {}).items()):
                if (plain := _plain(value)) is not value:
                    setattr(owner, name, plain)


class TracedLock(AbstractContextManager[Any]):
    """In place of a `threading.Lock` or `RLock`."""

    def __init__(self, real: Any, name: str, tracer: Tracer) -> None:
        self.real, self._name, self._tracer = real, name, tracer
        # Who is inside and since when, one for each time it went in. Belongs to whoever holds the lock.
        self._inside: list[tuple[Lane, int] | None] = []

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        lane = self._tracer.here()
        if lane is None:
            got = bool(self.real.acquire(blocking, timeout))
            if got:
                self._inside.append(None)
            return got
        asked = perf_counter_ns()
        got = bool(self.real.acquire(blocking, timeout))
        granted = perf_counter_ns()
        lane.add(LOCK_WAIT, f"wait for {self._name}", asked, granted, {} if got else {"granted": False})
        if got:
            self._inside.append((lane, granted))
        return got

    def release(self) -> None:
        entered = self._inside.pop() if self._inside else None
        if entered is not None:
            # Before it is given back: nobody else is inside yet.
            entered[0].add(CRITICAL_SECTION, self._name, entered[1], perf_counter_ns())
        self.real.release()

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, stack: TracebackType | None
    ) -> None:
        self.release()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


class TracedBarrier:
    """In place of a `threading.Barrier`."""

    def __init__(self, real: Any, name: str, tracer: Tracer) -> None:
        self.real, self._name, self._tracer = real, name, tracer

    def wait(self, *args: Any) -> Any:
        lane = self._tracer.here()
        if lane is None:
            return self.real.wait(*args)
        asked = perf_counter_ns()
        try:
            return self.real.wait(*args)
        finally:
            lane.add(BARRIER_WAIT, f"wait at {self._name}", asked, perf_counter_ns())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


class TracedReadWriteLock:
    """In place of a `ReadWriteLock`."""

    def __init__(self, real: Any, name: str, tracer: Tracer) -> None:
        self.real, self._name, self._tracer = real, name, tracer

    def read(self, *args: Any) -> AbstractContextManager[None]:
        return self._section(self.real.read(*args), {"shared": True})

    def write(self, *args: Any) -> AbstractContextManager[None]:
        return self._section(self.real.write(*args), {})

    @contextmanager
    def _section(self, section: AbstractContextManager[Any], args: Told) -> Iterator[None]:
        lane = self._tracer.here()
        asked = perf_counter_ns()
        with section:
            granted = perf_counter_ns()
            try:
                yield
            finally:
                if lane is not None:
                    lane.add(LOCK_WAIT, f"wait for {self._name}", asked, granted, args)
                    lane.add(CRITICAL_SECTION, self._name, granted, perf_counter_ns(), args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


_LOCKS = (type(threading.Lock()), type(threading.RLock()), threading.Barrier)


def _plain(value: Any) -> Any:
    """A value without traced locks: itself, or what a list or a tuple of them is without."""
    if isinstance(value, (TracedLock, TracedBarrier, TracedReadWriteLock)):
        return value.real
    if type(value) not in (list, tuple):
        return value
    found = [_plain(each) for each in value]
    return value if all(map(lambda one, other: one is other, found, value)) else type(value)(found)

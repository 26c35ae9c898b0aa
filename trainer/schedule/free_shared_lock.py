"""A lock that many may read under or one may write under, for short sections of threads that run freely.

Standard library only.
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager
from types import TracebackType


class FreeSharedLock:
    """Many read or one writes; who comes while others wait may be faster than they.

    `trainer/state/read_write_lock.py` hands itself over: whoever leaves lets the next one in, which holds it while it
    wakes up. Where sections are shorter than that, everybody ends up in the queue behind sleepers. Here a thread that
    runs goes in if it can.

    Invariant: a writer holds `_turn` from when it begins to wait until it has written, a reader only to be counted; a
    writer writes when no reader is counted.

    Guarantees: a stream of readers cannot starve a writer that has the turn, for none is counted any more. Who gets the
    turn is as with a bare lock: in no order, and nobody's for long.

    Thread-safety: any thread. Not re-entrant, and without a look at who asks: a thread that asks twice may wait for
    itself for ever.
    """

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._guard = threading.Lock()  # over the two below; held for a line or two, never while waiting
        self._readers = 0
        self._writer_waits = False
        self._drained = threading.Lock()  # held but for a moment: released by the last reader a writer waits for
        self._drained.acquire()
        self._reading, self._writing = _Reading(self), _Writing(self)

    def read(self) -> AbstractContextManager[None]:
        return self._reading

    def write(self) -> AbstractContextManager[None]:
        return self._writing

    def enter_reading(self) -> None:
        with self._turn, self._guard:
            self._readers += 1

    def leave_reading(self) -> None:
        with self._guard:
            self._readers -= 1
            if self._writer_waits and not self._readers:
                self._writer_waits = False
                self._drained.release()

    def enter_writing(self) -> None:
        self._turn.acquire()
        with self._guard:
            self._writer_waits = waits = self._readers > 0
        if waits:
            self._drained.acquire()

    def leave_writing(self) -> None:
        self._turn.release()


class _Reading(AbstractContextManager[None]):
    def __init__(self, lock: FreeSharedLock) -> None:
        self._lock = lock

    def __enter__(self) -> None:
        self._lock.enter_reading()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, stack: TracebackType | None
    ) -> None:
        self._lock.leave_reading()


class _Writing(AbstractContextManager[None]):
    def __init__(self, lock: FreeSharedLock) -> None:
        self._lock = lock

    def __enter__(self) -> None:
        self._lock.enter_writing()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, stack: TracebackType | None
    ) -> None:
        self._lock.leave_writing()

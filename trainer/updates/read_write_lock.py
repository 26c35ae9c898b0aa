"""A lock that many may read under or one may write under.

Invariant: either `_readers` count those inside and nobody writes, or one writes and `_readers` is 0.
Guarantee: a waiting writer is next once those inside have left: readers that come later wait behind it, so writers do
not starve; and readers that waited for a writer go in before the next one, so readers do not either.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class ReadWriteLock:
    """Thread-safety: any thread; not re-entrant."""

    def __init__(self) -> None:
        guard = threading.Lock()  # over all that follows
        # Two queues, so that a hand-over wakes one writer or all readers, and not everybody who waits.
        self._may_read, self._may_write = threading.Condition(guard), threading.Condition(guard)
        self._readers = 0
        self._writing = False
        self._writers_waiting = 0
        self._readers_waiting = 0
        # Raised when a writer leaves: so many waiting readers go in before the next writer.
        self._readers_first = 0

    @contextmanager
    def read(self) -> Iterator[None]:
        with self._may_read:
            self._readers_waiting += 1
            while self._writing or (self._writers_waiting and not self._readers_first):
                self._may_read.wait()
            self._readers_waiting -= 1
            self._readers_first = max(0, self._readers_first - 1)
            self._readers += 1
        try:
            yield
        finally:
            with self._may_write:
                self._readers -= 1
                if not self._readers and not self._readers_first:
                    self._may_write.notify()

    @contextmanager
    def write(self) -> Iterator[None]:
        with self._may_write:
            self._writers_waiting += 1
            while self._writing or self._readers or self._readers_first:
                self._may_write.wait()
            self._writers_waiting -= 1
            self._writing = True
        try:
            yield
        finally:
            with self._may_write:
                self._writing = False
                self._readers_first = self._readers_waiting
                if self._readers_first:
                    self._may_read.notify_all()
                else:
                    self._may_write.notify()

"""Who holds which lock in a free run of threads, who waits for which, and whether that can ever end.

    watch = LockWatch()
    with shown_to(watch.see):
        self.lock = Lock("the lock")    # the factories of trainer/schedule/locks.py
    ...                                 # start the threads; then, now and then:
    deadlock = watch.deadlock()

A thread is stuck when it waits, without a time limit, for a lock that is held by a thread that is stuck too (a cycle),
that has ended, or that it is itself. There is no guess in that and no time-out.

Invariant: a hold is noted after its lock was acquired and taken away before the lock is released. A wait is noted
before the thread may have to wait and taken away before the hold is noted that it has led to. Each is an object of its
own, made anew every time.

Guarantee: what is told as stuck is so for ever. A look goes from thread to thread while they run, so that what it sees
may never have been so all at once. But a wait or a hold that two looks have in common was there all the time between
them: so there was a moment when all that they have in common was so together, and holders that had ended by the first
look had ended. At that moment every holder had its lock and who waited for it had not, and each of the stuck could only
go on after another of them, or after one that has ended.

Assumption: who acquired a lock gives it back. Where others' code may hand locks on from thread to thread (`handed_on`)
it is not made: then only replicas that are stuck all together, with no other thread about that could give a lock back,
are told as stuck (`is_sure`). A lock that another thread has ever given back is a signal, which nobody
is said to hold. What a thread makes while it runs may be a signal from the start, so that only locks are watched that
were made in the thread that made the watch.

Not seen: barriers, conditions, queues, waits with a time limit, locks made in other ways, readers that queue behind a
writer. Whoever waits there counts as running: what is stuck through one of them is not told.

Standard library only.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Set
from contextlib import AbstractContextManager, contextmanager
from threading import Thread, current_thread
from threading import enumerate as enumerate_threads
from types import TracebackType
from typing import Any

from trainer.strategies.deadlock import Deadlock, Hold, Wait, Waiting, place


class LockWatch:
    """Watches the locks that it was shown.

    Thread-safety: `see` from any thread; `deadlock` from one, which is none of those that are watched.
    """

    def __init__(self, *, handed_on: bool = False) -> None:
        self.maker = current_thread()
        self._others = set(enumerate_threads()) if handed_on else None
        self._waits: dict[Thread, Wait] = {}  # each thread's own entry
        self._before: tuple[Waiting, set[Thread]] = {}, set()

    def see(self, real: Any, name: str) -> Any:
        """A lock or a read-write lock to be used in place of the real one. A barrier stays what it is."""
        if hasattr(real, "wait") or current_thread() is not self.maker:
            return real
        return WatchedReadWriteLock(real, name, self) if hasattr(real, "read") else WatchedLock(real, name, self)

    def see_reentrant(self, real: Any, name: str) -> Any:
        """The same for an `RLock` that a `threading.Condition` may be made of."""
        return real if current_thread() is not self.maker else WatchedRLock(real, name, self)

    def deadlock(self) -> Deadlock | None:
        """Look, and tell who is stuck by this look and the one before. Ask again and again, some milliseconds apart."""
        (before, ended), self._before = self._before, self._look()
        found = _stuck(_common(before, self._before[0]), ended)
        return Deadlock(found) if found else None

    def is_sure(self, found: Deadlock, replicas: Set[Thread]) -> bool:
        """Whether those that are stuck are so whoever may give back a lock that another acquired.

        Args:
            replicas: all of them.
        """
        if self._others is None:
            return True
        running = set(enumerate_threads()) - self._others
        return running <= replicas and running <= found.threads

    @property
    def waiting(self) -> Waiting:
        """Who waited behind whom at the last look."""
        return self._before[0]

    def begin_waiting(self, wait: Wait) -> None:
        self._waits[current_thread()] = wait

    def end_waiting(self) -> None:
        self._waits.pop(current_thread(), None)

    def _look(self) -> tuple[Waiting, set[Thread]]:
        """Who waits behind whom, and which of the holders have ended."""
        # One call in C, so that no thread adds or removes an entry meanwhile.
        waits = self._waits.copy()
        waiting = {thread: (wait, wait.lock.keep_out(wait)) for thread, wait in waits.items()}
        return waiting, {hold.thread for _, holds in waiting.values() for hold in holds if not hold.thread.is_alive()}


class WatchedLock(AbstractContextManager[Any]):
    """In place of a `threading.Lock` or `RLock`."""

    def __init__(self, real: Any, name: str, watch: LockWatch) -> None:
        self.real, self.name, self._watch = real, name, watch
        self._hold: Hold | None = None  # the holder's to set and to clear
        self._reentrant = hasattr(real, "_is_owned")
        self._is_signal = False

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        if not blocking or timeout != -1:
            if not self.real.acquire(blocking, timeout):
                return False
        elif not self.real.acquire(False):
            self._watch.begin_waiting(Wait(self))
            try:
                self.real.acquire()
            finally:
                self._watch.end_waiting()
        hold, thread = self._hold, current_thread()
        if hold is not None and hold.thread is thread:
            hold.depth += 1
        else:
            self._hold = Hold(thread, place(sys._getframe(1)))
        return True

    def release(self) -> None:
        hold = self._hold
        if hold is None or hold.thread is not current_thread():
            self._release_anothers()
            return
        hold.depth -= 1
        if not hold.depth:
            self._hold = None
        self.real.release()

    def _release_anothers(self) -> None:
        """What anybody may do to a plain lock that is held, and nobody to any other."""
        if self._reentrant or not self.real.locked():
            self.real.release()  # which refuses
            return
        self._is_signal, self._hold = True, None
        self.real.release()

    def locked(self) -> bool:
        return bool(self.real.locked())

    def keep_out(self, wait: Wait) -> list[Hold]:
        hold = self._hold
        return [] if hold is None or self._is_signal else [hold]

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, stack: TracebackType | None
    ) -> None:
        self.release()


class WatchedRLock(WatchedLock):
    """In place of an `RLock` that a `threading.Condition` may be made of, which gives it back whole while it waits."""

    def _release_save(self) -> tuple[int, Any]:
        hold = self._hold
        depth = hold.depth if hold is not None else 0
        if self._is_owned():
            self._hold = None
        return depth, self.real._release_save()  # which refuses whoever does not hold it

    def _acquire_restore(self, saved: tuple[int, Any]) -> None:
        self._watch.begin_waiting(Wait(self))
        try:
            self.real._acquire_restore(saved[1])
        finally:
            self._watch.end_waiting()
        self._hold = Hold(current_thread(), place(sys._getframe(1)))
        self._hold.depth = saved[0]

    def _is_owned(self) -> bool:
        return bool(self.real._is_owned())


class WatchedReadWriteLock:
    """In place of a `ReadWriteLock`."""

    def __init__(self, real: Any, name: str, watch: LockWatch) -> None:
        self.real, self.name, self._watch = real, name, watch
        self._holds: dict[Thread, Hold] = {}  # each thread's own entry

    def read(self, timeout_seconds: float | None = None) -> AbstractContextManager[None]:
        return self._section("read", timeout_seconds)

    def write(self, timeout_seconds: float | None = None) -> AbstractContextManager[None]:
        return self._section("write", timeout_seconds)

    def keep_out(self, wait: Wait) -> list[Hold]:
        """Readers keep writers out, a writer everybody."""
        holds = self._holds.copy()
        return [hold for hold in holds.values() if not (wait.shared and hold.shared)]

    @contextmanager
    def _section(self, access: str, timeout_seconds: float | None) -> Iterator[None]:
        # Not every such lock knows time limits.
        section = getattr(self.real, access)(*(() if timeout_seconds is None else (timeout_seconds,)))
        shared, thread = access == "read", current_thread()
        if timeout_seconds is None:
            self._watch.begin_waiting(Wait(self, shared))
            try:
                section.__enter__()
            finally:
                self._watch.end_waiting()
        else:
            section.__enter__()
        self._holds[thread] = Hold(thread, place(sys._getframe(2)), shared)
        try:
            yield
        finally:
            del self._holds[thread]
            section.__exit__(None, None, None)


def _common(one: Waiting, other: Waiting) -> Waiting:
    """What two looks have both seen, and so was there all the time between them."""
    return {
        thread: (wait, [hold for hold in holds if any(hold is each for each in one[thread][1])])
        for thread, (wait, holds) in other.items()
        if thread in one and one[thread][0] is wait
    }


def _stuck(seen: Waiting, ended: Set[Thread]) -> Waiting:
    """Those that are kept out by one that is among them too, or has ended.

    Args:
        ended: holders that had ended when the earlier look was over. One that has ended since may have given its lock
            back before.
    """
    stuck = seen
    while True:
        left = {
            thread: (wait, lasting)
            for thread, (wait, holds) in stuck.items()
            if (lasting := [hold for hold in holds if hold.thread in stuck or hold.thread in ended])
        }
        if len(left) == len(stuck):
            return left
        stuck = left

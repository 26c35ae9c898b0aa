"""Locks that many may read under or one may write under. Standard library only."""

from __future__ import annotations

from collections import deque
from threading import get_ident
from types import TracebackType
from typing import ClassVar

from trainer.schedule.locks import Lock
from trainer.state.locks import Access, AlreadyHeld, LockTimeout, NoSuchAccess, wait_limit


class _Waiter:
    """A thread that waits; whoever lets it in sets `inside` before it wakes."""

    __slots__ = ("access", "inside", "thread", "woken")

    def __init__(self, thread: int, access: Access) -> None:
        self.thread = thread
        self.access = access
        self.inside = False
        self.woken = Lock("turn at a lock")
        self.woken.acquire()  # released once, by whoever lets it in


class ReadWriteLock:
    """Many read or one writes.

    Invariant: `_sole` is the one thread with upgrade or write access, 0 for none; while `_writing`, nobody else is
    inside; nobody waits who could be let in.

    Guarantees: a waiting writer is let in once those inside have left: readers that come later wait behind it, so
    that a stream of readers cannot starve it, and writers go in the order of their coming. Readers that wait when a
    writer leaves go in before the next one, so writers do not starve readers either. Whoever leaves lets the next in
    itself, so that nobody who comes in between is faster. An `acquire` or `upgrade` that ends by time-out or
    exception leaves no trace.

    Not re-entrant, not for two reads either: the second would wait behind a writer that waits for the first. A thread
    that asks twice gets `AlreadyHeld`.

    Thread-safety: any thread.
    """

    __slots__ = ("_guard", "_queue", "_reader_queue", "_readers", "_sole", "_upgrading", "_writing", "name")
    kind: ClassVar[str] = "read_write"
    accesses: ClassVar[tuple[Access, ...]] = ("read", "write")
    nested: ClassVar[bool] = False

    def __init__(self, name: str = "the lock") -> None:
        self.name = name
        self._guard = Lock(f"guard of {name}")  # over all that follows; held for a few lines, never while waiting
        self._readers: set[int] = set()
        self._sole = 0
        self._writing = False
        self._upgrading: _Waiter | None = None  # `_sole`, while it waits for the readers inside to leave
        self._reader_queue: deque[_Waiter] = deque()
        self._queue: deque[_Waiter] = deque()  # for upgrade and write

    def read(self, timeout_seconds: float | None = None) -> Section:
        """`with lock.read():` Raises `LockTimeout` if that was not possible in time."""
        return Section(self, "read", timeout_seconds)

    def write(self, timeout_seconds: float | None = None) -> Section:
        """`with lock.write():` Raises `LockTimeout` if that was not possible in time."""
        return Section(self, "write", timeout_seconds)

    @property
    def num_waiting(self) -> int:
        """Threads that wait now, to go in or to upgrade."""
        with self._guard:
            return len(self._reader_queue) + len(self._queue) + (self._upgrading is not None)

    def acquire(self, access: Access, timeout_seconds: float | None = None) -> bool:
        limit = wait_limit(timeout_seconds)
        thread = get_ident()
        if access not in self.accesses:
            raise NoSuchAccess(f"{self.name}: lock='{self.kind}' has no {access} access.")
        # Without the guard: whether a thread that does not wait is inside is changed by nobody else.
        if thread == self._sole or thread in self._readers:
            raise AlreadyHeld(f"{self.name}: this thread holds it already, and lock='{self.kind}' is not re-entrant.")
        try:
            with self._guard:
                if self._may_enter(access):
                    self._enter(thread, access)
                    return True
                if limit == 0:
                    return False
                waiter = _Waiter(thread, access)
                (self._reader_queue if access == "read" else self._queue).append(waiter)
            if waiter.woken.acquire(timeout=limit):
                return True
            with self._guard:
                if not waiter.inside:
                    self._take_back(thread)
                return waiter.inside
        except BaseException:  # Ctrl-C, which only the main thread gets
            with self._guard:
                self._take_back(thread)
            raise

    def release(self, access: Access) -> None:
        with self._guard:
            self._leave(get_ident(), access)
            self._let_in(readers_first=access == "write")

    def upgrade(self, timeout_seconds: float | None = None) -> bool:
        limit = wait_limit(timeout_seconds)
        if self._sole != get_ident() or self._writing:
            raise NoSuchAccess(f"{self.name}: this thread has no upgrade access to upgrade from.")
        try:
            with self._guard:
                if not self._readers:
                    self._writing = True
                    return True
                if limit == 0:
                    return False
                waiter = self._upgrading = _Waiter(self._sole, "write")
            if waiter.woken.acquire(timeout=limit):
                return True
            with self._guard:
                if not waiter.inside:
                    self._step_back()
                return waiter.inside
        except BaseException:
            with self._guard:
                self._step_back()
            raise

    def downgrade(self, held: Access) -> Access:
        step = self.accesses.index(held)
        if step == 0:
            raise NoSuchAccess(f"{self.name}: lock='{self.kind}' has no access weaker than {held}.")
        weaker = self.accesses[step - 1]
        thread = get_ident()
        with self._guard:
            self._leave(thread, held)
            self._enter(thread, weaker)
            self._let_in(readers_first=held == "write")
        return weaker

    def _may_enter(self, access: Access) -> bool:
        if access == "read":
            return not self._writing and self._upgrading is None and not self._writers_wait()
        # Who comes while others wait is behind them.
        return not self._sole and not self._queue and (access == "upgrade" or not self._readers)

    def _writers_wait(self) -> bool:
        return bool(self._queue) and any(waiter.access == "write" for waiter in self._queue)

    def _enter(self, thread: int, access: Access) -> None:
        if access == "read":
            self._readers.add(thread)
        else:
            self._sole, self._writing = thread, access == "write"

    def _leave(self, thread: int, access: Access) -> None:
        if access == "read" and thread in self._readers:
            self._readers.remove(thread)
        elif access != "read" and thread == self._sole and self._writing == (access == "write"):
            self._sole, self._writing = 0, False
        else:
            raise RuntimeError(f"{self.name}: this thread has no {access} access to give back.")

    def _let_in(self, readers_first: bool) -> None:
        """All who may go in now. `readers_first`: a writer has left or stepped down, so it is the readers' turn."""
        if self._writing:
            return
        if self._upgrading is not None:
            if not self._readers:
                upgrading, self._upgrading = self._upgrading, None
                self._wake(upgrading)
            return
        if self._reader_queue and (readers_first or not self._writers_wait()):
            while self._reader_queue:
                self._wake(self._reader_queue.popleft())
        if self._queue and not self._sole and (self._queue[0].access == "upgrade" or not self._readers):
            self._wake(self._queue.popleft())

    def _wake(self, waiter: _Waiter) -> None:
        self._enter(waiter.thread, waiter.access)
        waiter.inside = True
        waiter.woken.release()

    def _take_back(self, thread: int) -> None:
        """As if it had never asked, wherever it has got to since."""
        wrote = self._writing and self._sole == thread
        self._readers.discard(thread)
        if self._sole == thread:
            self._sole, self._writing = 0, False
        for queue in (self._reader_queue, self._queue):
            for waiter in [each for each in queue if each.thread == thread]:
                queue.remove(waiter)
        # A writer that no longer waits may have been what readers waited behind.
        self._let_in(readers_first=wrote)

    def _step_back(self) -> None:
        """As if the thread with upgrade access had never asked to write."""
        wrote, self._writing, self._upgrading = self._writing, False, None
        self._let_in(readers_first=wrote)


class UpgradableLock(ReadWriteLock):
    """As `ReadWriteLock`, with upgrade access: read, decide, and write what was decided with no writer in between.

    Two readers that both wanted to write would wait for each other to leave; one thread at a time has upgrade access,
    so that cannot happen here. A thread that waits to upgrade goes before all who wait to go in: while it has upgrade
    access no writer can, and readers that come wait until it has written.

    Thread-safety: any thread.
    """

    __slots__ = ()
    kind: ClassVar[str] = "upgradable"
    accesses: ClassVar[tuple[Access, ...]] = ("read", "upgrade", "write")


class Section:
    """`with` for a bare lock. Thread-safety: for one thread."""

    __slots__ = ("_access", "_lock", "_timeout_seconds")

    def __init__(self, lock: ReadWriteLock, access: Access, timeout_seconds: float | None) -> None:
        self._lock = lock
        self._access = access
        self._timeout_seconds = timeout_seconds

    def __enter__(self) -> None:
        if not self._lock.acquire(self._access, self._timeout_seconds):
            raise LockTimeout.of(self._lock.name, self._access, self._timeout_seconds)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._lock.release(self._access)

"""Replicas as real threads of which one runs at a time: each goes on when an order says that it is its turn.

Real threads, so that whatever is thread-local in a framework is so here. Each waits at a raw lock of its own, and
whoever stops running opens the next one's directly.
"""

from __future__ import annotations

import _thread
import ctypes
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from types import FrameType

from trainer.frames import frames
from trainer.schedule.operations import Operation
from trainer.schedule.order import DONE, Abandoned, Deadlock, Order
from trainer.schedule.point import hosted

POLL_SECONDS = 0.2
# Frames of these files are how a replica's body came to be called, and tell a reader nothing.
OWN_FILES = (
    *("/trainer/schedule/", "/trainer/strategies/", "/trainer/state/precision.py", "/threading.py"),
    *("/tensorflow/python/distribute/", "/tensorflow/python/autograph/"),
)


class Stalled(Exception):
    """A replica whose turn it is neither went on nor announced anything: it waits for what the schedule cannot see."""

    def __init__(self, replica: int, seconds: float, stack: str) -> None:
        super().__init__(
            f"replica {replica}, whose turn it was, announced nothing for {seconds:g} s: it computes, or waits for "
            f"something that the schedule does not know of.\n{stack}"
        )
        self.replica = replica


class Failed(Exception):
    """A replica raised; its exception is the cause."""

    def __init__(self, replica: int, error: Exception) -> None:
        super().__init__(f"replica {replica} raised {type(error).__name__}: {error}")
        self.replica = replica


class Turnstile:
    """Runs one body a replica in the order that `order` makes.

    Args:
        seconds: after which a replica that neither ends nor announces anything is given up.
        pins: keep the threads on one core, where a hand-off is faster than waking another core; not where they have
            helpers of their own, as intra-op threads are, which would be kept there with them.
    """

    def __init__(self, order: Order, seconds: float = 60.0, *, pins: bool = True) -> None:
        self.order = order
        self._pins = pins
        self._core: int | None = None
        self._seconds = seconds
        self._turns = [_locked() for _ in range(order.num_replicas)]
        self._over = _locked()
        self._ended = False
        self._replicas: dict[int, int] = {}  # of threads by their identity
        self._error: BaseException | None = None

    def run(self, bodies: Sequence[Callable[[], None]]) -> None:
        """Run the bodies, each in a new thread, and come back when all threads have ended.

        Raises:
            Abandoned: the order was given up by its chooser.
            Deadlock: no replica could go on.
            Failed: a replica raised.
            Stalled: a replica waits for what the schedule cannot see; its thread is left behind.
        """
        threads = [
            threading.Thread(target=self._replica, args=(own, body), name=f"replica-{own}", daemon=True)
            for own, body in enumerate(bodies)
        ]
        self._core = _core() if self._pins else None
        with hosted(self):
            for own, thread in enumerate(threads):
                thread.start()
                assert thread.ident is not None
                self._replicas[thread.ident] = own
            self._go_on(None)
            self._wait()
            for thread in threads:
                thread.join(0.0 if isinstance(self._error, Stalled) else self._seconds)
        if self._error is not None:
            raise self._error

    def own(self) -> int | None:
        return self._replicas.get(_thread.get_ident())

    def announce(self, own: int, operation: Operation) -> None:
        if self._ended:
            raise Abandoned
        self.order.announce(own, operation)
        if self._go_on(own) != own:
            self._turns[own].acquire()
        if self._ended:
            raise Abandoned

    def _replica(self, own: int, body: Callable[[], None]) -> None:
        if self._core is not None:
            with suppress(OSError):  # where it is not allowed, hand-offs take longer
                os.sched_setaffinity(0, {self._core})
        self._turns[own].acquire()
        error = self._run_body(own, body)
        # From here on another thread may get this one's identity.
        self._replicas.pop(_thread.get_ident(), None)
        if self._ended:
            return  # whatever it has made of being told to end
        if error is not None:
            self._end(error)
            return
        self.order.announce(own, DONE)
        self._go_on(None)

    def _run_body(self, own: int, body: Callable[[], None]) -> Failed | None:
        try:
            if not self._ended:
                body()
        except Abandoned:
            pass  # the order has ended
        except Exception as error:
            failed = Failed(own, error)
            failed.__cause__ = error
            return failed
        return None

    def _go_on(self, own: int | None) -> int | None:
        """Hand the turn to whoever is next, if that is not the caller, and say who it is."""
        try:
            following = self.order.next()
        except Deadlock as deadlock:
            deadlock.stacks = stacks(self._replicas, deadlock.waits)
            self._end(deadlock)
            return None
        except BaseException as error:
            self._end(error)
            return None
        if following is None:
            self._ended = True
            self._over.release()
        elif following != own:
            self._turns[following].release()
        return following

    def _end(self, error: BaseException) -> None:
        """Let every thread run to its end: whatever it announces next is refused."""
        self._error, self._ended = error, True
        for turn in self._turns:
            if turn.locked():
                turn.release()
        self._over.release()

    def _wait(self) -> None:
        """Until the order is over, or nothing has been granted for too long."""
        seen, since = -1, time.monotonic()
        while not self._over.acquire(timeout=POLL_SECONDS):
            granted = len(self.order.history.events)
            if granted != seen:
                seen, since = granted, time.monotonic()
            elif time.monotonic() - since > self._seconds:
                own = next(each for each, operation in enumerate(self.order.pending) if operation is None)
                self._end(Stalled(own, self._seconds, stacks(self._replicas, [own])[own]))


def stacks(replicas: Mapping[int, int], wanted: Iterable[int]) -> dict[int, str]:
    """Where replicas are, from their outermost frames in, without the frames of threading and of the schedule.

    Args:
        replicas: of threads by their identity.
    """
    now = frames()
    found = {own: now.get(ident) for ident, own in replicas.items()}
    return {own: _told(found.get(own)) for own in wanted}


def _told(frame: FrameType | None) -> str:
    if frame is None:
        return "(its thread has ended)"
    found = [each for each in traceback.extract_stack(frame) if not any(part in each.filename for part in OWN_FILES)]
    return "".join(traceback.format_list(found)).rstrip()


def _core() -> int | None:
    """The core that the calling thread is on; None where the system does not say."""
    try:
        found = int(ctypes.CDLL(None).sched_getcpu())
    except (AttributeError, OSError):
        return None
    return found if hasattr(os, "sched_setaffinity") and found in os.sched_getaffinity(0) else None


def _locked() -> _thread.LockType:
    lock = _thread.allocate_lock()
    lock.acquire()
    return lock

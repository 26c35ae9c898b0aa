"""Threads that are replicas: started together, watched, and ended together whatever happens to one of them."""

from __future__ import annotations

import faulthandler
import logging
import queue
import sys
import threading
import time
from collections.abc import Callable, Sequence

from trainer.audit.records import RunRecord
from trainer.strategies.deadlock import told_holds, told_now
from trainer.strategies.hosting import RunBroken, StopFlag
from trainer.strategies.lock_watch import LockWatch

log = logging.getLogger(__name__)

POLL_SECONDS = 0.05
JOIN_SECONDS = 1.0  # for all threads together, once they have been told to end


class ReplicaThreads:
    """Runs `body(replica_id)` in a thread for each replica.

    Guarantees: no body begins before all threads exist; when `run` returns or raises, `ended` is set and every thread
    that does not hang has ended.

    Attributes:
        seconds: from the common start to when the last replica was through.

    Args:
        ended: set when a replica has raised, or the run is to be stopped: bodies then begin no further step.
        abort: wakes replicas that wait for each other; they raise `threading.BrokenBarrierError`, or end.
        report: called by the main thread, about twenty times a second and once after the last step.
        locks: watches the locks that replicas use, where any are watched.
        hosted: the replicas of this process, where others have some too.
    """

    def __init__(
        self,
        record: RunRecord,
        body: Callable[[int], None],
        ended: threading.Event,
        *,
        abort: Callable[[], None],
        report: Callable[[], None],
        stop: StopFlag,
        stall_seconds: float,
        locks: LockWatch | None = None,
        hosted: Sequence[int] | None = None,
    ) -> None:
        self._ended = ended
        self._hosted = range(record.num_replicas) if hosted is None else hosted
        self.seconds = 0.0
        self._record, self._body = record, body
        self._abort, self._report = abort, report
        self._stop, self._stall_seconds = stop, stall_seconds
        self._locks = locks
        self._stuck: frozenset[threading.Thread] = frozenset()
        self._go = threading.Event()
        self._errors: queue.SimpleQueue[RunBroken] = queue.SimpleQueue()
        self._finished = [0.0] * record.num_replicas  # when each replica was through; its own element only

    def run(self) -> None:
        """Start the replicas together and come back when all are through, or have been stopped.

        Raises:
            RunBroken: a replica raised, some are in deadlock, or none finished a step for `stall_seconds`.
        """
        threads = [
            threading.Thread(target=self._replica, args=(own,), name=f"replica-{own}", daemon=True)
            for own in self._hosted
        ]
        for thread in threads:
            thread.start()
        started = time.perf_counter()
        self._go.set()
        try:
            self._watch(threads)
        finally:
            self._ended.set()
            deadline = time.monotonic() + JOIN_SECONDS
            self._wake_up(deadline)
            for thread in threads:
                if thread in self._stuck:
                    continue  # it never ends
                thread.join(max(0.0, deadline - time.monotonic()))
        self.seconds = max(0.0, max(self._finished) - started)

    def _wake_up(self, deadline: float) -> None:
        """Call `abort`, a user's own perhaps, which must neither keep the run nor hide why it ends."""
        aborting = threading.Thread(target=self._abort, name="abort", daemon=True)
        aborting.start()
        aborting.join(max(0.0, deadline - time.monotonic()))

    def _replica(self, own: int) -> None:
        try:
            self._go.wait()
            self._body(own)
        except threading.BrokenBarrierError:
            # Another replica raised or the run is being stopped; whoever caused it has said so.
            log.debug("replica %d left a broken barrier", own)
        except RunBroken as broken:
            log.error(broken.message)
            self._errors.put(broken)
        except Exception as error:
            message = f"replica {own} raised {type(error).__name__}: {error}"
            log.exception(message)
            self._errors.put(RunBroken("crash", message, own, self._record.replicas[own].steps_done))
        finally:
            self._finished[own] = time.perf_counter()

    def _watch(self, threads: list[threading.Thread]) -> None:
        """Report and look for trouble until every replica is through."""
        moved, moved_at = -1, time.monotonic()
        while (alive := [thread for thread in threads if thread.is_alive()]) and not self._stop.is_set():
            self._raise_errors()
            self._look_at_locks(threads)
            self._report()
            done = self._record.micro_steps_done
            if done != moved:
                moved, moved_at = done, time.monotonic()
            elif time.monotonic() - moved_at > self._stall_seconds:
                raise self._stalled(alive)
            alive[0].join(POLL_SECONDS)
        self._raise_errors()
        self._report()

    def _stalled(self, alive: Sequence[threading.Thread]) -> RunBroken:
        waiting = self._locks.waiting if self._locks is not None else {}
        told = (
            f"no replica finished a step for {self._stall_seconds:g} s (watchdog.seconds): {told_now(alive, waiting)}"
        )
        log.error("%s\n%s", told, told_holds(waiting))
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        return RunBroken("deadlock", f"{told}; the stacks are in console.log", step=self._record.steps_done)

    def _look_at_locks(self, threads: Sequence[threading.Thread]) -> None:
        found = self._locks.deadlock() if self._locks is not None else None
        if found is not None and self._locks is not None and self._locks.is_sure(found, set(threads)):
            self._stuck = found.threads
            log.error("deadlock: %s.\n%s\n%s", found.told, found.held, found.waits)
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
            raise RunBroken("deadlock", f"{found.told}.\n{found.held}", step=self._record.steps_done)

    def _raise_errors(self) -> None:
        if not self._errors.empty():
            raise self._errors.get()

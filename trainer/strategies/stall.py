"""A watch over steps that the main thread takes, which it cannot keep itself where one of them never comes back."""

from __future__ import annotations

import faulthandler
import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from trainer.audit.records import RunRecord
from trainer.audit.verdict import Error
from trainer.stop import Stop
from trainer.strategies.deadlock import where
from trainer.strategies.hosting import StopFlag

log = logging.getLogger(__name__)

POLL_SECONDS = 0.25


@contextmanager
def stalls_end_the_run(record: RunRecord, seconds: float, stop: StopFlag) -> Iterator[None]:
    """Give the run up, from another thread, when no step and no evaluation is finished for `seconds`.

    Only in a process that is the run's own (`Stop.give_up`): a thread that does not come back cannot be ended else.
    """
    if not isinstance(stop, Stop) or stop.give_up is None:
        yield
        return
    give_up, through = stop.give_up, threading.Event()
    main = threading.current_thread()

    def watch() -> None:
        moved, moved_at = (-1, -1), time.monotonic()
        while not through.wait(POLL_SECONDS):
            done = (record.micro_steps_done, len(record.evaluations))
            if done != moved:
                moved, moved_at = done, time.monotonic()
            elif time.monotonic() - moved_at > seconds and not stop.is_set():
                told = f"no step was finished for {seconds:g} s (watchdog.seconds): {where([main])}"
                log.error(told)
                faulthandler.dump_traceback(sys.stderr, all_threads=True)
                give_up(Error("deadlock", f"{told}; the stacks are in console.log", step=record.steps_done))

    watcher = threading.Thread(target=watch, name="watchdog", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        through.set()

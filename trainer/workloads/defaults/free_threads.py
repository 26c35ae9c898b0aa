"""Replicas' threads that take their steps as fast as they can, watched as those of `train` are."""

from __future__ import annotations

import threading
from collections.abc import Callable

from trainer.audit.records import RunRecord
from trainer.config import Config
from trainer.strategies.hosting import StopFlag
from trainer.strategies.replica_threads import ReplicaThreads


def take_steps(
    take: Callable[[int, int], None],
    config: Config,
    record: RunRecord,
    stop: StopFlag,
    *,
    report: Callable[[], None] = lambda: None,
    abort: Callable[[], None] = lambda: None,
) -> None:
    """Have each replica's thread call `take(replica_id, step)` for every step of the record.

    Args:
        report, abort: as those of `ReplicaThreads`.

    Raises:
        RunBroken: a replica raised, or none finished a step for `watchdog.seconds`.
    """

    ended = threading.Event()

    def body(own: int) -> None:
        for step in range(record.steps):
            if ended.is_set():
                break
            take(own, step)
            record.replicas[own].steps_done = step + 1

    threads = ReplicaThreads(
        record, body, ended, abort=abort, report=report, stop=stop, stall_seconds=config.watchdog.seconds
    )
    threads.run()

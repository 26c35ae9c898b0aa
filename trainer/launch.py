"""One run, in fresh processes: started, watched and, whatever becomes of them, left with a `verdict.json`."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from trainer import children, processes
from trainer.audit.verdict import Error
from trainer.children import Child
from trainer.config import Config
from trainer.describe import threads_per_replica
from trainer.folders import settle, status_of
from trainer.interrupts import Interrupted
from trainer.processes import Place
from trainer.stop import REASONS

ROOT = Path(__file__).resolve().parent.parent
BACKENDS = {"threads": "torch", "mirrored": "tensorflow", "ddp": "torch", "multi_worker": "tensorflow"}
SHOW_CURSOR = "\x1b[?25h"


def launch(config: Config, folder: Path, command: str, *, silent: bool = False) -> int:
    """Do one run, or a launched process's part of one, and return its exit status.

    Args:
        folder: the run's, or the launched process's, which exists.
        command: what a user types to do this run again.
        silent: keep the run from standard output, where others write at the same time; the log has all of it.

    Raises:
        Interrupted: Ctrl-C or SIGTERM; the run has ended by then.
    """
    places = processes.to_start(config)
    try:
        with _started(config, folder, places, silent=silent) as started:
            for child in started:
                request = {"config": dataclasses.asdict(config), "folder": str(child.folder), "command": command}
                children.send(child, request)
            error = children.watch(started, config.train.timeout_seconds)
    except Interrupted as interruption:
        settle(config, folder, command, Error("interrupted", REASONS[interruption.number]))
        raise
    first = started[0]
    if first.place.rank and not first.failed:
        return 0  # the verdict is rank 0's to write
    if settle(config, folder, command, error or children.reason(first)):
        return 3
    # One that was killed after its verdict still has it.
    return first.process.returncode if first.process.returncode >= 0 else status_of(folder, config.fail_on)


@contextmanager
def _started(config: Config, folder: Path, places: Sequence[Place], *, silent: bool) -> Iterator[list[Child]]:
    """The run's processes, which have ended by the time that the block is left."""
    started: list[Child] = []
    try:
        for place in places:
            own = folder if place.launched else processes.folder_of(folder, place.rank)
            environment = _environment(config) | processes.environment(config, place, folder)
            seconds = config.watchdog.seconds
            started.append(children.start(place, own, environment, watchdog_seconds=seconds, silent=silent))
        yield started
    finally:
        children.end(started)
        (folder / processes.MEETING_NAME).unlink(missing_ok=True)
        if not silent and sys.stdout.isatty():
            # A progress bar that was killed has left the terminal without its cursor.
            sys.stdout.write(SHOW_CURSOR)


def _environment(config: Config) -> dict[str, str]:
    threads = str(threads_per_replica(config))
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "KERAS_BACKEND": BACKENDS[config.strategy.name],
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "OPENBLAS_NUM_THREADS": threads,
        "PYTHONPATH": os.pathsep.join(path),
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }

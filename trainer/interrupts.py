"""Ctrl-C and SIGTERM in the process that the user started: every run below it ends, and none is left behind.

The runs have sessions of their own, so a signal reaches only this process, which passes it on. Under Hydra's joblib
and submitit launchers there are worker processes in between. They are frozen first: one that died would have its run
killed before that could write its verdict, and one that lived would start the next run.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from types import FrameType

import psutil

# Time for a run to write its verdict by itself. A little more than the run gives itself (`trainer.stop`), and short
# enough to leave room within the two seconds in which everything has stopped.
PATIENCE_SECONDS = 1.5
# Signal -> what runs are sent for it.
SIGNALS = {signal.SIGINT: signal.SIGINT, signal.SIGTERM: signal.SIGTERM}
# Programs between this process and its runs.
WORKERS = ("loky", "submitit.local._local", "submitit.core._submit")


class Interrupted(BaseException):
    """A signal came, and all runs have ended."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.number = number

    @property
    def status(self) -> int:
        return 128 + self.number


@contextmanager
def interruptible(signals: Mapping[signal.Signals, signal.Signals] = SIGNALS) -> Iterator[list[Interrupted]]:
    """Turn the first SIGINT or SIGTERM into `Interrupted`, once all runs have ended; later ones change nothing.

    Both are caught even where the parent had them ignored, as shells do for commands in the background: whoever sends
    one to this process by its number means it.

    Args:
        signals: each with the one that is passed on to runs.

    Yields:
        What was raised, for whoever ends up with another exception: compiled code may make one of it.
    """
    caught: list[Interrupted] = []

    def handle(number: int, _frame: FrameType | None) -> None:
        if caught:
            return
        caught.append(Interrupted(signals[signal.Signals(number)]))
        stop_runs(caught[0].number)
        raise caught[0]

    before = {number: signal.signal(number, handle) for number in signals}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            # After an interruption a second one must not cut short what is left to say.
            signal.signal(number, signal.SIG_IGN if caught else handler)


def stop_runs(number: signal.Signals) -> None:
    """Pass a signal on to every run below this process, wait for them, and kill what is left."""
    here = psutil.Process()
    workers = [process for process in here.children(recursive=True) if _is_worker(process)]
    for worker in workers:
        with suppress(psutil.Error):
            worker.suspend()
    runs = [process for process in here.children(recursive=True) if _is_run(process)]
    for run in runs:
        with suppress(psutil.Error):
            run.send_signal(number)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline and any(is_alive(run) for run in runs):
        time.sleep(0.02)
    for process in (*runs, *workers):
        with suppress(psutil.Error):
            process.kill()


def wait_for_workers() -> None:
    """Wait until every worker below this process has ended by itself."""
    while any(_is_worker(process) and is_alive(process) for process in psutil.Process().children(recursive=True)):
        time.sleep(0.2)


def _is_run(process: psutil.Process) -> bool:
    return "trainer.child" in _command(process)


def _is_worker(process: psutil.Process) -> bool:
    command = _command(process)
    return any(worker in word for word in command for worker in WORKERS) and not any(
        "resource_tracker" in word for word in command
    )


def _command(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


def is_alive(process: psutil.Process) -> bool:
    """Whether it still runs: one that has ended stays on as a zombie while its parent is frozen."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False

"""Whole commands, `python -m trainer` as a user gives it: watched, killed, and looked for wherever they went."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

import psutil

from soaking.ended import Ended
from soaking.places import MARK, Place, read

# Until everything of a command that has ended is gone.
GONE_SECONDS = 10.0
LOOK_SECONDS = 0.02


# Commands under way, in any thread.
RUNNING: set[Command] = set()
ENDING = threading.Event()


def end_all() -> None:
    """Ask all commands to end, which they promise to do within two seconds; no other can be given."""
    ENDING.set()
    for each in list(RUNNING):
        each.process.terminate()


class Command:
    """A command under way, in the folder `here` of its place; nothing of it is left when the block ends."""

    def __init__(self, place: Place, arguments: Sequence[str]) -> None:
        self.place = place
        self.begin = time.monotonic()
        with (place.folder / "output").open("ab") as output, (place.folder / "errors").open("ab") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "trainer", *arguments],
                cwd=place.here,
                env={**os.environ, **place.environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                # The terminal's Ctrl-C is for the soak, which ends its commands itself.
                start_new_session=True,
            )

    def __enter__(self) -> Command:
        RUNNING.add(self)
        if ENDING.is_set():
            self.process.terminate()
        return self

    def __exit__(self, *_: object) -> None:
        RUNNING.discard(self)
        if self.process.poll() is None:
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(GONE_SECONDS)
        self._left(0.0)
        self.process.wait()

    def until(self, condition: Callable[[], object], limit_seconds: float) -> object:
        """What a condition comes to; nothing where the command ended or the time was up before."""
        while time.monotonic() - self.begin < limit_seconds:
            if found := condition():
                return found
            if self.process.poll() is not None:
                return None
            time.sleep(LOOK_SECONDS)
        return None

    def run(self) -> psutil.Process | None:
        """The process of the run that it does at the moment."""
        with suppress(psutil.Error):
            for process in psutil.Process(self.process.pid).children(recursive=True):
                with suppress(psutil.Error):
                    if "trainer.child" in process.cmdline():
                        return process
        return None

    def trains(self) -> bool:
        """Whether a run has begun to take steps: its event file has a row of a replica."""
        files = self.place.folder.rglob("events.out.tfevents.*")
        return any(b"train/loss/replica_0" in path.read_bytes() for path in files)

    def saved(self) -> int:
        """Steps that the run's newest checkpoint has."""
        names = [path.stem for path in (self.place.run / "checkpoints").glob("step_*")]
        return max((int(name.rpartition("_")[2]) for name in names), default=0)

    def ended(self, limit_seconds: float) -> Ended:
        """How it ended, by itself or because it took too long."""
        how = "itself"
        try:
            self.process.wait(max(0.0, self.begin + limit_seconds - time.monotonic()))
        except subprocess.TimeoutExpired:
            how = "ended"
            if (run := self.run()) is not None:
                # It says where its threads are.
                with suppress(psutil.Error):
                    run.send_signal(signal.SIGABRT)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(GONE_SECONDS)
            self.process.kill()
        status = self.process.wait()
        seconds = time.monotonic() - self.begin
        left = self._left(GONE_SECONDS)
        output, errors = (read(self.place.folder / name) for name in ("output", "errors"))
        return Ended(status, round(seconds, 3), how, output, errors, left)

    def _left(self, seconds: float) -> list[str]:
        """What still runs of it after so many seconds, which is then killed."""
        deadline = time.monotonic() + seconds
        while (found := _marked(str(self.place.folder), self.process.pid)) and time.monotonic() < deadline:
            time.sleep(LOOK_SECONDS)
        told = []
        for process in found:
            with suppress(psutil.Error):
                told.append(f"{process.pid}: {' '.join(process.cmdline())}")
                process.kill()
        return told


def _marked(folder: str, but: int) -> list[psutil.Process]:
    """Processes that inherited a place's environment, whoever their parent is by now."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            ours = process.pid != but and process.uids().real == os.getuid()
            if ours and process.environ().get(MARK) == folder and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found

"""`python -m trainer` as a process of its own, in a folder of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
# Longer than any of these commands takes on a busy machine with two cores.
WAIT_SECONDS = 50


@dataclass(frozen=True)
class Command:
    """Starts commands in `folder`."""

    folder: Path

    def __call__(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "trainer", *arguments],
            cwd=self.folder,
            env=self.environment(**environment),
            capture_output=True,
            text=True,
            timeout=WAIT_SECONDS,
            check=False,
        )

    def start(self, *arguments: str) -> Running:
        process = subprocess.Popen(
            [sys.executable, "-m", "trainer", *arguments],
            cwd=self.folder,
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # As a shell does it: a terminal's signals go to the whole group.
            start_new_session=True,
        )
        return Running(process, self.folder)

    def left(self) -> list[str]:
        """What lies in the folder."""
        return sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob("*"))

    def environment(self, **more: str) -> dict[str, str]:
        # Whatever the terminal of these tests is like, the commands have none.
        plain = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "FORCE_COLOR")}
        return {**plain, "PYTHONPATH": str(ROOT), **more}


@dataclass(frozen=True)
class Running:
    """A command that is under way."""

    process: subprocess.Popen[str]
    folder: Path

    def wait_for(self, condition: Callable[[], Any]) -> Any:
        """What the condition gives once it is true."""
        deadline = time.monotonic() + WAIT_SECONDS
        while not (found := condition()):
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline, "it never came to that"
            time.sleep(0.02)
        return found

    def runs(self) -> list[psutil.Process]:
        """The processes of runs below this command."""
        return [process for process in self._below() if "trainer.child" in _command_line(process)]

    def training(self) -> list[Path]:
        """Folders of the runs that have begun to take steps: their event file has a row of a replica."""
        files = self.folder.rglob("events.out.tfevents.*")
        return [path.parent for path in files if b"train/loss/replica_0" in path.read_bytes()]

    def end_by(self, number: signal.Signals, *, group: bool = False) -> Ended:
        """Send a signal to the command, or as a terminal does to its group, and wait until all processes are gone."""
        below = self._below()
        start = time.monotonic()
        (os.killpg if group else os.kill)(self.process.pid, number)
        status = self.process.wait(WAIT_SECONDS)
        while (left := [process for process in below if _is_alive(process)]) and time.monotonic() - start < 10:
            time.sleep(0.02)
        seconds = time.monotonic() - start
        # joblib's tracker may write after all others are gone; nobody else holds these.
        output, errors = self.process.communicate(timeout=WAIT_SECONDS)
        return Ended(status, seconds, [" ".join(_command_line(process)) for process in left], output, errors)

    def _below(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)


@dataclass(frozen=True)
class Ended:
    """How a command ended: exit status, seconds from the signal to its last process's end, processes that are left."""

    status: int
    seconds: float
    left: list[str]
    output: str
    errors: str


def verdict(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "verdict.json").read_text(encoding="utf-8"))
    return found


def _command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False

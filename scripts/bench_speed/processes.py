"""One program started, waited for and, whatever happens, ended with everything below it."""

from __future__ import annotations

import os
import select
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import IO

import psutil

# A run ends itself within two seconds of being asked; what is still there after these is killed.
PATIENCE_SECONDS = 5.0


@dataclass(frozen=True)
class Ended:
    """How a program ended.

    Attributes:
        peak_rss_bytes: of the largest of its processes.
    """

    status: int
    wall_seconds: float
    peak_rss_bytes: int
    output: str
    errors: str


class TimedOut(Exception):
    """The program took longer than it may, and was ended."""


def run(command: Sequence[str], folder: str, limit_seconds: float) -> Ended:
    """Run a program to its end.

    Raises:
        TimedOut: it was not done after `limit_seconds`.
    """
    # To files, not pipes: nobody reads while it runs, and nothing of it waits for a reader.
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        begin = time.monotonic()
        process = subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            # A session of its own keeps the terminal's Ctrl-C from it: it is ended below, and has no say in ours.
            start_new_session=True,
        )
        try:
            _wait(process.pid, limit_seconds)
            wall = time.monotonic() - begin
            # Unlike Popen.wait, this tells what it used, it or a process that it has waited for.
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        finally:
            end(process)
        return Ended(process.returncode, wall, usage.ru_maxrss * 1024, _text(output), _text(errors))


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process that still runs, and everything below it."""
    if process.returncode is not None:
        return
    with suppress(psutil.NoSuchProcess):
        root = psutil.Process(process.pid)
        tree = [root, *root.children(recursive=True)]
        root.terminate()
        _, left = psutil.wait_procs(tree, PATIENCE_SECONDS)
        for each in left:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        psutil.wait_procs(left, PATIENCE_SECONDS)
    process.wait()


def _wait(pid: int, limit_seconds: float) -> None:
    # Wakes up at the very end: looking every now and then would add to the wall time that is measured.
    descriptor = os.pidfd_open(pid)
    try:
        ready, _, _ = select.select([descriptor], [], [], limit_seconds)
    finally:
        os.close(descriptor)
    if not ready:
        raise TimedOut(f"not done after {limit_seconds:g} s, and ended")


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")

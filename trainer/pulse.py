"""A run's process shows that it lives, and the process that started it ends it when it does not.

The child's thread `pulse` writes a byte twice a second. It needs the interpreter, so that silence says that no thread
of that process can run Python any more: one is in C code that never gives up the GIL, or the process was stopped. What
hangs while Python goes on is found in the child itself, by its steps; importing, capturing and compiling take no steps
and may take minutes, but they do not stop the pulse. Standard library and psutil.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import threading
import time
from contextlib import suppress

import psutil

from trainer.audit.verdict import Error

BEAT_SECONDS = 0.5
# Beyond `watchdog.seconds`: loading a framework's libraries holds the GIL, and machines are busy.
GRACE_SECONDS = 10.0
AGAIN_SECONDS = 2.0  # for a child that was frozen and thawed together with this process
DUMP_SECONDS = 5.0  # for writing down every stack


class Pulse:
    """One child's pulse, as its parent feels it.

    Attributes:
        fd: the writing end, which the child is to inherit.
        error: why the child was ended; None while it was not.

    Args:
        seconds: silence after which the child is ended.
        told: the same in words.
    """

    def __init__(self, seconds: float, told: str) -> None:
        self._read, self.fd = os.pipe()
        self._seconds, self._told = seconds, told
        self.error: Error | None = None

    def watch(self, process: subprocess.Popen[bytes]) -> None:
        """Watch the child, which has been started, until it ends, or end it."""
        os.close(self.fd)
        threading.Thread(target=self._watch, args=(process,), name="pulse", daemon=True).start()

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        with os.fdopen(self._read, "rb", buffering=0) as pipe:
            # Twice, as this process may have been stopped meanwhile itself: then there is something to read at once.
            while any(select.select([pipe], [], [], seconds)[0] for seconds in (self._seconds, AGAIN_SECONDS)):
                if not pipe.read(4096):
                    return
        if process.poll() is None:
            self._end(process)

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        stopped = _is_stopped(process.pid)
        why = "it was stopped (SIGSTOP)" if stopped else "no thread of it could run Python"
        self.error = Error("deadlock", f"no sign of life for {self._told}: {why}; console.log has every stack")
        with suppress(ProcessLookupError):
            # `faulthandler` needs no interpreter.
            os.kill(process.pid, signal.SIGABRT)
            os.kill(process.pid, signal.SIGCONT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(DUMP_SECONDS)
        with suppress(ProcessLookupError, PermissionError):
            # Its whole session, so that nothing it started stays.
            os.killpg(process.pid, signal.SIGKILL)


def pulse_of(watchdog_seconds: float) -> Pulse:
    told = f"{watchdog_seconds:g} + {GRACE_SECONDS:g} s (watchdog.seconds)"
    return Pulse(watchdog_seconds + GRACE_SECONDS, told)


def beat(fd: int) -> None:
    """Show the parent from now on that this process lives.

    Args:
        fd: the inherited writing end.
    """
    os.set_inheritable(fd, False)
    # A parent that is stopped must not stop this process.
    os.set_blocking(fd, False)

    def run() -> None:
        with suppress(BrokenPipeError):  # the parent is gone, which standard input tells
            while True:
                with suppress(BlockingIOError):
                    os.write(fd, b".")
                time.sleep(BEAT_SECONDS)

    threading.Thread(target=run, name="pulse", daemon=True).start()


def _is_stopped(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    except psutil.Error:
        return False

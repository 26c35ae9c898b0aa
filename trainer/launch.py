"""One run, one fresh process: started, watched and, whatever becomes of it, left with a `verdict.json`."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from trainer.audit.verdict import Error
from trainer.config import Config
from trainer.describe import threads_per_replica
from trainer.folders import settle, status_of
from trainer.interrupts import Interrupted
from trainer.stop import REASONS

ROOT = Path(__file__).resolve().parent.parent
BACKENDS = {"threads": "torch", "mirrored": "tensorflow"}
SHOW_CURSOR = "\x1b[?25h"
LOG_NAME = "console.log"
# Signals by which a program ends itself when it has gone wrong; any other was sent from outside.
CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL)


def launch(config: Config, folder: Path, command: str, *, silent: bool = False) -> int:
    """Do one run and return its exit status.

    Args:
        folder: the run's, which exists.
        command: what a user types to do this run again.
        silent: keep the run from standard output, where others write at the same time; the log has all of it.

    Raises:
        Interrupted: Ctrl-C or SIGTERM; the run has ended by then.
    """
    try:
        with _started(config, folder, silent=silent) as process:
            _send(process, {"config": dataclasses.asdict(config), "folder": str(folder), "command": command})
            error = _watch(process, config.train.timeout_seconds)
    except Interrupted as interruption:
        settle(config, folder, command, Error("interrupted", REASONS[interruption.number]))
        raise
    if settle(config, folder, command, error or _post_mortem(process.returncode, folder / LOG_NAME)):
        return 3
    # One that was killed after its verdict still has it.
    return process.returncode if process.returncode >= 0 else status_of(folder, config.fail_on)


@contextmanager
def _started(config: Config, folder: Path, *, silent: bool) -> Iterator[subprocess.Popen[bytes]]:
    """The run's process, which has ended by the time that the block is left."""
    # What this process has printed comes before what that one prints.
    sys.stdout.flush()
    with (folder / LOG_NAME).open("ab") as log:
        process = subprocess.Popen(
            # -P keeps the working directory, where a user may have a `data` or `models`, off the import path.
            [sys.executable, "-P", "-m", "trainer.child", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL if silent else None,
            stderr=log,
            env=_environment(config),
            # A session of its own keeps the terminal's Ctrl-C from it: this process passes it on.
            start_new_session=True,
        )
    try:
        yield process
    finally:
        _end(process)
        assert process.stdin is not None
        with suppress(BrokenPipeError):
            process.stdin.close()
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


def _send(process: subprocess.Popen[bytes], request: dict[str, object]) -> None:
    assert process.stdin is not None
    # A child that is gone before it has read leaves a status, which says more than a broken pipe.
    with suppress(BrokenPipeError):
        process.stdin.write(json.dumps(request).encode() + b"\n")
        process.stdin.flush()


def _watch(process: subprocess.Popen[bytes], timeout_seconds: float) -> Error | None:
    """Wait until the process has ended, or its time is up."""
    try:
        process.wait(timeout_seconds or None)
    except subprocess.TimeoutExpired:
        return Error("timeout", f"not done after train.timeout_seconds={timeout_seconds:g}")
    return None


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        # Its whole session, so that nothing it started stays.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _post_mortem(status: int, log: Path) -> Error:
    """What became of a process that left no verdict, from its status and the last that it said."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    last = f"; the last line of {LOG_NAME}: {lines[-1].strip()}" if lines else ""
    if status >= 0:
        return Error("crash", f"ended with status {status} before its verdict{last}")
    number = signal.Signals(-status)
    if number in CRASHES:
        return Error("crash", f"ended by {number.name}; {LOG_NAME} has the stack of every thread")
    memory = ", which is what the system does when memory runs out" if number == signal.SIGKILL else ""
    return Error("killed", f"killed by {number.name}{memory}{last}")

"""The processes that a command has started for one run: watched together, and ended together when one of them fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from trainer.audit.verdict import FILE_NAME, Error
from trainer.processes import Place
from trainer.pulse import Pulse, pulse_of

LOG_NAME = "console.log"
POLL_SECONDS = 0.02
# For the others to end by themselves, once one has failed and said why, or rank 0 is through.
GRACE_SECONDS = 2.0
# Signals by which a program ends itself when it has gone wrong; any other was sent from outside.
CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL)


@dataclass(frozen=True)
class Child:
    """One process of a run.

    Attributes:
        folder: where it writes.
        pulse: by which it shows that it lives.
    """

    process: subprocess.Popen[bytes]
    place: Place
    folder: Path
    pulse: Pulse

    @property
    def failed(self) -> bool:
        """Whether it has ended, and not as it should: rank 0 says by 1 that its verdict fails."""
        status = self.process.returncode
        return status is not None and status not in ((0, 1) if self.place.rank == 0 else (0,))


def start(place: Place, folder: Path, environment: dict[str, str], *, watchdog_seconds: float, silent: bool) -> Child:
    """Start one process of a run, which waits for its request.

    Args:
        folder: where it writes; made if it is not there.
        watchdog_seconds: silence, beyond some grace, after which it is ended.
        silent: keep it from standard output.
    """
    # What this process has printed comes before what that one prints.
    sys.stdout.flush()
    folder.mkdir(parents=True, exist_ok=True)
    pulse = pulse_of(watchdog_seconds)
    with (folder / LOG_NAME).open("ab") as log:
        process = subprocess.Popen(
            # -P keeps the working directory, where a user may have a `data` or `models`, off the import path.
            [sys.executable, "-P", "-m", "trainer.child", str(folder), str(pulse.fd)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL if silent or place.rank else None,
            stderr=log,
            env=environment,
            pass_fds=[pulse.fd],
            # A session of its own keeps the terminal's Ctrl-C from it: this process passes it on.
            start_new_session=True,
        )
    pulse.watch(process)
    return Child(process, place, folder, pulse)


def send(child: Child, request: Mapping[str, object]) -> None:
    assert child.process.stdin is not None
    # A child that is gone before it has read leaves a status, which says more than a broken pipe.
    with suppress(BrokenPipeError):
        child.process.stdin.write(json.dumps(request).encode() + b"\n")
        child.process.stdin.flush()


def watch(children: Sequence[Child], timeout_seconds: float) -> Error | None:
    """Wait until all have ended, and end them when one has failed or their time is up.

    Returns:
        What went wrong first; None where all have ended well.
    """
    deadline = time.monotonic() + timeout_seconds if timeout_seconds else float("inf")
    while (culprit := _failed(children)) is None and time.monotonic() < deadline:
        running = [child for child in children if child.process.poll() is None]
        if not running:
            return None
        if children[0] not in running and len(running) < len(children):
            # The first has written the verdict: nothing is left to do for the others.
            _wait(running, GRACE_SECONDS)
            return None
        _wait(running[:1], min(POLL_SECONDS if len(children) > 1 else float("inf"), deadline - time.monotonic()))
    if culprit is None:
        return Error("timeout", f"not done after train.timeout_seconds={timeout_seconds:g}")
    if culprit.process.returncode >= 0:
        _wait(children, GRACE_SECONDS)
    return reason(culprit)


def _failed(children: Sequence[Child]) -> Child | None:
    """The process that is to blame, if any has failed: of several the one that was ended from outside."""
    for child in children:
        child.process.poll()
    found = [child for child in children if child.failed]
    return min(found, key=lambda child: child.process.returncode >= 0, default=None)


def _wait(children: Sequence[Child], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    for child in children:
        left = deadline - time.monotonic()
        with suppress(subprocess.TimeoutExpired):
            child.process.wait(None if left == float("inf") else max(0.0, left))


def end(children: Sequence[Child]) -> None:
    """Kill whatever still runs, and wait for it."""
    for child in children:
        if child.process.poll() is None:
            # Its whole session, so that nothing it started stays.
            with suppress(ProcessLookupError):
                os.killpg(child.process.pid, signal.SIGKILL)
    for child in children:
        child.process.wait()
        assert child.process.stdin is not None
        with suppress(BrokenPipeError):
            child.process.stdin.close()


def reason(child: Child) -> Error:
    """Why a process failed: by its own verdict, because it was ended here, or from its status and its last words."""
    path = child.folder / FILE_NAME
    if path.exists() and (found := json.loads(path.read_text(encoding="utf-8"))["error"]):
        return Error(**found)
    error = child.pulse.error or _post_mortem(child.process.returncode, child.folder / LOG_NAME)
    if child.place.size > 1:
        error.message = f"{child.place.name}: {error.message}"
    return error


def _post_mortem(status: int, log: Path) -> Error:
    """What became of a process that left no verdict."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    last = f"; the last line of {LOG_NAME}: {lines[-1].strip()}" if lines else ""
    if status >= 0:
        return Error("crash", f"ended with status {status} before its verdict{last}")
    number = signal.Signals(-status)
    if number in CRASHES:
        return Error("crash", f"ended by {number.name}; {LOG_NAME} has the stack of every thread")
    memory = ", which is what the system does when memory runs out" if number == signal.SIGKILL else ""
    return Error("killed", f"killed by {number.name}{memory}{last}")

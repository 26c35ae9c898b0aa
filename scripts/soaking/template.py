"""A process that has imported what runs need and computed nothing, and forks for each run: no run waits for imports.

    python scripts/soaking/template.py threads|mirrored|command

Reads requests and writes replies, JSON lines both. A fork is a session of its own; under `threads` and `mirrored` it
does all that a run's own process does (`trainer.child.main`), under `command` all that `python -m trainer` does up to
the start of the run's process, where it ends with `TAKEN`.
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib
import json
import os
import select
import signal
import sys
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT)]

BACKENDS = {"threads": "torch", "mirrored": "tensorflow"}
# The exit status of a command whose configuration was taken. No status of the trainer's own.
TAKEN = 77
# What a process that has been asked to end may take: it promises less than two, on a machine of its own.
GONE_SECONDS = 10.0
# And those that it started, until they are taken for left behind.
LEFT_SECONDS = 4.0
# For the stacks that a run which hangs prints when it is aborted.
STACKS_SECONDS = 2.0
CENSUS = "census.json"
LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>


def main(kind: str) -> None:
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    prepare(kind)
    say(replies, {"ready": os.getpid()})
    for line in iter(sys.stdin.readline, ""):
        say(replies, served(kind, json.loads(line), replies))


def prepare(kind: str) -> None:
    """Import all that a run of this kind may import, and compute nothing."""
    if kind == "command":
        for name in ("trainer.__main__", "trainer.cli", "trainer.checks", "trainer.sweep_end", "trainer.usage"):
            importlib.import_module(name)
        return
    os.environ.update(KERAS_BACKEND=BACKENDS[kind], TF_CPP_MIN_LOG_LEVEL="3", OMP_NUM_THREADS="1")
    from trainer.config import Config
    from trainer.imports import frameworks

    with frameworks(Config()):
        importlib.import_module(f"trainer.strategies.{kind}")
        importlib.import_module(f"trainer.strategies.controlled_{kind}")
        for name in ("trainer.child", "trainer.one_run", "trainer.workloads.train", "trainer.workloads.own_loop"):
            importlib.import_module(name)
    # data=digits
    importlib.import_module("sklearn.datasets")


def served(kind: str, request: dict[str, Any], replies: Any) -> dict[str, Any]:
    """What became of one fork, which is gone with all that it started."""
    begin = time.monotonic()
    pid = os.fork()
    if pid == 0:
        replies.close()
        body(kind, request)
    status, how = awaited(pid, request["limit_seconds"], request.get("asked_seconds", 0.0))
    seconds = round(time.monotonic() - begin, 3)
    return {"status": status, "seconds": seconds, "how": how, "left": left_in_session(pid)}


def awaited(pid: int, limit_seconds: float, asked_seconds: float) -> tuple[int, str]:
    """Exit status of a fork, and how it ended: `itself`, `asked` (by SIGTERM) or `ended`, for it hung.

    Args:
        asked_seconds: after which it is asked to end, as Ctrl-C does; 0 never.
    """
    descriptor, how = os.pidfd_open(pid), "itself"
    try:
        done = _ends(descriptor, asked_seconds or limit_seconds)
        if not done and asked_seconds:
            os.kill(pid, signal.SIGTERM)
            how, done = "asked", _ends(descriptor, GONE_SECONDS)
        if not done:
            # It says first where its threads are.
            how = "ended"
            os.kill(pid, signal.SIGABRT)
            if not _ends(descriptor, STACKS_SECONDS):
                os.kill(pid, signal.SIGKILL)
    finally:
        os.close(descriptor)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), how


def left_in_session(session: int) -> list[str]:
    """Processes of a session whose leader has ended, which are then killed. They have a moment to end by themselves."""
    deadline = time.monotonic() + LEFT_SECONDS
    while (found := _in_session(session)) and time.monotonic() < deadline:
        time.sleep(0.02)
    for pid in found:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return [f"{pid}: {command}" for pid, command in found.items()]


def body(kind: str, request: dict[str, Any]) -> NoReturn:
    """What the fork does."""
    status = 3
    try:
        os.setsid()
        # A session of its own is not ended with the template's.
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        os.environ.update(request["environment"])
        # It has been read already, when this process imported tempfile.
        sys.modules["tempfile"].tempdir = None
        os.chdir(request["folder"])
        sys.path.extend(request["path"])
        for name, descriptor in (("output", 1), ("errors", 2)):
            opened = os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            os.dup2(opened, descriptor)
            os.close(opened)
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
        # As the interpreter opens it: what is no text is told all the same.
        sys.stderr = os.fdopen(2, "w", 1, "utf-8", "backslashreplace", closefd=False)
        status = _command(request) if kind == "command" else _run(request)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(OSError):
            sys.stdout.flush()
        os._exit(status)


def _run(request: dict[str, Any]) -> int:
    """A run's own process, from its first line to its last; before its last it says what it still holds."""
    from trainer import child

    reading, writing = os.pipe()
    os.dup2(reading, 0)
    os.close(reading)
    sys.stdin = os.fdopen(0, closefd=False)
    os.write(writing, json.dumps(request["run"]).encode() + b"\n")
    before, end = _descriptors(), child._exit

    def exit_(status: int) -> NoReturn:
        census = {
            "threads": sorted(each.name for each in threading.enumerate() if each is not threading.main_thread()),
            "descriptors": [where for number, where in _descriptors().items() if before.get(number) != where],
            "children": list(_children(os.getpid()).values()),
        }
        Path(request["folder"], CENSUS).write_text(json.dumps(census), encoding="utf-8")
        end(status)

    child._exit = exit_
    child.main()


def _command(request: dict[str, Any]) -> int:
    """The command, up to where it would start the run's process."""
    from trainer import __main__, job

    def launch(config: Any, *_: Any, **__: Any) -> NoReturn:
        Path(request["config"]).write_text(json.dumps(dataclasses.asdict(config)), encoding="utf-8")
        sys.stdout.flush()
        os._exit(TAKEN)

    job.launch = launch
    # As the interpreter reads them: bytes that are no text stay what they are.
    sys.argv = ["trainer", *(os.fsdecode(bytes.fromhex(each)) for each in request["arguments"])]
    return __main__.main()


def say(replies: Any, reply: dict[str, Any]) -> None:
    replies.write(json.dumps(reply) + "\n")
    replies.flush()


def _ends(descriptor: int, seconds: float) -> bool:
    return bool(select.select([descriptor], [], [], seconds)[0])


def _descriptors() -> dict[int, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        # The one that lists them is gone by now.
        with suppress(OSError):
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    return found


def _in_session(session: int) -> dict[int, str]:
    return {pid: command for pid, (_, own, command) in _processes().items() if own == session}


def _children(parent: int) -> dict[int, str]:
    return {pid: command for pid, (own, _, command) in _processes().items() if own == parent}


def _processes() -> dict[int, tuple[int, int, str]]:
    """Process -> its parent, its session and its command; those that are dead and unburied left out."""
    found = {}
    for name in filter(str.isdecimal, os.listdir("/proc")):
        with suppress(OSError):
            # Behind the command's name, which may have spaces: state, parent, group, session.
            state, parent, _, session = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[:4]
            if state not in "ZX":
                command = Path(f"/proc/{name}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                found[int(name)] = (int(parent), int(session), command.strip())
    return found


if __name__ == "__main__":
    main(sys.argv[1])

"""The process of one run: `python -m trainer.child FOLDER [PULSE]`, started by `trainer/launch.py` only.

Keras allows one backend a process and logical devices cannot change once used, so every run has a process of its own.
Standard input is a pipe from the parent. Its first line is the request; after that it stays open and empty, and its end
means that the parent is gone. PULSE is a descriptor by which this process shows that it lives. Standard error goes to
the run's log: frameworks write to it from C++ as well.
"""

from __future__ import annotations

import faulthandler
import importlib.util
import json
import os
import sys
import traceback
from pathlib import Path
from typing import NoReturn

from trainer.audit.verdict import Error, Verdict, exit_status
from trainer.config import Config
from trainer.folders import settle
from trainer.from_dict import from_dict
from trainer.pulse import beat
from trainer.stop import Stop

ROOT = Path(__file__).resolve().parent.parent


def main() -> NoReturn:
    faulthandler.enable()
    if len(sys.argv) > 2:
        beat(int(sys.argv[2]))
    request = json.loads(_first_line(sys.stdin.fileno()))
    config, folder, command = from_dict(request["config"]), Path(request["folder"]), str(request["command"])
    stop = Stop()

    def too_late() -> None:
        _settle_interrupted(config, folder, command, stop)
        _exit(stop.status)

    def give_up(error: Error) -> NoReturn:
        settle(config, folder, command, error)
        _exit(exit_status(Verdict("broken", {}, error), config.fail_on))

    stop.give_up = give_up
    stop.listen(sys.stdin.fileno(), too_late)
    # The user's own modules are found in the working directory, after ours.
    sys.path.append(os.getcwd())
    try:
        _check_packages()
        from trainer.one_run import run

        verdict = run(config, folder, command, stop)
        status = exit_status(verdict, config.fail_on) if verdict is not None else 0
        status = stop.status if stop.is_set() else status
    except BaseException as error:
        # Whatever escaped, a verdict must say so: this is the process's outermost frame.
        traceback.print_exc()
        if stop.is_set():
            _settle_interrupted(config, folder, command, stop)
        else:
            settle(config, folder, command, Error("crash", _last_line(error)))
        status = stop.status or 3
    _exit(status)


def _first_line(descriptor: int) -> bytes:
    """The request. Read byte by byte, so that nothing behind it is swallowed by a buffer."""
    line = bytearray()
    while (byte := os.read(descriptor, 1)) not in (b"", b"\n"):
        line += byte
    return bytes(line)


def _check_packages() -> None:
    """Hold `models` and `data`, names that a user may have too, to being ours.

    Raises:
        ImportError: another one is found first.
    """
    for name in ("models", "data"):
        found = importlib.util.find_spec(name)
        origin = None if found is None else found.origin
        ours = ROOT / name / "__init__.py"
        if origin is None or Path(origin).resolve() != ours:
            raise ImportError(f"package '{name}' is {origin or 'missing'}, not the trainer's own {ours}. Rename yours.")


def _settle_interrupted(config: Config, folder: Path, command: str, stop: Stop) -> None:
    settle(config, folder, command, Error("interrupted", stop.reason or ""))


def _last_line(error: BaseException) -> str:
    return traceback.format_exception_only(error)[-1].strip()


def _exit(status: int) -> NoReturn:
    """End now: a replica that hangs, or a framework that tidies up for seconds, must not keep the process."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            # Whoever read it is gone.
            continue
    os._exit(status)


if __name__ == "__main__":
    main()

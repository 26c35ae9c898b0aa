"""A run's folder: taken for one run only, and never left without a verdict."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

from trainer.audit.verdict import FILE_NAME, Error, Verdict, exit_status, save
from trainer.config import Config, ConfigError
from trainer.describe import describe

log = logging.getLogger(__name__)

# Any of these in a folder says that a run, or a sweep, was there.
TRACES = (FILE_NAME, "events.out.tfevents.*", ".hydra", "multirun.yaml", "checkpoints/step_*")


def claim(folder: Path, key: str, *, below: bool = False, shared: bool = False) -> None:
    """Make the folder for this run, or take one that exists and holds no run.

    Args:
        key: the key that named the folder, for the message.
        below: look for runs one level below as well, as a sweep's are.
        shared: other processes of this run may make the folder at the same time.

    Raises:
        ConfigError: it cannot be written, or holds a run already.
    """
    elsewhere = f"Choose another folder with {key}=FOLDER."
    try:
        existed = shared or folder.exists()
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Of two runs that start in the same second under the same name, only one can make it.
        folder.mkdir(exist_ok=existed)
        patterns = [f"{level}{trace}" for trace in TRACES for level in ("", "*/")[: 1 + below]]
        traces = [trace.relative_to(folder) for pattern in patterns for trace in folder.glob(pattern)]
    except FileExistsError as error:
        taken = "another run has just taken it" if folder.is_dir() else f"{error.filename} is in the way"
        raise ConfigError(f"{key}={folder} cannot be written: {taken}. {elsewhere}") from None
    except OSError as error:
        raise ConfigError(f"{key}={folder} cannot be written: {error.strerror}. {elsewhere}") from None
    if traces:
        raise ConfigError(f"{key}={folder} already holds a run ({traces[0]}). {elsewhere}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"{key}={folder} cannot be written: no permission. {elsewhere}")


def take_over(folder: Path, restarts: int, *, goes_on: bool) -> None:
    """Take the folder of a run that a launcher has started again after it broke.

    What the broken one left stays beside it, its verdict under another name.

    Args:
        goes_on: from the last checkpoint in the folder, if there is one; else the run starts anew.
    """
    folder.mkdir(parents=True, exist_ok=True)
    old = folder / FILE_NAME
    if old.exists():
        kept = old.rename(folder / f"verdict_before_restart_{restarts}.json")
        how = "goes on from its last checkpoint, if all processes have one" if goes_on else "starts anew"
        log.warning("restart %d: the run %s; what broke the last time is in %s", restarts, how, kept.name)


def from_here(folder: Path) -> Path:
    """The folder as it is written from the working directory, when it lies below it."""
    return folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder


def status_of(folder: Path, fail_on: str) -> int:
    """The exit status that follows from the verdict in a folder."""
    found = json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))
    error = Error(**found["error"]) if found["error"] else None
    return exit_status(Verdict(found["verdict"], found["run"], error), fail_on)


def settle(config: Config, folder: Path, command: str, error: Error) -> bool:
    """Write the verdict of a run that could not: broken, and why. A verdict that is there already stays.

    Returns:
        Whether it had to be written.
    """
    if (folder / FILE_NAME).exists():
        return False
    save(Verdict("broken", describe(config, command), error), folder)
    return True

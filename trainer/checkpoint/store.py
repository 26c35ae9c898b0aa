"""A run's folder of checkpoints: what is in it, how one gets there, and which one is taken. Standard library only.

Invariant: at any moment, however a writer or its machine ends, every file under a checkpoint's name is whole, and of
the `keep` newest that were ever written none is missing. A new one is on the disk before an old one is removed.
"""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.checkpoint.sealed import Newer, Unusable, facts_of
from trainer.config import ConfigError
from trainer.whole_file import put

log = logging.getLogger(__name__)

FOLDER = "checkpoints"
NAME = re.compile(r"step_(\d{8})\.safetensors")
# What `put` calls a file while it is written; who was killed meanwhile has left it behind.
PARTIAL = re.compile(r"\.step_\d{8}\.safetensors\.[0-9a-f]{16}")


@dataclass(frozen=True)
class Found:
    """The checkpoint to go on from.

    Attributes:
        data: the file's content, as it was when its digest was found right.
        facts: what is in it beside arrays.
        skipped: newer ones that could not be used, and why.
    """

    path: Path
    data: bytes
    facts: dict[str, Any]
    skipped: list[str] = field(default_factory=list)

    @property
    def step(self) -> int:
        return int(self.facts["step"])


def name_of(step: int) -> str:
    return f"step_{step:08d}.safetensors"


def steps_in(folder: Path) -> list[int]:
    """The steps of a run's checkpoints by their names, newest first.

    Args:
        folder: the run's.
    """
    try:
        names = os.listdir(folder / FOLDER)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return _steps(names)


def _steps(names: list[str]) -> list[int]:
    return sorted((int(match[1]) for name in names if (match := NAME.fullmatch(name))), reverse=True)


def store(data: bytes, step: int, folder: Path, *, keep: int) -> None:
    """Put a checkpoint into a run's folder and, once it is on the disk, remove all but the `keep` newest.

    Thread-safety: one writer a folder at a time.

    Raises:
        OSError: it could not be written. Nothing of it is left, and those before are all there.
    """
    own = folder / FOLDER
    if not own.is_dir():
        own.mkdir()
        _flush(folder)
    descriptor = os.open(own, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for name in os.listdir(descriptor):
            if PARTIAL.fullmatch(name):
                os.unlink(name, dir_fd=descriptor)
        put(data, name_of(step), descriptor)
        _prune(descriptor, keep)
    finally:
        os.close(descriptor)


def _prune(descriptor: int, keep: int) -> None:
    for step in _steps(os.listdir(descriptor))[keep:]:
        try:
            os.unlink(name_of(step), dir_fd=descriptor)
        except OSError as error:
            # The new one is there; an old one too many is no failed checkpoint.
            log.warning("%s cannot be removed: %s.", name_of(step), error.strerror)


def remove_after(step: int, folder: Path) -> None:
    """Remove a run's checkpoints of later steps, which it is going to take again.

    Raises:
        OSError: one cannot be removed.
    """
    for later in steps_in(folder):
        if later > step:
            (folder / FOLDER / name_of(later)).unlink()


def _flush(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def newest(folder: Path, at_most: int | None = None) -> Found:
    """The newest checkpoint of a run that is as it was written.

    Args:
        at_most: the last step that it may be of, where other processes have no newer one.

    Raises:
        ConfigError: there is none, or the newest is of a newer version of this program.
    """
    given = f"resume={folder}"
    if not folder.is_dir():
        what = "is no folder" if folder.exists() else "does not exist"
        raise ConfigError(f"{given} {what}. Give the folder of a run that was made with checkpoint.every=STEPS.")
    steps = steps_in(folder)
    if not steps:
        raise ConfigError(
            f"{given} has no {FOLDER}/{name_of(0).replace('0' * 8, 'STEP')}. "
            "Give the folder of a run that was made with checkpoint.every=STEPS and came so far."
        )
    skipped: list[str] = []
    for step in steps:
        path = folder / FOLDER / name_of(step)
        if at_most is not None and step > at_most:
            skipped.append(f"{path.name} is of a step of which not every process has a good one")
            continue
        try:
            data = path.read_bytes()
            return Found(path, data, facts_of(data), skipped)
        except Newer as newer:
            # Not passed over: it is good, and whoever wrote it can read it.
            raise ConfigError(
                f"{given}: {path} {newer}. Resume with the version that wrote it, or remove it to go on from the one "
                "before."
            ) from None
        except Unusable as why:
            skipped.append(f"{path.name} {why}")
        except OSError as error:
            skipped.append(f"{path.name} cannot be read: {error.strerror}")
    raise ConfigError(f"{given} has no checkpoint that can be used: {'; '.join(skipped)}. Start the run anew.")

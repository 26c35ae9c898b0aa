"""Arrays and facts in a checkpoint's file, and out of it again. NumPy and safetensors, which executes nothing.

`save` and `load` are all that a strategy of several processes needs besides: one process saves, each may load.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from trainer.checkpoint.sealed import metadata, seal
from trainer.checkpoint.store import Found, newest, store

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Loaded:
    """A checkpoint.

    Attributes:
        arrays: by name; facts: everything else.
        skipped: newer ones of the same run that could not be used, and why.
    """

    path: Path
    step: int
    arrays: Arrays
    facts: dict[str, Any]
    skipped: list[str]


def encode(arrays: Mapping[str, NDArray[Any]], facts: Mapping[str, Any]) -> bytes:
    """The content of a checkpoint's file."""
    # The library writes an array's memory as it lies.
    whole = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    return seal(safetensors.numpy.save(whole, metadata(facts)))


def save(arrays: Mapping[str, NDArray[Any]], facts: Mapping[str, Any], step: int, folder: Path, *, keep: int) -> int:
    """Write a run's checkpoint of a step, and keep the `keep` newest.

    Args:
        facts: JSON.
        folder: the run's.

    Returns:
        The file's size in bytes.

    Thread-safety: one writer a folder at a time.

    Raises:
        OSError: it could not be written; those before are all there.
    """
    data = encode(arrays, {**facts, "step": step})
    store(data, step, folder, keep=keep)
    return len(data)


def load(folder: Path) -> Loaded:
    """The newest good checkpoint of a run's folder.

    Raises:
        ConfigError: there is none.
    """
    return decode(newest(folder))


def decode(found: Found) -> Loaded:
    return Loaded(found.path, found.step, dict(safetensors.numpy.load(found.data)), found.facts, found.skipped)

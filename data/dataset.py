"""What every source of data gives: samples to train on and samples held out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Labels = NDArray[np.int32]

SPLIT_STREAM = 1


class DataError(ValueError):
    """Data that cannot be trained on, told in one line: where it is from, what came, what fits, what to do."""

    def __init__(self, message: str) -> None:
        # Names in a file may hold anything, line ends and a terminal's controls included.
        line = " ".join(message.split())
        super().__init__("".join(letter if letter.isprintable() else "?" for letter in line))


@dataclass(frozen=True)
class Dataset:
    """Samples to train on and samples held out.

    Attributes:
        train_x, test_x: float32 [n, *shape].
        train_y, test_y: int32 [n], class of each sample, 0 up to but without num_classes.

    Thread-safety: nobody writes to the arrays; share them.
    """

    train_x: Floats
    train_y: Labels
    test_x: Floats
    test_y: Labels
    num_classes: int


def num_held_out(samples: int, held_out: float) -> int:
    """How many samples a share of them is: rounded, and at least one.

    Raises:
        DataError: nothing is left to train on.
    """
    num_test = max(1, round(samples * held_out))
    if num_test >= samples:
        raise DataError(f"data.held_out={held_out:g} leaves none of {samples} samples to train on.")
    return num_test


def split(x: Floats, y: Labels, num_classes: int, held_out: float, seed: int) -> Dataset:
    """Shuffle once and hold out a share for testing; which samples depends on `seed` alone.

    Raises:
        DataError: nothing is left to train on.

    Thread-safety: pure.
    """
    num_test = num_held_out(len(x), held_out)
    order = np.random.default_rng([seed, 0, SPLIT_STREAM]).permutation(len(x))
    test, train = order[:num_test], order[num_test:]
    return Dataset(x[train], y[train], x[test], y[test], num_classes)

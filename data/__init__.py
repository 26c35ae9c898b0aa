"""Datasets as NumPy arrays, and the plan that cuts them into batches (`data.plan`).

Importing this package costs NumPy only: what a dataset needs besides is imported when it is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from data import digits, mnist, npz, synthetic
from data.dataset import DataError, Dataset

__all__ = ["SOURCES", "DataError", "Dataset", "load"]

# Each takes (options, seed).
SOURCES: dict[str, Callable[[Any, int], Dataset]] = {
    "digits": digits.load,
    "synthetic": synthetic.load,
    "npz": npz.load,
    "mnist": mnist.load,
}


def load(options: Any, seed: int) -> Dataset:
    """Load the dataset that `options.name` names.

    Where it brings no test set of its own, `max(1, round(samples * options.held_out))` samples are held out; which ones
    depends on `seed` alone.

    Args:
        options: `name` and what the dataset itself takes.

    Raises:
        DataError: the data are missing or cannot be trained on.
        ValueError: an unknown name.

    Thread-safety: pure.
    """
    if options.name not in SOURCES:
        raise ValueError(f"data must be one of {', '.join(SOURCES)}; got '{options.name}'.")
    return SOURCES[options.name](options, seed)

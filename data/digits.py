"""Handwritten digits that scikit-learn ships: nothing is downloaded."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from data.dataset import DataError, Dataset, split

NUM_SAMPLES = 1797


def load(options: Any, seed: int) -> Dataset:
    """All digits, split: x float32 [n, 8, 8, 1] from 0 to 1, 10 classes.

    Args:
        options: `held_out`, above 0 and below 1.

    Raises:
        DataError: scikit-learn is not installed, or has no digits where all its releases so far have them.
        RuntimeError: scikit-learn ships another number of digits than the configuration was checked against.
    """
    values = np.loadtxt(_file(), delimiter=",", dtype=np.float64)
    images, labels = values[:, :-1], values[:, -1]
    if len(images) != NUM_SAMPLES:
        raise RuntimeError(f"data=digits expects {NUM_SAMPLES} samples; this scikit-learn ships {len(images)}.")
    # Pixels are counts from 0 to 16.
    x = (images / 16).astype(np.float32).reshape(-1, 8, 8, 1)
    return split(x, labels.astype(np.int32), 10, options.held_out, seed)


def _file() -> Path:
    """The table that `sklearn.datasets.load_digits` reads; importing scikit-learn would take longer than training."""
    found = importlib.util.find_spec("sklearn")
    folders = found.submodule_search_locations if found is not None else None
    for folder in folders or ():
        path = Path(folder, "datasets", "data", "digits.csv.gz")
        if path.is_file():
            return path
    raise DataError("data=digits needs scikit-learn, which brings them, installed. Try data=synthetic.")

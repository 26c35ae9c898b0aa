"""Handwritten digits that scikit-learn ships: nothing is downloaded."""

from __future__ import annotations

from typing import Any

import numpy as np

from data.dataset import Dataset, split

NUM_SAMPLES = 1797


def load(options: Any, seed: int) -> Dataset:
    """All digits, split: x float32 [n, 8, 8, 1] from 0 to 1, 10 classes.

    Args:
        options: `held_out`, above 0 and below 1.

    Raises:
        RuntimeError: scikit-learn ships another number of digits than the configuration was checked against.
    """
    # Here, not at the top: scikit-learn is slow to import, and only this dataset needs it.
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    if len(images) != NUM_SAMPLES:
        raise RuntimeError(f"data=digits expects {NUM_SAMPLES} samples; this scikit-learn ships {len(images)}.")
    # Pixels are counts from 0 to 16.
    x = (images / 16).astype(np.float32).reshape(-1, 8, 8, 1)
    return split(x, labels.astype(np.int32), 10, options.held_out, seed)

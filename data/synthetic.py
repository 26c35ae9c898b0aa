"""Classes of any shape and number, drawn from a seed: each sample is its class's centre plus noise."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from data.dataset import Dataset, split

SYNTHETIC_STREAM = 2


def load(options: Any, seed: int) -> Dataset:
    """Draw x float32 [samples, *shape] and y, and split them; classes differ in size by one sample at most.

    Args:
        options: `samples`, `shape` (of one sample), `classes`, `noise` (standard deviation; a centre's own is 1),
            `held_out` (above 0 and below 1).

    Raises:
        DataError: nothing is left to train on.

    Thread-safety: pure.
    """
    random = np.random.default_rng([seed, 0, SYNTHETIC_STREAM])
    features = math.prod(options.shape)
    centres = random.standard_normal((options.classes, features), dtype=np.float32)
    y = np.arange(options.samples, dtype=np.int32) % options.classes
    noise = random.standard_normal((options.samples, features), dtype=np.float32)
    x = (centres[y] + np.float32(options.noise) * noise).reshape(options.samples, *options.shape)
    return split(x, y, options.classes, options.held_out, seed)

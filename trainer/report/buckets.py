"""Values as the buckets of a TensorBoard histogram: float64 [k, 3], each row left edge, right edge, count."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Buckets = NDArray[np.float64]
# As many as TensorBoard draws.
MOST = 30
# Whole numbers below this have a bucket each.
SINGLE = 16


def of_counts(values: NDArray[np.int32]) -> Buckets:
    """Buckets round whole numbers from 0 on: one each at first, then twice as many in each bucket as in all before it.

    Most updates come late by a few others' and some by hundreds: both can be read off.

    Args:
        values: at least one, none below 0.
    """
    largest = int(values.max())
    edges = [number - 0.5 for number in range(min(largest + 1, SINGLE) + 1)]
    while edges[-1] < largest:
        edges.append(min(2 * (edges[-1] + 0.5) - 0.5, largest + 0.5))
    counts, bounds = np.histogram(values, np.array(edges))
    return np.stack([bounds[:-1], bounds[1:], counts], axis=1)


def of_numbers(values: NDArray[np.float64]) -> Buckets:
    """Equal buckets from the least to the largest, fewer for few values; one without width where all are equal.

    Args:
        values: at least one, all finite.
    """
    least, largest = float(values.min()), float(values.max())
    if least == largest:
        return np.array([[least, largest, len(values)]])
    counts, edges = np.histogram(values, min(MOST, math.ceil(2 * math.sqrt(len(values)))), (least, largest))
    return np.stack([edges[:-1], edges[1:], counts], axis=1)

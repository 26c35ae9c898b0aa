"""Initial weights from NumPy, so that they are the same bits on every backend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

INITIAL_STREAM = 3


@keras.saving.register_keras_serializable("models")
class GlorotUniform(keras.initializers.Initializer):
    """Uniform within +-sqrt(6 / (fan_in + fan_out)), the `index`-th variable of the model seeded with `seed`.

    The index is given by the model, not counted here: values then depend on no order of building.

    Thread-safety: pure.
    Source: Glorot and Bengio 2010.
    """

    def __init__(self, seed: int, index: int) -> None:
        self.seed = seed
        self.index = index

    def __call__(self, shape: Sequence[int], dtype: Any = None) -> Any:
        """A tensor of `shape`: [in, out], or [height, width, in, out] for a convolution."""
        *window, fan_in, fan_out = shape
        limit = math.sqrt(6 / (math.prod(window) * (fan_in + fan_out)))
        random = np.random.default_rng([self.seed, self.index, INITIAL_STREAM])
        # Rounded once, here, to the variables' dtype: a backend that drew or scaled by itself would round its own way.
        values = random.uniform(-limit, limit, tuple(shape)).astype(np.float32)
        return keras.ops.convert_to_tensor(values, dtype=dtype)

    def get_config(self) -> dict[str, Any]:
        return {"seed": self.seed, "index": self.index}

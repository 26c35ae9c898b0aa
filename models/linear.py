"""Softmax regression: the smallest model, with a convex loss."""

from __future__ import annotations

from typing import Any

import keras

from models.initializers import GlorotUniform


def build(
    options: Any, input_shape: tuple[int, ...], num_classes: int, seed: int, dtype_policy: Any = None
) -> keras.Model:
    """Logits straight from the flattened sample. Takes no options."""
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input(input_shape),
            layers.Flatten(data_format="channels_last", dtype=dtype_policy),
            layers.Dense(num_classes, kernel_initializer=GlorotUniform(seed, 0), dtype=dtype_policy, name="logits"),
        ],
        name="linear",
    )

"""A multi-layer perceptron."""

from __future__ import annotations

from typing import Any

import keras

from models.dropout import Dropout
from models.initializers import GlorotUniform


def build(
    options: Any, input_shape: tuple[int, ...], num_classes: int, seed: int, dtype_policy: Any = None
) -> keras.Model:
    """Hidden layers of `options.hidden` units with relu, each followed by dropout if `options.dropout` is above 0."""
    layers = keras.layers
    stack = [keras.Input(input_shape), layers.Flatten(data_format="channels_last", dtype=dtype_policy)]
    for index, units in enumerate(options.hidden):
        stack.append(
            layers.Dense(
                units,
                activation="relu",
                kernel_initializer=GlorotUniform(seed, index),
                dtype=dtype_policy,
                name=f"hidden_{index}",
            )
        )
        if options.dropout > 0:
            stack.append(Dropout(options.dropout, layer_index=index, dtype=dtype_policy, name=f"dropout_{index}"))
    last = GlorotUniform(seed, len(options.hidden))
    stack.append(layers.Dense(num_classes, kernel_initializer=last, dtype=dtype_policy, name="logits"))
    return keras.Sequential(stack, name="mlp")

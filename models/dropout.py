"""Dropout that holds no generator: what it drops is up to the source of the call's random numbers."""

from __future__ import annotations

import math
from typing import Any

import keras
from keras import ops

from models.random import current_source


@keras.saving.register_keras_serializable("models")
class Dropout(keras.Layer):
    """In training, drops the share `rate` of activations and scales the others by 1 / (1 - rate); else passes them on.

    A call in training draws from the source of `models.random.drawing`. With a `Key`, sample i of the joint batch has
    the same mask at step s on every backend, in whatever replica it is.

    Args:
        rate: from 0 up to but without 1; rounded to a multiple of 2**-32.
        layer_index: sets this layer's masks apart from those of the model's other layers, which must have others.

    Raises:
        RuntimeError: called in training without a source.
        ValueError: the source is a key for another number of samples than the batch has.

    Thread-safety: stateless; replicas may call one layer at once.
    """

    def __init__(self, rate: float, layer_index: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 0 <= rate < 1:
            raise ValueError(f"rate must be from 0 up to but without 1; got {rate:g}.")
        self.rate = rate
        self.layer_index = layer_index

    def call(self, inputs: Any, training: bool = False) -> Any:
        """inputs: [batch, ...], all sizes but the batch's known."""
        if not training or self.rate == 0:
            return inputs
        sizes = inputs.shape[1:]
        random = current_source().bits(
            layer_index=self.layer_index, num_elements=math.prod(sizes), batch=inputs.shape[0]
        )
        # Compared as integers: the share is exact and no float is rounded on the way.
        kept = ops.reshape(random >= round(self.rate * 2**32), (-1, *sizes))
        return ops.where(kept, inputs * (1 / (1 - self.rate)), ops.zeros_like(inputs))

    def compute_output_shape(self, input_shape: tuple[int, ...]) -> tuple[int, ...]:
        return input_shape

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "rate": self.rate, "layer_index": self.layer_index}

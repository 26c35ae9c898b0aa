"""A small convolutional network, with the normalizations that differ in what replicas have to share.

`none` and `group` keep no statistics: N replicas compute what one computes on the joint batch. `batch` takes each
replica's own batch and keeps moving statistics, which replicas share like weights. `sync_batch` takes the joint batch:
replicas meet inside the forward pass.
"""

from __future__ import annotations

import math
from typing import Any

import keras

from models.dropout import Dropout
from models.initializers import GlorotUniform

CHANNELS_PER_GROUP = 8


def build(
    options: Any, input_shape: tuple[int, ...], num_classes: int, seed: int, dtype_policy: Any = None
) -> keras.Model:
    """For each of `options.filters` a 3x3 convolution, the normalization, relu and a 2x2 max-pooling; then dropout and
    logits.

    Args:
        input_shape: [height, width, channels]; height and width at least 2 ** len(filters).

    Raises:
        ValueError: an unknown normalization, or `sync_batch` on a backend other than TensorFlow.
    """
    layers = keras.layers
    # Said to each layer: Keras' own default comes from a file in the user's home.
    channels_last = {"data_format": "channels_last", "dtype": dtype_policy}
    stack = [keras.Input(input_shape)]
    for index, filters in enumerate(options.filters):
        normalization = _normalization(options.normalization, filters, dtype_policy, f"normalization_{index}")
        stack += [
            layers.Conv2D(
                filters,
                3,
                padding="same",
                # A normalization adds a shift of its own. Over a batch it also takes any other out again: a bias would
                # have no true gradient, and Adam would turn the rounding error it has instead into whole steps.
                use_bias=not normalization,
                kernel_initializer=GlorotUniform(seed, index),
                name=f"convolution_{index}",
                **channels_last,
            ),
            *normalization,
            layers.Activation("relu", dtype=dtype_policy),
            layers.MaxPooling2D(2, **channels_last),
        ]
    # Not a global average: digits differ by where their strokes are, and pooling has left few positions to weigh.
    stack.append(layers.Flatten(**channels_last))
    if options.dropout > 0:
        stack.append(Dropout(options.dropout, layer_index=0, dtype=dtype_policy, name="dropout"))
    last = GlorotUniform(seed, len(options.filters))
    stack.append(layers.Dense(num_classes, kernel_initializer=last, dtype=dtype_policy, name="logits"))
    return keras.Sequential(stack, name="cnn")


def _normalization(kind: str, filters: int, dtype_policy: Any, name: str) -> list[keras.Layer]:
    """The layer asked for, or none, as a list to splice in."""
    layers = keras.layers
    if kind == "none":
        return []
    if kind == "group":
        groups = filters // math.gcd(filters, CHANNELS_PER_GROUP)
        return [layers.GroupNormalization(groups, axis=-1, dtype=dtype_policy, name=name)]
    if kind in ("batch", "sync_batch"):
        synchronized = kind == "sync_batch"
        # Not Keras' 0.99, at which a run of 200 steps would still evaluate with 13 % of the initial statistics.
        return [
            layers.BatchNormalization(axis=-1, momentum=0.9, synchronized=synchronized, dtype=dtype_policy, name=name)
        ]
    raise ValueError(f"model.normalization must be one of none, batch, sync_batch, group; got '{kind}'.")

"""A small transformer over the patches of an image. It keeps no statistics: N replicas compute what one would."""

from __future__ import annotations

from itertools import count
from typing import Any

import keras

from models.attention import NUM_KERNELS, SelfAttention
from models.dropout import Dropout
from models.initializers import GlorotUniform
from models.positions import PositionEmbedding

EXPANSION = 4  # units of a block's inner layer, times the width


def build(
    options: Any, input_shape: tuple[int, ...], num_classes: int, seed: int, dtype_policy: Any = None
) -> keras.Model:
    """Patches as vectors plus their positions, `options.depth` pre-norm blocks, the mean over patches, logits.

    A block is x + attention(normalized x), then x + MLP(normalized x). In training, the share `options.dropout` is
    dropped of the embedded patches, of the attention weights, and of each branch before it is added.

    Args:
        options: `patch` (side of a patch, divides height and width), `width` (of a patch's vector), `heads` (divides
            `width`), `depth`, `dropout`.
        input_shape: [height, width, channels].

    Raises:
        ValueError: sizes that do not divide.

    Source: Dosovitskiy et al. 2021 (Vision Transformer), with mean pooling in place of a class token.
    """
    parts = _Parts(options.dropout, seed, dtype_policy)
    inputs = keras.Input(input_shape)
    # No bias: the position's embedding is one.
    x = parts.dense(_patches(inputs, options.patch, dtype_policy), options.width, "patches", use_bias=False)
    x = parts.dropped(parts.placed(x))
    for index in range(options.depth):
        branch = parts.attended(parts.normalized(x, f"normalization_{index}_attention"), options.heads, index)
        x = parts.added(x, branch)
        branch = parts.normalized(x, f"normalization_{index}_mlp")
        branch = parts.dense(branch, EXPANSION * options.width, f"inner_{index}", activation="gelu")
        x = parts.added(x, parts.dense(branch, options.width, f"outer_{index}"))
    x = parts.normalized(x, "normalization")
    x = keras.layers.GlobalAveragePooling1D(data_format="channels_last", dtype=dtype_policy, name="mean")(x)
    return keras.Model(inputs, parts.dense(x, num_classes, "logits"), name="transformer")


def _patches(images: Any, patch: int, dtype_policy: Any) -> Any:
    """[batch, height, width, channels] cut into squares: [batch, patches, patch * patch * channels]."""
    layers = keras.layers
    _, height, width, channels = images.shape
    if height % patch or width % patch:
        raise ValueError(f"model.patch must divide height and width; got {patch} for {height}x{width}.")
    rows, columns = height // patch, width // patch
    x = layers.Reshape((rows, patch, columns, patch * channels), dtype=dtype_policy)(images)
    # A patch's rows together.
    x = layers.Permute((1, 3, 2, 4), dtype=dtype_policy)(x)
    return layers.Reshape((rows * columns, patch * patch * channels), dtype=dtype_policy)(x)


class _Parts:
    """The layers of one model, numbered: equal numbers would make kernels start alike and dropouts drop alike."""

    def __init__(self, dropout: float, seed: int, dtype_policy: Any) -> None:
        self.rate, self.seed, self.dtype_policy = dropout, seed, dtype_policy
        self.variables, self.dropouts = count(), count()

    def dense(self, x: Any, units: int, name: str, **kwargs: Any) -> Any:
        initial = GlorotUniform(self.seed, next(self.variables))
        return keras.layers.Dense(units, kernel_initializer=initial, dtype=self.dtype_policy, name=name, **kwargs)(x)

    def placed(self, x: Any) -> Any:
        return PositionEmbedding(self.seed, next(self.variables), dtype=self.dtype_policy, name="positions")(x)

    def normalized(self, x: Any, name: str) -> Any:
        return keras.layers.LayerNormalization(dtype=self.dtype_policy, name=name)(x)

    def attended(self, x: Any, heads: int, index: int) -> Any:
        first, *_ = [next(self.variables) for _ in range(NUM_KERNELS)]
        attention = SelfAttention(
            heads,
            self.rate,
            seed=self.seed,
            first_index=first,
            layer_index=next(self.dropouts),
            dtype=self.dtype_policy,
            name=f"attention_{index}",
        )
        return attention(x)

    def dropped(self, x: Any) -> Any:
        if not self.rate:
            return x
        index = next(self.dropouts)
        return Dropout(self.rate, index, dtype=self.dtype_policy, name=f"dropout_{index}")(x)

    def added(self, x: Any, branch: Any) -> Any:
        return keras.layers.Add(dtype=self.dtype_policy)([x, self.dropped(branch)])

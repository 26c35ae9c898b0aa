"""Multi-head self-attention whose weights start as the model says and whose dropout holds no generator.

Keras' own `MultiHeadAttention` gives copies of one initializer to all of its kernels: a seeded one starts queries, keys
and values with the same numbers. Its dropout of attention weights draws from a generator, which replicas would share.
"""

from __future__ import annotations

import math
from typing import Any

import keras
from keras import ops

from models.dropout import Dropout
from models.initializers import GlorotUniform

NUM_KERNELS = 4  # query, key, value, output


@keras.saving.register_keras_serializable("models")
class SelfAttention(keras.Layer):
    """Scaled dot-product attention of each position to all positions, in several heads.

    Args:
        heads: divides the inputs' last size.
        dropout: share of the attention weights dropped in training, from 0 up to but without 1.
        seed: of the initial weights.
        first_index: the kernels are the model's `first_index`-th variable and the three next ones (`GlorotUniform`).
        layer_index: of the dropout (`models.dropout`).

    Raises:
        ValueError: on the first call, when `heads` does not divide the inputs' last size.

    Thread-safety: stateless once built; replicas may call one layer at once.
    Source: Vaswani et al. 2017.
    """

    def __init__(
        self, heads: int, dropout: float, *, seed: int, first_index: int, layer_index: int, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.heads = heads
        self.seed = seed
        self.first_index = first_index
        self.dropout = Dropout(dropout, layer_index, dtype=self.dtype_policy, name="dropout")

    def build(self, input_shape: tuple[int, ...]) -> None:
        width = input_shape[-1]
        if width % self.heads:
            raise ValueError(f"heads must divide the width {width}; got {self.heads}.")
        # A bias of the keys adds one number to all of a query's scores, which the softmax takes out again: it would
        # have no true gradient, and Adam would turn the rounding error it has instead into whole steps. Queries and
        # values go without as well: the normalization before them has a shift of its own.
        self.query, self.key, self.value = (
            self._dense(width, index, name, use_bias=False) for index, name in enumerate(("query", "key", "value"))
        )
        self.output_dense = self._dense(width, 3, "output", use_bias=True)
        for dense in (self.query, self.key, self.value, self.output_dense):
            dense.build(input_shape)
        self.built = True

    def call(self, inputs: Any, training: bool = False) -> Any:
        """inputs: [batch, positions, width]; the result has the same shape."""
        _, positions, width = inputs.shape
        split = (-1, positions, self.heads, width // self.heads)
        # [batch, heads, positions, width // heads]
        query, key, value = (
            ops.transpose(ops.reshape(dense(inputs), split), (0, 2, 1, 3))
            for dense in (self.query, self.key, self.value)
        )
        scores = ops.matmul(query * (1 / math.sqrt(width // self.heads)), ops.transpose(key, (0, 1, 3, 2)))
        weights = self.dropout(ops.softmax(scores, axis=-1), training=training)
        mixed = ops.transpose(ops.matmul(weights, value), (0, 2, 1, 3))
        return self.output_dense(ops.reshape(mixed, (-1, positions, width)))

    def compute_output_shape(self, input_shape: tuple[int, ...]) -> tuple[int, ...]:
        return input_shape

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "heads": self.heads,
            "dropout": self.dropout.rate,
            "seed": self.seed,
            "first_index": self.first_index,
            "layer_index": self.dropout.layer_index,
        }

    def _dense(self, width: int, index: int, name: str, *, use_bias: bool) -> keras.Layer:
        return keras.layers.Dense(
            width,
            use_bias=use_bias,
            kernel_initializer=GlorotUniform(self.seed, self.first_index + index),
            dtype=self.dtype_policy,
            name=name,
        )

"""Where a patch stands, learned: attention by itself sees a set."""

from __future__ import annotations

from typing import Any

import keras

from models.initializers import GlorotUniform


@keras.saving.register_keras_serializable("models")
class PositionEmbedding(keras.Layer):
    """Adds a learned vector to each position of [batch, positions, width], the same in every sample.

    Args:
        seed, index: of the initial values (`GlorotUniform`).

    Thread-safety: stateless once built; replicas may call one layer at once.
    """

    def __init__(self, seed: int, index: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.seed = seed
        self.index = index

    def build(self, input_shape: tuple[int, ...]) -> None:
        initial = GlorotUniform(self.seed, self.index)
        self.embedding = self.add_weight(shape=input_shape[1:], initializer=initial, name="embedding")
        self.built = True

    def call(self, inputs: Any) -> Any:
        return inputs + self.embedding

    def compute_output_shape(self, input_shape: tuple[int, ...]) -> tuple[int, ...]:
        return input_shape

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "seed": self.seed, "index": self.index}

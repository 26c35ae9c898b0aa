"""The models as a Keras user writes them: stock layers, channels last, on whichever backend Keras has."""

from __future__ import annotations

from typing import Any

import keras
from cases import LEARNING_RATE, NUM_CLASSES, Case
from keras import layers, ops


def build(case: Case) -> keras.Model:
    """The case's model, from [batch, height, width, channels] to logits."""
    return {"mlp": mlp, "cnn": cnn, "transformer": transformer}[case.model.name](case)


def compiled(case: Case) -> keras.Model:
    """The same, ready for `fit`."""
    model = build(case)
    model.compile(
        optimizer=keras.optimizers.SGD(LEARNING_RATE),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return model


def mlp(case: Case) -> keras.Model:
    hidden = [layers.Dense(units, activation="relu") for units in case.model.hidden]
    return keras.Sequential([keras.Input(case.input_shape), layers.Flatten(), *hidden, layers.Dense(NUM_CLASSES)])


def cnn(case: Case) -> keras.Model:
    options = case.model
    normalized = options.normalization == "batch"
    stack = [keras.Input(case.input_shape)]
    for filters in options.filters:
        stack.append(layers.Conv2D(filters, 3, padding="same", use_bias=not normalized))
        if normalized:
            stack.append(layers.BatchNormalization(momentum=0.9))
        stack += [layers.Activation("relu"), layers.MaxPooling2D(2)]
    stack.append(layers.Flatten())
    if options.dropout:
        stack.append(layers.Dropout(options.dropout))
    return keras.Sequential([*stack, layers.Dense(NUM_CLASSES)])


def transformer(case: Case) -> keras.Model:
    options = case.model
    height, width, channels = case.input_shape
    rows, columns, side = height // options.patch, width // options.patch, options.patch
    images = keras.Input(case.input_shape)
    x = layers.Reshape((rows, side, columns, side * channels))(images)
    x = layers.Reshape((rows * columns, side * side * channels))(layers.Permute((1, 3, 2, 4))(x))
    x = Positions()(layers.Dense(options.width, use_bias=False)(x))
    for _ in range(options.depth):
        x = x + attended(layers.LayerNormalization()(x), options)
        inner = layers.Dense(4 * options.width, activation="gelu")(layers.LayerNormalization()(x))
        x = x + layers.Dense(options.width)(inner)
    x = layers.GlobalAveragePooling1D()(layers.LayerNormalization()(x))
    return keras.Model(images, layers.Dense(NUM_CLASSES)(x))


def attended(x: Any, options: Any) -> Any:
    """Self-attention with a bias of the output alone; `keras.layers.MultiHeadAttention` has them all or none."""
    split = (-1, x.shape[1], options.heads, options.width // options.heads)
    query, key, value = (ops.reshape(layers.Dense(options.width, use_bias=False)(x), split) for _ in range(3))
    mixed = ops.dot_product_attention(query, key, value)
    return layers.Dense(options.width)(ops.reshape(mixed, (-1, x.shape[1], options.width)))


class Positions(layers.Layer):
    """Adds a learned vector to each position."""

    def build(self, input_shape: tuple[int, ...]) -> None:
        self.embedding = self.add_weight(shape=input_shape[1:], initializer="random_normal")

    def call(self, inputs: Any) -> Any:
        return inputs + self.embedding

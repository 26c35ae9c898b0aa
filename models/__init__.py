"""Keras models from options, with initial weights and random numbers that are the same bits on every backend.

Importing this package imports nothing: Keras fixes its backend when it is first imported, and that is the caller's
choice to make (`KERAS_BACKEND`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import keras


def build(
    options: Any, *, input_shape: Sequence[int], num_classes: int, seed: int, dtype_policy: Any = None
) -> keras.Model:
    """Build the model that `options.name` names; its variables exist and hold their initial values.

    Args:
        options: `name` and what the model itself takes.
        input_shape: of one sample, without the batch.
        seed: of initial weights and of nothing else; random numbers in a call come with its key (`models.dropout`).
        dtype_policy: every layer's: a keras.DTypePolicy, a name such as "mixed_bfloat16", or None for Keras' own.

    Returns:
        A model from [batch, *input_shape] to logits [batch, num_classes], in the compute dtype of the policy.

    Raises:
        ValueError: an unknown name or option.

    Thread-safety: call it from one thread at a time; Keras keeps global state while a model is built.
    """
    # Here, not at the top: importing any of these imports Keras.
    from models import cnn, linear, mlp, transformer

    builders = {"linear": linear.build, "mlp": mlp.build, "cnn": cnn.build, "transformer": transformer.build}
    if options.name not in builders:
        raise ValueError(f"model must be one of {', '.join(builders)}; got '{options.name}'.")
    return builders[options.name](options, tuple(input_shape), num_classes, seed, dtype_policy)

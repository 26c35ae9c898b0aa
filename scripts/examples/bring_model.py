"""Models of your own: python -m trainer model._target_=bring_model.keras_model, or =bring_model.torch_module.

Both are called with `input_shape` (of one sample, channels last), `num_classes`, `seed`, `dtype_policy` and what
`+model.arguments.KEY=VALUE` adds, and return a model that gives logits.
"""

from __future__ import annotations

from typing import Any


def keras_model(
    *, input_shape: tuple[int, ...], num_classes: int, seed: int, dtype_policy: Any, width: int = 48
) -> Any:
    """A Keras model runs under both strategies. Only float32 variables: use models.dropout.Dropout for dropout."""
    import keras

    from models.initializers import GlorotUniform

    return keras.Sequential(
        [
            keras.Input(input_shape),
            keras.layers.Flatten(dtype=dtype_policy),
            keras.layers.Dense(width, "gelu", kernel_initializer=GlorotUniform(seed, 0), dtype=dtype_policy),
            keras.layers.LayerNormalization(dtype=dtype_policy),
            keras.layers.Dense(num_classes, kernel_initializer=GlorotUniform(seed, 1), dtype=dtype_policy),
        ]
    )


def torch_module(
    *, input_shape: tuple[int, ...], num_classes: int, seed: int, dtype_policy: Any, width: int = 16
) -> Any:
    """A plain module, under strategy=threads. Images come channels first; nn.Dropout draws derived random numbers."""
    import torch
    from torch import nn

    torch.manual_seed(seed)
    height, columns, channels = input_shape
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Flatten(),
        nn.Linear(width * height * columns, num_classes),
    )

"""`model.fit` in two calls: its first step, and so many epochs."""

from __future__ import annotations

from collections.abc import Callable

import keras
from cases import Case


def fitted(model: keras.Model, case: Case, batch_size: int) -> tuple[Callable[[], float], Callable[[int], float], int]:
    """What takes the first step, what trains for a number of epochs, and the steps of an epoch.

    Args:
        batch_size: of all replicas together.
    """
    arrays = case.load()
    steps = len(arrays.train_x) // batch_size
    # Whole batches only: a short one would be a step of another size, and another traced function.
    x, y = arrays.train_x[: steps * batch_size], arrays.train_y[: steps * batch_size]

    def first() -> float:
        return train(1, batch_size)

    def train(epochs: int, samples: int = len(x)) -> float:
        history = model.fit(x[:samples], y[:samples], batch_size=batch_size, epochs=epochs, verbose=0)
        return float(history.history["loss"][-1])

    return first, train, steps

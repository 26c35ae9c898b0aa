"""A Keras dtype policy that asks: every layer's compute dtype is the mode that its caller is in, call by call."""

from __future__ import annotations

from collections.abc import Callable

import keras


class AskingPolicy(keras.DTypePolicy):  # type: ignore[misc]
    """Variables are float32; the compute dtype is what `current` says when a layer is called, float32 where it is None.

    A captured graph keeps what was said while it was captured.

    Thread-safety: that of `current`.
    """

    def __init__(self, current: Callable[[], str | None]) -> None:
        # The name decides that inputs are cast to the compute dtype; the two properties below say what it is.
        super().__init__("mixed_bfloat16")
        self._current = current

    @property
    def compute_dtype(self) -> str:
        return self._current() or "float32"

    @property
    def variable_dtype(self) -> str:
        return "float32"

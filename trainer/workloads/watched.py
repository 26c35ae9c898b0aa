"""A source of random numbers that remembers, for the audit, what a step drew from it."""

from __future__ import annotations

from typing import Any

from keras import ops

from models.random import Source
from trainer.state.random_numbers import Drawn

Tensor = Any  # of the backend


class Watched:
    """A source of random numbers that remembers what was drawn from it."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.draws: list[Drawn] = []
        self._first: Tensor = None

    def bits(self, *, layer_index: int, num_elements: int, batch: int | None) -> Tensor:
        drawn = self._source.bits(layer_index=layer_index, num_elements=num_elements, batch=batch)
        if self._first is None:
            self._first = drawn
        self.draws.append(Drawn(layer_index, num_elements, batch))
        return drawn

    def words(self) -> Tensor:
        """The row's random words: float32 [2]."""
        if self._first is None:
            return -ops.ones((2,))
        words = ops.stack([self._first[0, 0], self._first[-1, 0]])
        return ops.cast(ops.right_shift(words, 8), "float32")

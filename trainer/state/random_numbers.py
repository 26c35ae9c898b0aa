"""Random numbers from one generator that all replicas share; derived ones need none (`models/random.py`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Drawn(NamedTuple):
    """One draw of a step."""

    layer_index: int
    num_elements: int
    batch: int | None


class Generated:
    """Unsafe: whoever asks next gets the generator's next words.

    Args:
        draw: 32-bit words from the generator, int64 of the shape given.

    Thread-safety: the generator's. PyTorch's is locked for each draw: no two replicas get the same words, but which
    ones depends on who comes first.
    """

    def __init__(self, draw: Callable[[tuple[int, int]], Any]) -> None:
        self._draw = draw

    def bits(self, *, layer_index: int, num_elements: int, batch: int | None) -> Any:
        assert batch is not None, "a generator needs to know how many samples to draw for"
        return self._draw((batch, num_elements))

"""Calls of a layer: made in whatever mode the caller finds or is told to use, and counted."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

import keras
import numpy as np

from trainer.state.precision import PrecisionHolder

UNITS = 4
MODES = ("float32", "bfloat16", "float16")


class Call(NamedTuple):
    """One call.

    Attributes:
        asked: the mode that the caller is to compute in; None for none.
        found: the mode that it computed in, found or passed; None where none was on.
        computed: the dtype of what came out.
        first: whether it was made as the first call.
    """

    asked: str | None
    found: str | None
    computed: str
    first: bool = False

    @property
    def wrong(self) -> bool:
        """Whether the mode was another; what came out may be as asked all the same, as in no mode and in float32."""
        return self.found != self.asked

    @property
    def off(self) -> bool:
        return self.computed != (self.asked or "float32")


class Layer:
    """A dense layer in each compute dtype.

    Thread-safety: calls change nothing, so that any number of threads may make them.
    """

    def __init__(self) -> None:
        policies = {mode: mode if mode == "float32" else f"mixed_{mode}" for mode in MODES}
        self._layers = {mode: keras.layers.Dense(UNITS, dtype=policy) for mode, policy in policies.items()}
        self._x = np.ones((1, UNITS), np.float32)
        for mode in MODES:
            self.computed(mode)  # so that they are built before there are threads

    def computed(self, mode: str | None) -> str:
        """The dtype of what a call in this mode gives."""
        return str(keras.backend.standardize_dtype(self._layers[mode or "float32"](self._x).dtype))


class Caller:
    """Makes calls as Sonnet's decorator does: asks for the mode once, and computes in that.

    Args:
        holder: asked for the mode; None where the dtype is an argument of every call.
    """

    def __init__(self, layer: Layer, holder: PrecisionHolder | None) -> None:
        self._layer, self._holder = layer, holder

    def call(self, asked: str | None) -> Call:
        """A call that is to be made in a mode."""
        found = asked if self._holder is None else self._holder.current()
        return Call(asked, found, self._layer.computed(found))

    def passed(self, dtype: str, *, first: bool) -> Call:
        """A call that is told its dtype."""
        return Call(dtype, dtype, self._layer.computed(dtype), first)


@dataclass
class Tally:
    """One replica's calls, counted by its own thread.

    Attributes:
        calls: alike ones, and how often.
        seen_at: the first step of each.
        wrong: the steps at which its call found another mode.
        firsts: the steps at which it made the first call.
    """

    calls: Counter[Call] = field(default_factory=Counter)
    seen_at: dict[Call, int] = field(default_factory=dict)
    wrong: list[int] = field(default_factory=list)
    firsts: list[int] = field(default_factory=list)

    def add(self, step: int, call: Call) -> None:
        self.calls[call] += 1
        self.seen_at.setdefault(call, step)
        if call.wrong:
            self.wrong.append(step)
        if call.first:
            self.firsts.append(step)

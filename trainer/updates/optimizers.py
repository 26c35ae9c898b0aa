"""Optimizers as pure rules: from a gradient and the slots it meets to what is to be added to weights and slots.

A rule uses array operators only, so one implementation serves torch and TensorFlow tensors and NumPy arrays. Everything
is said as a delta because that is what an update mode adds: the same write then raises the canaries. Padding and
canaries between the values pass through the rule as well; their results are finite and are put right afterwards
(`Layout.canary_sources`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

Array = Any  # a torch or TensorFlow tensor or a NumPy array, float32


class Optimizer(Protocol):
    slots: ClassVar[tuple[str, ...]]
    counts: ClassVar[bool]  # whether the rule needs to know how many updates came before
    proportional: ClassVar[bool]  # whether all that it does is multiply the gradient by a constant

    def delta(self, gradient: Array, slots: Sequence[Array], iterations: Array | None) -> tuple[Array, ...]:
        """What to add to the weights, and then to each slot.

        Args:
            gradient: float32 [n].
            slots: one float32 [n] for each of `self.slots`.
            iterations: float32 [1], updates before this one, where `counts`.

        Thread-safety: pure.
        """


@dataclass(frozen=True)
class Sgd:
    slots: ClassVar[tuple[str, ...]] = ()
    counts: ClassVar[bool] = False
    proportional: ClassVar[bool] = True
    learning_rate: float

    def delta(self, gradient: Array, slots: Sequence[Array], iterations: Array | None) -> tuple[Array, ...]:
        return (gradient * -self.learning_rate,)


@dataclass(frozen=True)
class Momentum:
    """Heavy ball, as `keras.optimizers.SGD(momentum=...)`: velocity = momentum * velocity - rate * gradient."""

    slots: ClassVar[tuple[str, ...]] = ("velocity",)
    counts: ClassVar[bool] = False
    proportional: ClassVar[bool] = False
    learning_rate: float
    momentum: float

    def delta(self, gradient: Array, slots: Sequence[Array], iterations: Array | None) -> tuple[Array, ...]:
        (velocity,) = slots
        new = velocity * self.momentum - gradient * self.learning_rate
        return new, new - velocity


@dataclass(frozen=True)
class Adam:
    """As `keras.optimizers.Adam`: epsilon outside the root, bias correction folded into the rate.

    Source: Kingma and Ba 2015, section 2, last paragraph.
    """

    slots: ClassVar[tuple[str, ...]] = ("mean", "variance")
    counts: ClassVar[bool] = True
    proportional: ClassVar[bool] = False
    learning_rate: float
    beta_1: float
    beta_2: float
    epsilon: float

    def delta(self, gradient: Array, slots: Sequence[Array], iterations: Array | None) -> tuple[Array, ...]:
        assert iterations is not None
        mean, variance = slots
        step = iterations + 1.0
        rate = self.learning_rate * (1.0 - self.beta_2**step) ** 0.5 / (1.0 - self.beta_1**step)
        mean_delta = (gradient - mean) * (1.0 - self.beta_1)
        variance_delta = (gradient * gradient - variance) * (1.0 - self.beta_2)
        weights_delta = (mean + mean_delta) * -rate / ((variance + variance_delta) ** 0.5 + self.epsilon)
        return weights_delta, mean_delta, variance_delta


def build(options: Any) -> Optimizer:
    """The optimizer that an `optimizer` option asks for."""
    match options.name:
        case "sgd":
            return Sgd(options.learning_rate)
        case "momentum":
            return Momentum(options.learning_rate, options.momentum)
        case "adam":
            return Adam(options.learning_rate, options.beta_1, options.beta_2, options.epsilon)
    raise ValueError(f"no optimizer is called {options.name!r}")

"""What a step needs of a model, whoever built it: its initial values, and a call that is a pure function of them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import keras
from keras import ops

from trainer.state.layout import Floats
from trainer.state.precision import PrecisionHolder

Tensor = Any  # of the backend


@dataclass(frozen=True)
class Named:
    """One variable's name, and its value before the first update: float32."""

    name: str
    value: Floats


class Network(Protocol):
    @property
    def precision(self) -> PrecisionHolder:
        """Who holds the mode that its layers ask for."""

    @property
    def weights(self) -> Sequence[Named]: ...

    @property
    def statistics(self) -> Sequence[Named]: ...

    def call(
        self,
        weights: Sequence[Tensor],
        statistics: Sequence[Tensor],
        x: Tensor,
        *,
        training: bool,
        compute_dtype: str | None,
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """Logits [batch, classes] in the compute dtype, and the statistics after the call.

        Args:
            compute_dtype: what to compute in; None for the mode that the caller is in.

        Thread-safety: read-only, so replicas may call it at once; but it may be traced by one thread at a time.
        """


class KerasNetwork:
    """A Keras model, through `stateless_call`.

    Args:
        models: for each compute dtype that may be passed the model that computes in it; all start alike.

    Raises:
        TypeError: the model has a variable that is not float32, which the flat vector cannot hold.
    """

    def __init__(self, models: Mapping[str | None, keras.Model], precision: PrecisionHolder) -> None:
        self._models = models
        self.precision = precision
        model = next(iter(models.values()))
        # A subclass of a user's need not: then it is the same in training and inference.
        parameters = inspect.signature(model.call).parameters.values()
        self._takes_training = any(each.name == "training" or each.kind == each.VAR_KEYWORD for each in parameters)
        for variable in model.variables:
            if variable.dtype != "float32":
                hint = " Use models.dropout.Dropout, which needs no state." if "seed" in variable.path else ""
                raise TypeError(
                    f"variable {variable.path} is {variable.dtype}; shared variables have to be float32.{hint}"
                )
        self.weights: Sequence[Named] = [_named(variable) for variable in model.trainable_variables]
        self.statistics: Sequence[Named] = [_named(variable) for variable in model.non_trainable_variables]

    def call(
        self,
        weights: Sequence[Tensor],
        statistics: Sequence[Tensor],
        x: Tensor,
        *,
        training: bool,
        compute_dtype: str | None,
    ) -> tuple[Tensor, Sequence[Tensor]]:
        told = {"training": training} if self._takes_training else {}
        logits, after = self._models[compute_dtype].stateless_call(weights, statistics, x, **told)
        return logits, after


def _named(variable: keras.Variable) -> Named:
    return Named(variable.path, ops.convert_to_numpy(variable.value))

"""A user's own `torch.nn.Module` under `strategy=threads`.

The module is called while the step is captured and at evaluations, by the main thread, and never by a replica: several
threads that call one module through `functional_call` swap each other's parameters in and out. Replicas run the
captured graph, which has no module in it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from models.dropout import Dropout
from trainer.workloads.networks import Named


class TorchNetwork:
    """A module of float32 parameters; its floating-point buffers are statistics, as those of batch normalization.

    Images come to it as [batch, channels, height, width]. `nn.Dropout` draws its mask from our derived random numbers
    instead of torch's process-wide generator.

    Args:
        precision: float32, or mixed_bfloat16, which is `torch.autocast` round the module.

    Raises:
        TypeError: not a module, or one of its parameters is not float32.
    """

    def __init__(self, module: torch.nn.Module, precision: str) -> None:
        if not isinstance(module, torch.nn.Module):
            raise TypeError(f"a keras.Model or a torch.nn.Module is needed; got {type(module).__name__}.")
        self._module = module
        self._mixed = precision == "mixed_bfloat16"
        for name, parameter in module.named_parameters():
            if parameter.dtype != torch.float32:
                raise TypeError(f"parameter {name} is {parameter.dtype}; shared variables have to be torch.float32.")
        buffers = dict(module.named_buffers())
        shared = {name: buffer for name, buffer in buffers.items() if buffer.dtype == torch.float32}
        # Counts of batches and index tables: the same for all replicas, and nothing here depends on them changing.
        self._fixed = {name: buffer for name, buffer in buffers.items() if name not in shared}
        self.weights: Sequence[Named] = [_named(name, parameter) for name, parameter in module.named_parameters()]
        self.statistics: Sequence[Named] = [_named(name, buffer) for name, buffer in shared.items()]

    def call(
        self, weights: Sequence[Tensor], statistics: Sequence[Tensor], x: Tensor, *, training: bool
    ) -> tuple[Tensor, Sequence[Tensor]]:
        after = [statistic.clone() for statistic in statistics]  # the module writes to its buffers in place
        state = dict(zip((named.name for named in self.weights), weights, strict=True))
        state.update(zip((named.name for named in self.statistics), after, strict=True))
        state.update({name: buffer.clone() for name, buffer in self._fixed.items()})
        if x.ndim == 4:
            x = x.permute(0, 3, 1, 2)
        self._module.train(training)
        with _DerivedDropout(), torch.autocast("cpu", torch.bfloat16, enabled=self._mixed):
            logits = torch.func.functional_call(self._module, state, (x,))
        return logits, after


class _DerivedDropout(TorchFunctionMode):
    """Gives `torch.nn.functional.dropout` a mask from the key of the call, one layer index for each call in order."""

    def __init__(self) -> None:
        super().__init__()
        self._layers = itertools.count()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.nn.functional.dropout:
            return self._dropout(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _dropout(self, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        masked: Tensor = Dropout(p, next(self._layers)).call(x, training=training)
        return masked


def _named(name: str, tensor: Tensor) -> Named:
    return Named(name, tensor.detach().numpy().copy())

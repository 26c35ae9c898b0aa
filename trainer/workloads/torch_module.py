"""A user's own `torch.nn.Module` under `strategy=threads`.

Several threads that call one module through `functional_call` swap each other's parameters in and out, so each thread
that calls it has a copy. Where steps are captured only the main thread does: the captured graph has no module in it.
"""

from __future__ import annotations

import copy
import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from models.dropout import Dropout
from trainer.state.precision import PrecisionHolder, Runner, ThreadLocal
from trainer.workloads.networks import Named


class TorchNetwork:
    """A module of float32 parameters; its floating-point buffers are statistics, as those of batch normalization.

    Images come to it as [batch, channels, height, width]. `nn.Dropout` draws its mask from our derived random numbers
    instead of torch's process-wide generator.

    Layers compute under `torch.autocast`, in the dtype that is passed or that the precision holder says. Where the mode
    is thread-local it is autocast's own, which PyTorch keeps for each thread.

    Raises:
        TypeError: not a module, or one of its parameters is not float32.
    """

    def __init__(self, module: torch.nn.Module, precision: PrecisionHolder) -> None:
        if not isinstance(module, torch.nn.Module):
            raise TypeError(f"a keras.Model or a torch.nn.Module is needed; got {type(module).__name__}.")
        self._module = module
        self._copies = threading.local()
        self._copies.module = module  # main's; nothing can be copied while a step is captured
        self.precision = NativeAutocast() if isinstance(precision, ThreadLocal) else precision
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
        self,
        weights: Sequence[Tensor],
        statistics: Sequence[Tensor],
        x: Tensor,
        *,
        training: bool,
        compute_dtype: str | None,
    ) -> tuple[Tensor, Sequence[Tensor]]:
        after = [statistic.clone() for statistic in statistics]  # the module writes to its buffers in place
        state = dict(zip((named.name for named in self.weights), weights, strict=True))
        state.update(zip((named.name for named in self.statistics), after, strict=True))
        state.update({name: buffer.clone() for name, buffer in self._fixed.items()})
        if x.ndim == 4:
            x = x.permute(0, 3, 1, 2)
        module = self._own_module()
        module.train(training)
        # Autocast round the call says what was passed or what the holder says; autocast's own mode is there already.
        native = compute_dtype is None and isinstance(self.precision, NativeAutocast)
        scope = nullcontext() if native else _autocast(compute_dtype or self.precision.current() or "float32")
        with _DerivedDropout(), scope:
            logits = torch.func.functional_call(module, state, (x,))
        return logits, after

    def _own_module(self) -> torch.nn.Module:
        """The calling thread's copy."""
        if not hasattr(self._copies, "module"):
            self._copies.module = copy.deepcopy(self._module)
        module: torch.nn.Module = self._copies.module
        return module


class NativeAutocast:
    """`torch.autocast` itself as the holder: its mode is the calling thread's, and new threads have none.

    Attributes:
        settings: what `enable` changes, as `trainer/state/settings.py` calls it.
    """

    settings = ("torch autocast", "torch autocast dtype", "torch autocast cache")

    def current(self) -> str | None:
        return str(torch.get_autocast_dtype("cpu")).removeprefix("torch.") if torch.is_autocast_enabled("cpu") else None

    def scope(self, dtype: str) -> AbstractContextManager[None]:
        return _autocast(dtype)

    def enable(self, dtype: str | None) -> None:
        enabled = dtype not in (None, "float32")
        torch.set_autocast_enabled("cpu", enabled)
        # A cast that it kept would be used for as long as it is on, whatever becomes of the weights.
        torch.set_autocast_cache_enabled(False)
        if enabled:
            torch.set_autocast_dtype("cpu", getattr(torch, str(dtype)))

    def hand_over(self) -> Runner:
        return lambda function: function()

    def clear(self) -> None:
        # No more than that: where nobody has enabled a mode, the cache is as it was.
        torch.set_autocast_enabled("cpu", False)


def _autocast(dtype: str) -> AbstractContextManager[None]:
    # Without its cache, which would keep a cast of every step's weights as long as the scope lasts.
    enabled = dtype != "float32"
    return torch.autocast("cpu", getattr(torch, dtype) if enabled else None, enabled=enabled, cache_enabled=False)


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

"""Capture a PyTorch function once as one flat graph, and run it without the interpreter.

`make_fx` records every operator that the step calls, the backward pass included. The graph is compiled as TorchScript,
whose interpreter runs it in one call that does not hold the GIL: that is what lets replicas in threads run at the same
time. The captured step has the same bits as the step run eagerly.

TorchScript is deprecated upstream; when it cannot take a graph, the graph runs operator by operator from Python
(`engine=fx`): the same operators, so the same bits, but replicas take turns at the GIL between them.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.fx.experimental.proxy_tensor import make_fx

if TYPE_CHECKING:
    from trainer.engines.compiler import Compiler

log = logging.getLogger(__name__)

WARM_UP_CALLS = 3  # TorchScript's profiling executor settles on its plan in the first two


@dataclass(frozen=True)
class Captured:
    """A captured function.

    Thread-safety: any number of threads may call it.
    """

    call: Callable[..., Any]
    engine: str  # torchscript, inductor or fx

    def __call__(self, *args: Any) -> Any:
        """The same as `call`, also where the calling thread is in a precision mode."""
        with _without_mode():
            return self.call(*args)


def capture(function: Callable[..., Any], *example: torch.Tensor, compiler: Compiler | None = None) -> Captured:
    """Capture a pure function of tensors for inputs of the example's shapes.

    Args:
        compiler: makes a library of it (`engine=inductor`), where one is to be had.

    Call it from one thread at a time, before replicas start: `make_fx` keeps process-wide state.
    """
    with torch.no_grad():
        # Through a lambda: the function's own annotations would end up in the graph, where TorchScript trips over them.
        graph = make_fx(lambda *inputs: function(*inputs))(*example)
        with _without_mode():
            captured = _compiled(compiler, function.__qualname__, graph, example) or _scripted(graph)
            for _ in range(WARM_UP_CALLS):
                captured(*example)
    return captured


def _without_mode() -> torch.autocast:
    """A graph has the casts of the mode it was captured in; TorchScript would add those of one that is on, for good."""
    return torch.autocast("cpu", enabled=False)


def _compiled(
    compiler: Compiler | None, name: str, graph: torch.fx.GraphModule, example: tuple[torch.Tensor, ...]
) -> Captured | None:
    if compiler is None:
        return None
    # Here, for only `engine=inductor` needs it.
    from trainer.engines.library import CannotCompile

    try:
        return Captured(compiler.compile(name, graph, example), "inductor")
    except CannotCompile as error:
        log.warning("The captured step runs as TorchScript, not as a compiled library: %s", error)
        return None


def _scripted(graph: torch.fx.GraphModule) -> Captured:
    _keep_addmm_whole(graph.graph)
    for node in graph.graph.nodes:
        # TorchScript resolves overloads by itself and cannot name them.
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            node.target = node.target.overloadpacket
    graph.graph.lint()
    graph.recompile()
    try:
        with warnings.catch_warnings():
            # The deprecation is known (above); the rest is about annotations of `GraphModule` itself.
            warnings.filterwarnings("ignore", message=r".*torch\.jit.*", category=DeprecationWarning)
            warnings.filterwarnings("ignore", message=r"The TorchScript type system doesn't support instance-level")
            warnings.filterwarnings("ignore", message=r"`torch\.jit\.\w+` is deprecated")
            return Captured(torch.jit.freeze(torch.jit.script(graph.eval())), "torchscript")
    except RuntimeError as error:
        log.warning("TorchScript cannot take the captured step; it runs operator by operator instead: %s", error)
        return Captured(graph, "fx")


def _keep_addmm_whole(graph: torch.fx.Graph) -> None:
    """Say `linear` for `addmm`, which it calls: TorchScript would make a product and a sum of that, and round twice."""
    aten = torch.ops.aten
    for node in list(graph.nodes):
        if node.target is aten.addmm.default and len(node.args) == 3 and not node.kwargs:
            bias, left, right = node.args
            if bias.meta["val"].ndim != 1:
                continue  # `linear` adds a bias a column only
            with graph.inserting_before(node):
                turned = graph.call_function(aten.t.default, (right,))
                whole = graph.call_function(aten.linear.default, (left, turned, bias))
            node.replace_all_uses_with(whole)
            graph.erase_node(node)

"""A captured graph as TorchScript source and the constants it takes: data that can be kept, compared and read again.

TorchScript is deprecated upstream, and is what runs a graph without the interpreter with the same bits and no compiler.
Written out, one line an operator, a graph has a digest of its content, and a file of it is text.

Text from a file is held to computing. Names in it are looked up in `_NAMES` and nowhere else, so it calls operators of
PyTorch and no Python; and of these none that takes the name of a file (`aten::from_file` maps and makes one) or gives
nothing back (`aten::save` writes one), and no branches, loops or calls, which no graph has.
"""

from __future__ import annotations

import hashlib
import json
import math
import operator
import re
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FORMAT = 1
# What a compiled graph is made of besides operators.
_PLAIN = frozenset(
    f"prim::{kind}"
    for kind in ("Constant", "ListConstruct", "TupleConstruct", "TupleIndex", "TupleUnpack", "ListUnpack")
)
_WORD = re.compile(r"[\w ,.>-]*")


class ScriptError(ValueError):
    """A graph cannot be written as TorchScript source, or source cannot be used; the caller has to do without."""


@dataclass(frozen=True)
class Script:
    """A captured function.

    Attributes:
        symbol: what the source calls it.
        source: TorchScript, UTF-8.
        constants: what it takes after its inputs.
        inputs: dtype and shape of each input that it was captured for; none where they are not known.
    """

    symbol: str
    source: str
    constants: tuple[Tensor, ...]
    inputs: tuple[tuple[str, tuple[int, ...]], ...] = ()


def write(graph: torch.fx.GraphModule, symbol: str = "step") -> Script:
    """A graph that `make_fx` has captured, in TorchScript.

    Raises:
        ScriptError: it has something that cannot be written.
    """
    writer = _Writer(graph)
    for node in graph.graph.nodes:
        writer.add(node)
    parameters = ", ".join([*writer.inputs, *writer.constants.values()])
    source = "\n".join([f"def {symbol}({parameters}):", *writer.lines, ""])
    constants = tuple(_constant(graph, target) for target in writer.constants)
    inputs = tuple(_like(node) for node in graph.graph.find_nodes(op="placeholder"))
    return Script(symbol, source, constants, inputs)


def load(script: Script) -> Callable[..., Any]:
    """The function: of the graph's inputs, with the same bits as the graph run operator by operator.

    Thread-safety: any number of threads may call it, and do not wait for each other at the interpreter's lock.

    Raises:
        ScriptError: the source is not what `write` writes.
    """
    unit = torch.jit.CompilationUnit()
    try:
        unit.define(script.source, _NAMES.get)
        function = getattr(unit, script.symbol)
    except (RuntimeError, AttributeError) as error:
        raise ScriptError(f"TorchScript cannot take the source: {_last_line(error)}") from error
    _hold_to_computing(function.graph)
    constants = script.constants
    return lambda *inputs: function(*inputs, *constants)


def digest(script: Script, versions: Mapping[str, str]) -> str:
    """SHA-256 of all that decides what a script computes, but not of what it is called: 64 hexadecimal digits.

    Args:
        versions: of whatever the same source may mean something else to.
    """
    about = {
        "format": FORMAT,
        "versions": dict(sorted(versions.items())),
        "inputs": script.inputs,
        "source": script.source.removeprefix(f"def {script.symbol}"),
        "constants": [(_name(each.dtype), each.shape) for each in script.constants],
    }
    hashed = hashlib.sha256(json.dumps(about).encode() + b"\n")
    for each in script.constants:
        hashed.update(bytes_of(each))
    return hashed.hexdigest()


def bytes_of(tensor: Tensor) -> bytes:
    """A tensor's elements, in the machine's byte order."""
    flat = tensor.detach().contiguous().reshape(-1)
    return bytes(flat.view(torch.uint8).numpy()) if flat.numel() else b""


class _Writer:
    """Writes the operators of a graph one after another, under names that its own do not matter for."""

    def __init__(self, graph: torch.fx.GraphModule) -> None:
        self._graph = graph
        self._names: dict[torch.fx.Node, str] = {}
        self.inputs: list[str] = []
        self.constants: dict[str, str] = {}  # attribute of the graph -> name
        self.lines: list[str] = []

    def add(self, node: torch.fx.Node) -> None:
        match node.op:
            case "placeholder":
                self._names[node] = f"x{len(self.inputs)}"
                self.inputs.append(self._names[node])
            case "get_attr":
                self._names[node] = self.constants.setdefault(str(node.target), f"c{len(self.constants)}")
            case "call_function":
                written = self._call(node)
                self._names[node] = f"v{len(self.lines)}"
                self.lines.append(f"    {self._names[node]} = {written}")
            case "output":
                self.lines.append(f"    return {self._literal(node.args[0])}")
            case other:
                raise ScriptError(f"a graph with {other} cannot be written")

    def _call(self, node: torch.fx.Node) -> str:
        target = node.target
        if target is operator.getitem:
            return f"{self._literal(node.args[0])}[{self._literal(node.args[1])}]"
        if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
            raise ScriptError(f"{target} is no operator that can be written")
        if target is torch.ops.aten.addmm.default and len(node.args) == 3 and not node.kwargs:
            bias, left, right = node.args
            # `linear` adds a bias a column only. TorchScript would make a product and a sum of `addmm`, rounded twice.
            if isinstance(bias, torch.fx.Node) and bias.meta["val"].ndim == 1:
                return f"aten.linear({self._literal(left)}, aten.t({self._literal(right)}), {self._literal(bias)})"
        # TorchScript resolves overloads by itself and cannot name them.
        name = target.overloadpacket.__name__
        arguments = [self._literal(each) for each in node.args]
        arguments += [f"{key}={self._literal(value)}" for key, value in node.kwargs.items()]
        return f"aten.{name}({', '.join(arguments)})"

    def _literal(self, value: object) -> str:
        match value:
            case torch.fx.Node():
                return self._names[value]
            case None | bool():
                return repr(value)
            case int() if -(2**63) <= value < 2**63:
                return repr(value)
            case float():
                return repr(value) if math.isfinite(value) else f"float('{value}')"
            case str() if _WORD.fullmatch(value):
                return repr(value)
            case torch.dtype() | torch.memory_format() | torch.layout():
                return str(value)
            case torch.device():
                return f"torch.device('{value}')"
            case list():
                return f"[{', '.join(map(self._literal, value))}]"
            case tuple():
                return f"({', '.join(map(self._literal, value))}{',' if len(value) == 1 else ''})"
        raise ScriptError(f"argument {value!r} cannot be written")


def _constant(graph: torch.fx.GraphModule, target: str) -> Tensor:
    found = operator.attrgetter(target)(graph)
    # Of another kind or in another order it would not come back as it is; and the order decides which kernel runs.
    if not isinstance(found, Tensor) or found.layout != torch.strided or not found.is_contiguous():
        raise ScriptError(f"constant {target} cannot be written")
    if found.is_quantized or found.device.type != "cpu":
        raise ScriptError(f"constant {target} cannot be written")
    return found.detach()


def _like(node: torch.fx.Node) -> tuple[str, tuple[int, ...]]:
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not all(type(size) is int for size in value.shape):
        raise ScriptError(f"input {node.name} is no tensor of a fixed shape")
    return _name(value.dtype), tuple(value.shape)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _hold_to_computing(graph: Any) -> None:
    """Refuse what `write` does not write, whoever has written it.

    Raises:
        ScriptError: the graph does something else than compute.
    """
    for node in graph.nodes():
        if node.kind() in _PLAIN:
            continue
        schema = torch._C.parse_schema(node.schema()) if node.kind().startswith("aten::") else None
        if schema is None or not schema.returns or any(each.name == "filename" for each in schema.arguments):
            raise ScriptError(f"the source calls {node.kind()}, which no captured step does")


def _names(names: Iterable[str]) -> types.ModuleType:
    """What a source finds in `torch`: TorchScript looks attributes up in modules only."""
    module = types.ModuleType("torch")
    for name in names:
        setattr(module, name, getattr(torch, name))
    return module


_DTYPES = [name for name, value in vars(torch).items() if isinstance(value, torch.dtype)]
_LAYOUTS = [name for name, value in vars(torch).items() if isinstance(value, torch.layout | torch.memory_format)]
_NAMES: dict[str, Any] = {"aten": torch.ops.aten, "torch": _names(["device", *_DTYPES, *_LAYOUTS])}


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__

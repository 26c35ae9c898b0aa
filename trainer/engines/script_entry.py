"""TorchScript source and its constants as an entry of the cache of compiled steps, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from trainer.cache.entry import GRAPH, Array, Entry
from trainer.engines.script_source import Script, ScriptError, bytes_of


def to_entry(
    script: Script, *, id: str, name: str, content: str, versions: Mapping[str, str], compile_seconds: float
) -> Entry:
    """An entry that `to_script` makes the same script of.

    Args:
        content: the script's digest under these versions.
    """
    arrays = [
        Array(str(each.dtype).removeprefix("torch."), tuple(each.shape), bytes_of(each)) for each in script.constants
    ]
    code = script.source.encode()
    return Entry(id, name, script.symbol, GRAPH, content, dict(versions), compile_seconds, code, tuple(arrays))


def to_script(entry: Entry) -> Script:
    """The script of an entry, but for its inputs' shapes, which only its digest needs.

    Raises:
        ScriptError: its arrays are none.
    """
    assert entry.kind == GRAPH, entry.kind
    return Script(entry.symbol, entry.code.decode(errors="replace"), tuple(map(_tensor, entry.arrays)))


def _tensor(array: Array) -> Tensor:
    dtype = getattr(torch, array.dtype, None)
    if not isinstance(dtype, torch.dtype) or math.prod(array.shape) * dtype.itemsize != len(array.data):
        raise ScriptError(f"{len(array.data)} bytes are no {array.dtype} of shape {array.shape}")
    if not array.data:
        return torch.empty(array.shape, dtype=dtype)
    flat = torch.frombuffer(bytearray(array.data), dtype=torch.uint8)
    # To memory of PyTorch's own: kernels may round otherwise where memory is aligned otherwise.
    return flat.view(dtype).reshape(array.shape).clone()

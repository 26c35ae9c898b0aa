"""What PyTorch's operators do to what they are given: what they write, what they are other names for, what they read.

Most of it is in PyTorch's own declarations of them; the rest stands here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# In place, element by element, and to the last bit the same whether all at once or in pieces.
ELEMENTWISE = frozenset(("add_", "sub_", "mul_", "div_", "neg_", "abs_", "lerp_", "addcmul_", "addcdiv_"))
# In place, and nothing of what was there before is left.
REPLACING = frozenset(("copy_", "fill_", "zero_", "normal_", "uniform_", "random_", "bernoulli_"))
# They look at what a tensor is like, not at its values.
LOOKING = frozenset(
    (
        *("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like"),
        *("new_empty", "new_zeros", "new_ones", "new_full", "new_empty_strided", "is_same_size"),
    )
)
# They read some elements only, and say which in other arguments.
SELECTING = frozenset(("index", "index_select", "gather", "take", "masked_select"))
# They write some elements only; from where each element is and the other arguments, where those are.
PUTTING: dict[str, Callable[..., Tensor]] = {
    "index_put_": lambda at, indices, *_: torch.ops.aten.index(at, indices),
    "masked_fill_": lambda at, mask, *_: at.masked_select(mask),
    "masked_scatter_": lambda at, mask, *_: at.masked_select(mask),
    "index_copy_": lambda at, dim, index, *_: at.index_select(dim, index),
    "index_fill_": lambda at, dim, index, *_: at.index_select(dim, index),
    "index_add_": lambda at, dim, index, *_: at.index_select(dim, index),
    "scatter_": lambda at, dim, index, *_: at.gather(dim, index),
    "scatter_add_": lambda at, dim, index, *_: at.gather(dim, index),
    "put_": lambda at, index, *_: at.take(index),
}
# Those of them that add to what is there, always or when they are told to.
ADDING = frozenset(("index_add_", "scatter_add_"))
ACCUMULATING = frozenset(("index_put_", "put_"))
# They write to arguments of which their declarations do not say so.
UNDECLARED = {"native_batch_norm": ("running_mean", "running_var")}
# No operators: they work on memory, or put other memory in its place.
HIDDEN = frozenset(
    (
        *("numpy", "__array__", "__dlpack__", "data_ptr", "untyped_storage", "storage", "_typed_storage"),
        *("set_", "share_memory_", "__set__"),
    )
)
# No operators either, but a copy does as well.
TELLING = frozenset(("tolist", "__repr__", "__format__", "__deepcopy__", "__reduce_ex__"))


@dataclass(frozen=True)
class Declared:
    """What PyTorch says of an operator.

    Attributes:
        written: the arguments that it writes to, by position or by name.
        outs: those of them that are given by `out=`.
        views: whether what it returns may be another name for what it was given.
        reshapes: whether it makes a tensor, in place, one of other elements.
    """

    name: str
    written: tuple[int | str, ...]
    outs: tuple[str, ...]
    views: bool
    reshapes: bool


@functools.cache
def declared(func: Any) -> Declared:
    schema, name = func._schema, str(func.overloadpacket.__name__)
    written = [
        argument.name if argument.kwarg_only else position
        for position, argument in enumerate(schema.arguments)
        if (argument.alias_info is not None and argument.alias_info.is_write)
        or argument.name in UNDECLARED.get(name, ())
    ]
    return Declared(
        name,
        tuple(written),
        tuple(argument.name for argument in schema.arguments if argument.is_out),
        any(each.alias_info is not None and not each.alias_info.is_write for each in schema.returns),
        torch.Tag.inplace_view in func.tags and name != "detach_",
    )

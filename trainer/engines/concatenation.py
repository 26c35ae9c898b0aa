"""Have AOTInductor's matrix products written straight into the concatenation that they are parts of.

A step's contribution is a concatenation of its gradients, each laid flat. AOTInductor writes what its own loops compute
into the concatenation at once, but not a matrix product that is laid flat: that one is made in a buffer and copied, one
more pass over all that a layer learns.

This stands on internals of PyTorch, whose version is pinned.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch._inductor import ir


@contextmanager
def products_in_place() -> Iterator[None]:
    """For the time of a compilation.

    Thread-safety: one thread at a time; it changes AOTInductor for the process.
    """
    own = ir.ConcatKernel.realize_into

    def realize_into(src: Any, dst: Any) -> Any:
        part, place = _product(src), _as_view(dst)
        if part is None or place is None or part.get_numel() != place.get_numel():
            return own(src, dst)
        layout = part.layout
        there = ir.FixedLayout(layout.device, layout.dtype, layout.size, layout.stride, place.layout.offset)
        part.layout = ir.NonOwningLayout(ir.ReinterpretView(data=place.data, layout=there))
        return part

    with mock.patch.object(ir.ConcatKernel, "realize_into", staticmethod(realize_into)):
        yield


def _product(src: Any) -> Any:
    """The operator that fills a buffer of its own, all of which, laid flat, is to be copied; None if it is not that."""
    view = src.data if isinstance(src, ir.TensorBox) else src
    if not isinstance(view, ir.ReinterpretView) or not isinstance(view.data, ir.StorageBox):
        return None
    made = view.data.data
    # One that makes its output itself writes it where it likes, and one that is a part already has another layout.
    if not isinstance(made, ir.ExternKernelOut) or type(made.layout) is not ir.FixedLayout:
        return None
    flat = all(layout.is_contiguous() and layout.offset == 0 for layout in (made.layout, view.layout))
    return made if flat and view.get_numel() == made.get_numel() else None


def _as_view(dst: Any) -> Any:
    """A contiguous part of the concatenation; None for another."""
    if not isinstance(dst, ir.ReinterpretView):
        if not ir.is_storage_and_layout(dst):
            return None
        storage, layout = ir.as_storage_and_layout(dst)
        dst = ir.ReinterpretView(data=storage, layout=layout)
    return dst if dst.layout.is_contiguous() else None

"""Which dtype a layer really computed in, read off the bits of what it produced.

A value that was computed in bfloat16 or float16 and then cast to float32 has zeros in the low bits of its mantissa; one
computed in float32 has anything there. This looks at what ran, not at what a policy says, so a graph that was captured
under the wrong policy is seen too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from trainer.audit.records import Floats, Reference
from trainer.state.layout import Layout

# What each precision asks layers to compute in.
ASKED: Mapping[str, str] = {"float32": "float32", "mixed_bfloat16": "bfloat16"}
_LOW_BITS = {"bfloat16": np.uint32(0xFFFF), "float16": np.uint32(0x1FFF)}


def compute_dtypes(rows: Floats) -> Counter[str]:
    """The dtype that each row's values were computed in: float32 [rows, values] -> dtype -> rows.

    A row of nothing but zeros, infinities and not-a-numbers tells nothing and is counted as `undetermined`.
    """
    found = _dtypes(np.ascontiguousarray(rows))
    names, counts = np.unique(found, return_counts=True)
    return Counter({str(name): int(count) for name, count in zip(names, counts, strict=True)})


def gradient_dtypes(layout: Layout, reference: Reference) -> dict[str, str]:
    """The dtype that each kernel's gradient was computed in, by variable name.

    Only matrices and filters: biases are summed, and normalizations kept, in float32 under mixed precision too.
    """
    return {
        segment.name: str(_dtypes(reference.contribution[segment.span][np.newaxis])[0])
        for segment in layout.of_kind("weight")
        if len(segment.shape) > 1
    }


def _dtypes(rows: Floats) -> NDArray[np.str_]:
    bits = rows.view(np.uint32)
    silent = (rows == 0) | ~np.isfinite(rows)  # as short in any dtype
    found = np.full(len(rows), "float32", dtype="<U12")
    for name in ("float16", "bfloat16"):  # bfloat16 last: its zeros include float16's
        found[(((bits & _LOW_BITS[name]) == 0) | silent).all(axis=1)] = name
    found[silent.all(axis=1)] = "undetermined"
    return found

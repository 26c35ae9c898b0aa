"""Which dtype a layer really computed in, read off the bits of what it produced.

A value that was computed in bfloat16 or float16 and then cast to float32 has zeros in the low bits of its mantissa; one
computed in float32 has anything there. This looks at what ran, not at what a policy says, so a graph that was captured
under the wrong policy is seen too.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trainer.audit.records import DTYPES, Floats, Reference, RunRecord

_LOW_BITS = {"bfloat16": np.uint32(0xFFFF), "float16": np.uint32(0x1FFF)}
# A float16 is as short as a bfloat16 once in eight times: so many values have to be, before it is no accident.
ENOUGH = 8


def compute_dtypes(rows: Floats, asked: NDArray[np.int64] | None = None) -> NDArray[np.uint8]:
    """The dtype that each row's values were computed in: float32 [rows, values] -> codes into `DTYPES`, uint8 [rows].

    A row of nothing but zeros, infinities and not-a-numbers, or of no values, tells nothing: `undetermined`.

    Args:
        asked: codes that were asked for, integer [rows]: too few values to tell float16 from bfloat16 are what was.
    """
    rows = np.ascontiguousarray(rows)
    bits = rows.view(np.uint32)
    silent = (rows == 0) | ~np.isfinite(rows)  # as short in any dtype
    found = np.full(len(rows), DTYPES.index("float32"), np.uint8)
    for name in ("float16", "bfloat16"):  # bfloat16 last: its zeros include float16's
        found[(((bits & _LOW_BITS[name]) == 0) | silent).all(axis=1)] = DTYPES.index(name)
    if asked is not None:
        few = (found == DTYPES.index("bfloat16")) & ((~silent).sum(axis=1) < ENOUGH)
        found[few & (asked == DTYPES.index("float16"))] = DTYPES.index("float16")
    found[silent.all(axis=1)] = DTYPES.index("undetermined")
    return found


def gradient_codes(gradients: Floats, scales: Floats, asked: NDArray[np.int64] | None = None) -> NDArray[np.uint8]:
    """As `compute_dtypes`, of gradients that were computed with a loss scale and divided by it.

    Args:
        scales: float32 [rows]; 0 where there was none.
    """
    found = compute_dtypes(gradients, asked)
    # Divided by anything but a power of two, which unsafe writes make of a scale, they have other bits.
    found[(scales != 0) & (np.abs(np.frexp(scales)[0]) != 0.5)] = DTYPES.index("undetermined")
    return found


def gradient_dtypes(record: RunRecord, reference: Reference) -> dict[str, str]:
    """The dtype that each kernel's gradient was computed in, by variable name.

    Only matrices and filters: biases are summed, and normalizations kept, in float32 under mixed precision too.
    """
    scale = record.replicas[reference.replica_id].loss_scale[reference.step, :1]
    return {
        segment.name: DTYPES[gradient_codes(reference.contribution[segment.span][np.newaxis], scale)[0]]
        for segment in record.layout.of_kind("weight")
        if len(segment.shape) > 1
    }


def precision_was_off(record: RunRecord, reference: Reference) -> bool:
    """Whether a step computed in another dtype than asked, in any replica: then its bits cannot be compared.

    Any, since replicas that normalize together compute with each other's values.
    """
    for replica in record.replicas:
        asked = int(replica.column("asked")[reference.step])
        found = {int(replica.computed_in[reference.step]), int(replica.gradients_in[reference.step])}
        if found - {0, asked}:
            return True
    return bool(set(gradient_dtypes(record, reference).values()) - {"undetermined", reference.asked})

"""Random numbers without a generator: bits are a hash of what they are for.

A generator is state: replicas that share one get numbers that depend on who asks first, and backends have different
ones. Here the bits are a function of (seed, step, sample index in the joint batch, layer index, element index), so that
they are the same on every backend, eager or captured, at any time, however the joint batch is cut into replicas.

Arithmetic is on int64 that hold 32 bits: torch has no whole set of operations on uint32, and no product below leaves
int64, so nothing rests on how an overflow wraps.

Not for cryptography.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import local
from typing import Any

import numpy as np
from keras import ops

WORD = 0xFFFFFFFF


@dataclass(frozen=True)
class Key:
    """What one call's random numbers are for.

    Attributes:
        seed: of the run, 0 to 2**32 - 1.
        step: integer scalar tensor, or an int, from 0 below 2**32.
        samples: integer tensor [batch]: each sample's index in the joint batch, from 0 below 2**32.

    As tensors, both can be inputs of a captured graph, which then holds for the dtypes it was captured with.
    """

    seed: int
    step: Any
    samples: Any


# Per thread and, unlike a context variable, never inherited: a replica thread that runs in a copy of its parent's
# context must fail for want of a key rather than draw the numbers of another replica's samples.
_held = local()


@contextmanager
def keyed(key: Key) -> Iterator[None]:
    """Supply the key of the calls made inside, by this thread. Nested, the inner one counts.

    Thread-safety: each thread sees its own key only.
    """
    outer: Key | None = getattr(_held, "key", None)
    _held.key = key
    try:
        yield
    finally:
        _held.key = outer


def current_key() -> Key:
    """This thread's key.

    Raises:
        RuntimeError: the call was made outside `keyed`.
    """
    key: Key | None = getattr(_held, "key", None)
    if key is None:
        raise RuntimeError(
            "Random numbers were asked for without a key. Make the call inside `with keyed(Key(seed, step, samples))`, "
            "entered by the thread that makes it."
        )
    return key


def bits(key: Key, *, layer_index: int, num_elements: int) -> Any:
    """32 random bits for each element of each sample: int64 [batch, num_elements], 0 to 2**32 - 1.

    Within a layer and step no two samples have the same bits in the same element.

    Thread-safety: pure.
    """
    row_word, column_word = (int(word) for word in np.random.SeedSequence([key.seed, layer_index]).generate_state(2))
    step = _mix(ops.cast(key.step, "int64") ^ row_word)
    rows = _mix(ops.cast(key.samples, "int64") ^ step)
    columns = _mix(ops.arange(num_elements, dtype="int64") ^ step ^ column_word)
    return _mix(ops.expand_dims(rows, 1) ^ columns)


def _mix(x: Any) -> Any:
    """A bijection on 32-bit words that changes about half of the bits of its result for any bit of x.

    Source: `lowbias32` by Christopher Wellons, in its 2018 form.
    """
    x = (x ^ ops.right_shift(x, 16)) * 0x7FEB352D & WORD
    # The second multiplier less 2**32: the same low 32 bits, and the product stays within int64.
    x = (x ^ ops.right_shift(x, 15)) * (0x846CA68B - (1 << 32)) & WORD
    return x ^ ops.right_shift(x, 16)

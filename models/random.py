"""Random numbers of a call, from whoever holds them; and the holder that has no generator: bits are a hash.

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
from typing import Any, Protocol

import numpy as np
from keras import ops

WORD = 0xFFFFFFFF


class Source(Protocol):
    def bits(self, *, layer_index: int, num_elements: int, batch: int | None) -> Any:
        """32 random bits for each element of each sample: int64 [batch, num_elements], 0 to 2**32 - 1.

        Args:
            layer_index: tells the layers of one call apart.
            batch: None where the inputs' batch is not known.
        """


@dataclass(frozen=True)
class Key:
    """What one call's random numbers are for: the source that holds no state.

    Attributes:
        seed: of the run, 0 to 2**32 - 1.
        step: integer scalar tensor, or an int, from 0 below 2**32; or one for each sample, [batch].
        samples: integer tensor [batch]: each sample's index in the joint batch, from 0 below 2**32.

    As tensors, both can be inputs of a captured graph, which then holds for the dtypes it was captured with.

    Thread-safety: immutable.
    """

    seed: int
    step: Any
    samples: Any

    def bits(self, *, layer_index: int, num_elements: int, batch: int | None) -> Any:
        """Within a layer and step no two samples have the same bits in the same element.

        Raises:
            ValueError: the key is for another number of samples than the batch has.
        """
        num_samples = self.samples.shape[0]
        # A key for one sample would broadcast, and the whole batch share one mask.
        if batch is not None and num_samples is not None and batch != num_samples:
            raise ValueError(f"The key is for {num_samples} samples; the batch has {batch}.")
        words = np.random.SeedSequence([self.seed, layer_index]).generate_state(2)
        row_word, column_word = (int(word) for word in words)
        step = _mix(ops.reshape(ops.cast(self.step, "int64"), (-1, 1)) ^ row_word)
        rows = _mix(ops.expand_dims(ops.cast(self.samples, "int64"), 1) ^ step)
        columns = _mix(ops.expand_dims(ops.arange(num_elements, dtype="int64"), 0) ^ step ^ column_word)
        return _mix(rows ^ columns)


# Per thread and, unlike a context variable, never inherited: a replica thread that runs in a copy of its parent's
# context must fail for want of a source rather than draw the numbers of another replica's samples.
_held = local()


@contextmanager
def drawing(source: Source) -> Iterator[None]:
    """Supply the source of the calls made inside, by this thread. Nested, the inner one counts.

    Thread-safety: each thread sees its own source only.
    """
    outer: Source | None = getattr(_held, "source", None)
    _held.source = source
    try:
        yield
    finally:
        _held.source = outer


def current_source() -> Source:
    """This thread's source.

    Raises:
        RuntimeError: the call was made outside `drawing`.
    """
    source: Source | None = getattr(_held, "source", None)
    if source is None:
        raise RuntimeError(
            "Random numbers were asked for without a source. Make the call inside `with drawing(Key(seed, step, "
            "samples))`, entered by the thread that makes it."
        )
    return source


def _mix(x: Any) -> Any:
    """A bijection on 32-bit words that changes about half of the bits of its result for any bit of x.

    Source: `lowbias32` by Christopher Wellons, in its 2018 form.
    """
    x = (x ^ ops.right_shift(x, 16)) * 0x7FEB352D & WORD
    # The second multiplier less 2**32: the same low 32 bits, and the product stays within int64.
    x = (x ^ ops.right_shift(x, 15)) * (0x846CA68B - (1 << 32)) & WORD
    return x ^ ops.right_shift(x, 16)

"""What workers tell each other beside gradients: arrays and a few words, over the cluster that `TF_CONFIG` names.

TensorFlow's collectives are the one way that all workers are known to have to each other, wherever they are. A message
is a vector in which every worker has a place and fills in its own: what they add up to is everybody's. Nothing in it is
code, and nothing is run to read it.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from trainer.processes import Place

WORDS = "words"  # the array that holds what is no array


class Message(NamedTuple):
    """What one worker tells: anything that JSON can say, and arrays by name."""

    words: Any
    arrays: Mapping[str, NDArray[Any]]


class Exchange:
    """Every worker has to come to each exchange, in the same order.

    Thread-safety: none; the main thread's.
    """

    def __init__(self, strategy: tf.distribute.Strategy, place: Place) -> None:
        self._place = place
        add = tf.distribute.ReduceOp.SUM
        self._added = tf.function(
            lambda vector: strategy.reduce(add, vector, axis=None),
            autograph=False,
            input_signature=[tf.TensorSpec([None], tf.int32)],
        )

    def __call__(self, words: Any, **arrays: NDArray[Any]) -> list[Message]:
        """What every worker tells, by rank."""
        own = _written(Message(words, arrays))
        lengths = self._by_all(np.array([len(own)], np.int32))[:, 0]
        padded = np.zeros(-(-int(lengths.max()) // 4), np.int32)
        padded.view(np.uint8)[: len(own)] = np.frombuffer(own, np.uint8)
        written = self._by_all(padded)
        return [_read(each.tobytes()[:length]) for each, length in zip(written, lengths, strict=True)]

    def _by_all(self, own: NDArray[np.int32]) -> NDArray[np.int32]:
        """Vectors of one length, by rank."""
        if self._place.size == 1:
            return own[np.newaxis]  # TensorFlow adds nothing up where there is but one worker
        filled = np.zeros((self._place.size, len(own)), np.int32)
        filled[self._place.rank] = own
        found: NDArray[np.int32] = self._added(tf.constant(filled.reshape(-1))).numpy()
        return found.reshape(filled.shape)


def _written(message: Message) -> bytes:
    stream = io.BytesIO()
    words = np.frombuffer(json.dumps(message.words).encode(), np.uint8)
    np.savez(stream, allow_pickle=False, **{**message.arrays, WORDS: words})
    return stream.getvalue()


def _read(written: bytes) -> Message:
    with np.load(io.BytesIO(written), allow_pickle=False) as arrays:
        found = dict(arrays)
    return Message(json.loads(found.pop(WORDS).tobytes()), found)

"""What is trained: models by name, with their data and batch size. One table for the rivals and for ours.

The options are the configuration's own dataclasses, so that a rival's layers and our command line cannot drift apart.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

import data  # noqa: E402
from trainer.config import OPTIONS, Cnn, Digits, Mlp, Sgd, Synthetic, Transformer  # noqa: E402

LEARNING_RATE = Sgd().learning_rate
SEED = 0
NUM_CLASSES = 10


@dataclass(frozen=True)
class Case:
    """A model with the data that it is trained on.

    Attributes:
        model: a dataclass of `trainer.config`; `data` as well.
        batch_size: of one replica.
    """

    name: str
    told: str
    model: Any
    data: Any
    batch_size: int

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Of one sample: height, width, channels."""
        height, width, channels = getattr(self.data, "shape", (8, 8, 1))
        return height, width, channels

    @property
    def features(self) -> int:
        return math.prod(self.input_shape)

    def load(self) -> data.Dataset:
        """The arrays that `python -m trainer` trains on with the same options."""
        return data.load(self.data, SEED)

    def overrides(self) -> list[str]:
        """The case as `python -m trainer` takes it."""
        return [*_given("model", self.model), *_given("data", self.data), f"train.batch_size={self.batch_size}"]


def _given(group: str, option: Any) -> Iterator[str]:
    """GROUP=NAME, and what of it differs from the defaults."""
    yield f"{group}={option.name}"
    default = OPTIONS[group][option.name]
    for key in fields(option):
        value = getattr(option, key.name)
        if value != getattr(default, key.name):
            yield f"{group}.{key.name}={str(value).replace(' ', '')}"


IMAGES = Synthetic(shape=[28, 28, 1])

CASES = {
    case.name: case
    for case in (
        Case("small_mlp", "MLP 64-64-10, batch 32", Mlp(), Digits(), 32),
        Case("mlp", "MLP 784-512-512-10, batch 64", Mlp(hidden=[512, 512]), IMAGES, 64),
        # Neither batch normalization nor dropout, which every framework does differently under replicas: statistics of
        # each replica, of one of them, or raced on; masks from a generator or, here, from a hash. cnn_batch has both.
        Case("cnn", "CNN 28x28, batch 64", Cnn(normalization="none", dropout=0.0), IMAGES, 64),
        Case("cnn_batch", "CNN 28x28 with batch normalization and dropout, batch 64", Cnn(), IMAGES, 64),
        # Without dropout, for the same reason. 49 patches of 4x4.
        Case("transformer", "transformer 28x28, 49 patches, batch 64", Transformer(patch=4, dropout=0.0), IMAGES, 64),
    )
}

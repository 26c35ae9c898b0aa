"""Batches of a shuffled epoch as indices into tensors in memory, over and over.

Not a `DataLoader` over a `TensorDataset`: it collates a batch sample by sample.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def shuffled(samples: int, batch_size: int, rank: int = 0, replicas: int = 1) -> Iterator[Tensor]:
    """Indices of this replica's batches; the short last batch of an epoch is dropped.

    Replicas get every `replicas`-th sample of one order, as from `DistributedSampler`.
    """
    generator = torch.Generator().manual_seed(0)
    while True:
        order = torch.randperm(samples, generator=generator)[rank::replicas]
        whole = samples // (replicas * batch_size) * batch_size
        yield from order[:whole].split(batch_size)

"""`workload.variable=torch`: an int32 tensor, as PyTorch threads share one."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from trainer.config import Config
from trainer.schedule.pieces import Pieces
from trainer.schedule.replay import cut
from trainer.schedule.visible import watched
from trainer.state.layout import Layout, Segment
from trainer.workloads.counter.shared import TOTAL, Numbers, Shared, VisibleName, array
from trainer.workloads.counter.ways import way_of


class TorchVariable:
    def __init__(self, config: Config) -> None:
        elements = config.workload.elements
        self.shape = (elements,) if elements else ()
        self._rebinds = way_of(config).name == "rebind"
        granularity, chunks = cut(config)
        self._splits = granularity == "memory"
        self._pieces = Pieces(_layout(self.shape, config.num_replicas), chunks=chunks)

    def make(self) -> Shared:
        return Shared(torch.zeros(self.shape, dtype=torch.int32))

    def visible(self) -> Shared:
        if self._rebinds:
            # Nobody changes a tensor then; what replicas share is the name.
            return VisibleName(torch.zeros(self.shape, dtype=torch.int32))
        flat = torch.zeros(math.prod(self.shape), dtype=torch.int32)
        return Shared(watched(flat, self._pieces, splits_updates=self._splits).view(self.shape))

    def fill(self, shared: Shared, number: float) -> None:
        shared.total.fill_(int(number))

    def amount(self, number: float) -> int:
        return int(number)

    def values(self, value: Any) -> Numbers:
        plain: Tensor = getattr(value, "plain", value)
        return array(plain.detach().clone().numpy())


def _layout(shape: tuple[int, ...], num_replicas: int) -> Layout:
    """One variable and nothing else: its own elements are what is counted, so that it needs no canaries."""
    size = math.prod(shape)
    regions = {"weights": slice(0, size), "statistics": slice(size, size), "loss_scale": slice(size, size)}
    return Layout((Segment(TOTAL, "weight", shape, 0, 0, size, size, size),), num_replicas, regions)

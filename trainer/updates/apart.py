"""Batch statistics and loss scale that replicas write by themselves, outside of the update mode's transaction."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.state.loss_scale import next_state, skips
from trainer.updates.shared_vector import Replica, SharedVector


@dataclass
class _Region:
    span: slice
    aside: Tensor  # what the replica's step adds to it


class Apart:
    """Unsafe: each replica writes back what it read, changed by its own step. What others wrote meanwhile is undone.

    The canaries of these variables go with the write, so that every loss of one is counted.

    Thread-safety: each replica's thread calls with its own `replica`; the writes are not isolated, on purpose.
    """

    def __init__(self, shared: SharedVector) -> None:
        layout = shared.layout
        self._shared = shared
        regions = {"statistic": layout.regions["statistics"], "loss_scale": layout.regions["loss_scale"]}
        self._spans = {kind: regions[kind] for kind in sorted(layout.apart) if regions[kind].stop > regions[kind].start}
        self._aside: list[list[_Region]] = [[] for _ in range(layout.num_replicas)]
        self._own_canaries = [torch.from_numpy(layout.own_canaries(own)) for own in range(layout.num_replicas)]

    def take(self, replica: Replica) -> None:
        """Take these variables out of the replica's contribution; what is left goes the update mode's way."""
        self._aside[replica.replica_id] = []
        for kind, span in self._spans.items():
            if kind == "statistic":
                aside = replica.contribution[span].clone()
                replica.contribution[span] = 0.0
            else:
                aside = self._decision(replica, span)
            self._aside[replica.replica_id].append(_Region(span, aside))

    def write(self, replica: Replica) -> None:
        """Write them back, based on what the replica read at the beginning of its step."""
        for region in self._aside[replica.replica_id]:
            self._shared.vector[region.span] = replica.prefix[region.span] + region.aside

    def _decision(self, replica: Replica, span: slice) -> Tensor:
        """What the replica's own overflow, or its absence, adds to the loss scale it read."""
        state = self._shared.layout.loss_scale
        assert state is not None
        before = replica.prefix[state]
        skipped = skips(replica.contribution[state.start])
        aside = self._own_canaries[replica.replica_id][span].clone()
        inside = slice(state.start - span.start, state.stop - span.start)
        aside[inside] = torch.stack(next_state(before[0], before[1], skipped, self._shared.growth_steps)) - before
        # The flag stays: the replica's own update is skipped by it.
        replica.contribution[span.start : state.start] = 0.0
        replica.contribution[state.stop : span.stop] = 0.0
        return aside

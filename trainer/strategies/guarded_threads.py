"""What a replica of `strategy=threads` computes a gradient with where gradients are looked at, or faults are injected.

In place of `Computing`, and only where asked for: a run without either pays nothing for them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trainer.faults import Faults
from trainer.processes import here
from trainer.strategies.computing import Computing
from trainer.strategies.hosting import nonfinite
from trainer.updates.shared_vector import Replica

if TYPE_CHECKING:
    from trainer.strategies.threads import Threads


class GuardedComputing(Computing):
    """One replica's `compute`.

    A fault strikes where the update mode computes the gradient, under whatever lock it holds there, and at the first
    attempt only; a corruption, as one of what was computed is, at every attempt.

    Thread-safety: the replica's thread.
    """

    def __init__(self, threads: Threads, own: int) -> None:
        super().__init__(threads, own)
        self._faults = Faults(threads.config.faults, here(threads.config).restarts)
        self._corruptions = {fault.step: fault for fault in self._faults.corruptions(own)}
        self._stops = threads.config.train.on_nonfinite == "stop"
        self._layout = threads.training.layout
        self._overflow = threads.training.row.loss_scale.stop - 1
        self._struck = -1

    def _take(self, replica: Replica) -> None:
        step = int(self.number)
        if self._struck != step:
            self._struck = step
            self._faults.strike(step, [self._own])
        super()._take(replica)
        corruption = self._corruptions.get(step)
        if corruption is not None:
            self._corrupt(replica, corruption.value)
        if self._stops and not _finite(replica.contribution):
            raise nonfinite(self._layout, replica.contribution.numpy(), self._own, step)

    def _corrupt(self, replica: Replica, value: float) -> None:
        # A copy: what a step returns may be the calling thread's buffer, and an inference tensor.
        replica.contribution = replica.contribution.clone()
        replica.contribution[self._layout.read_segments[0].values] += value
        state = self._layout.loss_scale
        if state is None or _finite(replica.contribution):
            return
        # As the step itself does with what it finds to be not finite: nothing gets out but that it was so.
        replica.contribution.copy_(self._steps.templates[self._own])
        replica.contribution[state.start] = 1.0
        assert self.row is not None
        if self._overflow < len(self.row):  # else audit=none
            self.row = self.row.clone()
            self.row[self._overflow] = 1.0


def _finite(vector: Tensor) -> bool:
    """Whether all values are finite: a sum says so in one pass, unless it is finite numbers that overflow it."""
    return bool(torch.isfinite(vector.sum())) or bool(torch.isfinite(vector).all())

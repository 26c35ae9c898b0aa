"""The batch plan as PyTorch replicas look it up, by the number of a batch (`trainer/state/cursor.py`)."""

from __future__ import annotations

import threading

import numpy as np
import torch
from torch import Tensor

from data.plan import BatchPlan

PLAN_STEPS = 512  # steps that a replica holds at a time


class PlannedBatches:
    """The batch plan by number, looked up for many steps at a time.

    Args:
        steps: those that there are; no further ones are looked up.

    Thread-safety: replicas may ask at once; each keeps the stretch that it is in for itself.
    """

    def __init__(self, plan: BatchPlan, steps: int) -> None:
        self._plan = plan
        self._steps = steps
        self._held = threading.local()

    def fetch(self, number: int) -> Tensor:
        """A batch's samples: int64 [batch]."""
        step, own = divmod(number, self._plan.num_replicas)
        first = step - step % PLAN_STEPS
        if getattr(self._held, "stretch", None) != (first, own):
            found = self._plan.indices(first, min(first + PLAN_STEPS, self._steps))[:, own].astype(np.int64)
            self._held.stretch, self._held.batches = (first, own), torch.from_numpy(found).unbind()
        batches: tuple[Tensor, ...] = self._held.batches
        return batches[step - first]


def batch_of(plan: BatchPlan, number: int) -> Tensor:
    """One batch's samples, looked up by itself: int64 [batch]."""
    return torch.from_numpy(plan.batch(number)).to(torch.int64)

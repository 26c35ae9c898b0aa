"""Which sample goes to which replica at which step: the one plan that all strategies and replica counts follow.

Every epoch is a fresh permutation of the training samples, cut into joint batches of num_replicas x batch_size. Replica
i takes the i-th slice of each. So N replicas with batches of B see the joint batches of one replica with batches of
N x B, in the same order. A step is looked up by its number: no replica holds a cursor that another could move.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int32]


@dataclass(frozen=True)
class BatchPlan:
    """Sample indices by step and replica, from `num_samples`, the sizes and `seed` alone.

    The samples that are left when an epoch no longer fills a joint batch sit that epoch out; which ones changes with
    every epoch.

    Raises:
        ValueError: a size below 1, or a joint batch larger than the data.

    Thread-safety: immutable; replicas may share one plan and ask for different steps at once.
    """

    num_samples: int
    num_replicas: int
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        for name in ("num_samples", "num_replicas", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}.")
        if self.steps_per_epoch < 1:
            joint = f"batch_size={self.batch_size} x num_replicas={self.num_replicas}"
            raise ValueError(f"{joint} is more than {self.num_samples} samples.")

    @property
    def steps_per_epoch(self) -> int:
        return self.num_samples // (self.num_replicas * self.batch_size)

    def indices(self, first_step: int, last_step: int) -> Indices:
        """Samples of steps first_step up to but without last_step: a new int32 [steps, num_replicas, batch_size].

        Raises:
            ValueError: steps below 0 or in the wrong order.
        """
        if not 0 <= first_step <= last_step:
            raise ValueError(f"Steps must run upwards from 0; got {first_step} to {last_step}.")
        found = np.empty((last_step - first_step, self.num_replicas, self.batch_size), np.int32)
        step = first_step
        while step < last_step:
            epoch, start = divmod(step, self.steps_per_epoch)
            stop = min(self.steps_per_epoch, start + last_step - step)
            found[step - first_step :][: stop - start] = self._epoch(epoch)[start:stop]
            step += stop - start
        return found

    def batch(self, number: int) -> Indices:
        """Samples of one batch, int32 [batch_size]: of replica number % num_replicas at step number // num_replicas."""
        step, replica = divmod(number, self.num_replicas)
        return self.indices(step, step + 1)[0, replica]

    def _epoch(self, epoch: int) -> Indices:
        used = self.steps_per_epoch * self.num_replicas * self.batch_size
        order = _permutation(self.num_samples, self.seed, epoch)
        return order[:used].reshape(self.steps_per_epoch, self.num_replicas, self.batch_size)


# Four: replicas that are not in step with each other can be in different epochs.
@lru_cache(maxsize=4)
def _permutation(num_samples: int, seed: int, epoch: int) -> Indices:
    order = np.random.default_rng([seed, epoch]).permutation(num_samples).astype(np.int32)
    # Cached and seen by every thread: a write to it must fail.
    order.setflags(write=False)
    return order

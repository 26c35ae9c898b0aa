"""Parts as users bring them, for `test_state_runs.py`."""

from __future__ import annotations

from typing import Any

from trainer.updates.transactions import Compute, Locked


def module(*, input_shape: tuple[int, ...], num_classes: int, seed: int, dtype_policy: Any) -> Any:
    """A plain module, which computes under `torch.autocast`."""
    import torch

    torch.manual_seed(seed)
    size = input_shape[0] * input_shape[1]
    return torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(size, 16), torch.nn.ReLU(), torch.nn.Linear(16, num_classes)
    )


def meddling_module(**arguments: Any) -> Any:
    """The same, built by code that sets what only its own thread will see."""
    import keras

    keras.config.set_dtype_policy("mixed_bfloat16")
    return module(**arguments)


class ComputedTwice(Locked):
    """As `optimistic` does when it comes too late: the first gradient is thrown away."""

    def step(self, replica: Any, compute: Compute) -> None:
        compute(replica)
        super().step(replica, compute)

"""The rule of dynamic loss scaling, in array operators only: one implementation for torch, TensorFlow and NumPy.

The state is two numbers among the shared variables, `[scale, good]`: what the loss is multiplied by, and how many
updates in a row were finite. After an overflow the update is skipped and the scale halved; after `growth_steps` good
ones it is doubled.

Where updates are skipped for gradients that are not finite and there is no scale, the same two numbers are there with
`growth_steps=NEVER`: a scale that stays 1, and how many updates were skipped.

Source: Micikevicius et al. 2018, section 3.2; the numbers are those of `keras.optimizers.LossScaleOptimizer`, and with
another `growth_steps` of `torch.amp.GradScaler`.
"""

from __future__ import annotations

from typing import Any

Array = Any  # a torch or TensorFlow tensor or a NumPy array, float32


NEVER = -1  # of `growth_steps`: nothing is scaled


def skips(overflows: Array) -> Array:
    """1 where any of the counted replicas overflowed, else 0. `overflows` is a count, from 0."""
    return 1.0 - 0.0**overflows


def next_state(scale: Array, good: Array, skipped: Array, growth_steps: int) -> tuple[Array, Array]:
    """The scale and the count of good updates after one more.

    Args:
        skipped: 1 after an overflow, else 0.
        growth_steps: or `NEVER`.

    Thread-safety: pure.
    """
    if growth_steps == NEVER:
        return scale * 1.0, good + skipped
    good = good + 1.0
    grows = (1.0 - skipped) * (good // growth_steps)
    return scale * (1.0 + grows - 0.5 * skipped), good * (1.0 - skipped) * (1.0 - grows)

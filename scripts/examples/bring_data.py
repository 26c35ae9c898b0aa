"""Data of your own: python -m trainer data._target_=bring_data.two_moons model.hidden=[32].

Called with `seed` and what `+data.arguments.KEY=VALUE` adds. Returns arrays by name: train_x and train_y, with or
without test_x and test_y, or just x and y, of which a fifth is then held out.
"""

from __future__ import annotations

import numpy as np


def two_moons(*, seed: int, samples: int = 2000, noise: float = 0.1) -> dict[str, np.ndarray]:
    """Two interleaved half circles: x float32 [samples, 2], y int32 [samples]."""
    random = np.random.default_rng(seed)
    y = random.integers(0, 2, samples)
    angle = random.uniform(0, np.pi, samples)
    x = np.stack([np.cos(angle) + y, np.sin(angle)], axis=1)
    x[y == 1, 1] = 0.5 - x[y == 1, 1]
    return {"x": (x + random.normal(0, noise, x.shape)).astype(np.float32), "y": y.astype(np.int32)}

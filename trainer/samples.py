"""How many samples there are to train on, and their shape, told before anything is loaded or started.

Standard library only; data in a file cost NumPy as well, to read its headers.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DATA = Path(__file__).resolve().parent.parent / "data" / "__init__.py"


@dataclass(frozen=True)
class Samples:
    """What a run trains on.

    Attributes:
        num_train: samples to train on, those held out left out.
        shape: of one sample.
    """

    num_train: int
    shape: tuple[int, ...]


def samples(data: Any) -> Samples | None:
    """The samples of a `data` option; None where only loading them can tell.

    Raises:
        ValueError: the data cannot be trained on, in one line.
    """
    match data.name:
        case "digits":
            return Samples(_kept(1797, data.held_out), (8, 8, 1))
        case "synthetic":
            return Samples(_kept(data.samples, data.held_out), tuple(data.shape))
        case "mnist" if not data.path:
            return Samples(60_000, (28, 28, 1))
        case "mnist" | "npz":
            return _of_file(data)
    return None


def _kept(num_samples: int, held_out: float) -> int:
    """What `data.load` does not hold out."""
    return num_samples - max(1, round(num_samples * held_out))


def _of_file(data: Any) -> Samples | None:
    found = importlib.util.find_spec("data")
    if found is None or found.origin is None or Path(found.origin).resolve() != DATA:
        # A user's own `data` hides ours here, and is not ours to run. The run's own process finds ours, and checks.
        return None
    # Here, not at the top: it imports NumPy.
    from data import mnist, npz

    return Samples(*{"mnist": mnist.sizes, "npz": npz.sizes}[data.name](data))

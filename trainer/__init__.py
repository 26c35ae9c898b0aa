"""The trainer from Python: `from trainer import run, sweep, read_verdict`. Nothing is loaded before it is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.api import RunVerdict, Sweep, TrainerError, read_verdict, run, sweep
    from trainer.config import ConfigError

__all__ = ["ConfigError", "RunVerdict", "Sweep", "TrainerError", "read_verdict", "run", "sweep"]


def __getattr__(name: str) -> Any:
    # `trainer.run` and `trainer.sweep` are modules too, one of a run's own process and one of the command's. A program
    # that imports neither sees these functions.
    if name not in __all__:
        raise AttributeError(f"module 'trainer' has no attribute {name!r}")
    from trainer import api

    return getattr(api, name)

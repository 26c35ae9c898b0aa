"""The trainer from Python: `from trainer import run, sweep, read_verdict`. Nothing is loaded before it is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.api import RunVerdict, Sweep, TrainerError, read_verdict, run, sweep
    from trainer.config import ConfigError

__all__ = ["ConfigError", "RunVerdict", "Sweep", "TrainerError", "read_verdict", "run", "sweep"]


def __getattr__(name: str) -> Any:
    # No module may have one of these names: once imported, it would stand here in the function's place.
    if name not in __all__:
        raise AttributeError(f"module 'trainer' has no attribute {name!r}")
    from trainer import api

    return getattr(api, name)

"""Whether a run can go on from a checkpoint, told before anything is started. Standard library only."""

from __future__ import annotations

from pathlib import Path

from trainer.checkpoint.identity import difference, identity
from trainer.checkpoint.store import Found, newest
from trainer.config import Config, ConfigError


def found(config: Config) -> Found:
    """The checkpoint that `resume` leads to.

    Raises:
        ConfigError: there is none, or it is one of another run than this.
    """
    found = newest(Path(config.resume))
    told = difference(found.facts["identity"], identity(config))
    if told:
        raise ConfigError(f"resume={config.resume} was another run: {told}. {advice(config)}")
    if found.step > config.train.steps:
        raise ConfigError(
            f"train.steps={config.train.steps} is less than the {found.step} steps of resume={config.resume}. "
            f"Try train.steps={found.step} or more."
        )
    return found


def advice(config: Config) -> str:
    """How to resume rightly."""
    return f"Repeat its command, which its verdict.json and .hydra have, and add resume={config.resume}."

"""What one command has come to so far, and how it speaks of mistakes."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from trainer.config import OPTIONS, Config, ConfigError
from trainer.follower import Follower
from trainer.from_dict import from_dict
from trainer.mistakes import MISTAKES, line
from trainer.processes import as_launched


@dataclass
class Invocation:
    """One command.

    Attributes:
        sweep: the sweep's folder, once it is this sweep's.
        jobs: how many runs the sweep has, where it is known.
        batch: whether the sweep's runs belong to a batch system, and go on without this command.
        follower: tells how a sweep's runs end, where their workers cannot.
        status: exit status of a single run.
        running: whether a run has begun: what goes wrong from then on is no mistake in the configuration.
    """

    sweep: Path | None = None
    jobs: int | None = None
    batch: bool = False
    follower: Follower | None = None
    status: int = 0
    running: bool = False


# Hydra makes callbacks from their names, so nothing can be handed to them: they meet the rest of the program here.
INVOCATION = Invocation()


def complain(mistake: str, status: int = 2) -> int:
    print(f"trainer: {mistake}", file=sys.stderr, flush=True)
    return status


def command_of(overrides: Iterable[str]) -> str:
    """What a user types to do a run again."""
    return shlex.join(["python", "-m", "trainer", *overrides])


@contextmanager
def nothing_after_a_mistake() -> Iterator[None]:
    """End the program on any exception. In a callback Hydra would make a warning of it, and start the run.

    Raises:
        SystemExit: 2 for a mistake of the user's, told on one line.
    """
    try:
        yield
    except MISTAKES as error:
        raise SystemExit(complain(line(error))) from None
    except Exception as error:
        raise SystemExit(complain(f"{type(error).__name__}: {error}", 3)) from error


def config_of(composed: DictConfig) -> Config:
    """The typed config that Hydra composed. Hydra's own part is left out.

    Raises:
        ConfigError: a key was added that there is not, a `name` inside a group is none of its options, or a launcher
            has started another number of processes.
        OmegaConfBaseException: a value is missing or refers to nothing.
    """
    ours = OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])
    fields = OmegaConf.to_container(ours, resolve=True, throw_on_missing=True)
    assert isinstance(fields, dict)
    found: dict[str, Any] = {str(key): value for key, value in fields.items()}
    for group in ("strategy", "update_mode", "model", "data", "optimizer", "schedule", "workload"):
        _check_name(composed, group)
    return as_launched(from_dict(found))


def _check_name(composed: DictConfig, group: str) -> None:
    """Hold an option's `name` to the option that it came with, whose keys the group has."""
    chosen, name = OmegaConf.get_type(composed, group), composed[group].name
    asked = OPTIONS[group].get(name)
    if is_dataclass(chosen) and asked is not None and type(asked) is not chosen:
        raise ConfigError(f"{group}.name={name} does not choose an option. Write {group}={name}.")

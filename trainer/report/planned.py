"""How many runs a sweep was to have and by which command, from the `multirun.yaml` that Hydra leaves at its start."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.config import OPTIONS
from trainer.experiments import experiments

FILE_NAME = "multirun.yaml"


@dataclass(frozen=True)
class Planned:
    """One sweep.

    Attributes:
        folder: the sweep's.
        command: what a user types to do the whole sweep again.
        jobs: None where another sweeper than Hydra's own decides as it goes.
    """

    folder: Path
    command: str
    jobs: int | None


def planned(folders: Iterable[Path]) -> list[Planned]:
    """The sweeps in and below the folders; one whose file cannot be read is left out."""
    files = {path.resolve(): path for folder in folders for path in sorted(folder.rglob(FILE_NAME))}
    return [found for path in files.values() if (found := _read(path)) is not None]


def jobs_of(sweeps: Sequence[Planned], folders: Sequence[Path]) -> int | None:
    """How many runs there were to be in the folders, where they are one sweep's; else nobody knows."""
    return sweeps[0].jobs if len(sweeps) == 1 and [each.folder for each in sweeps] == list(folders) else None


def _read(path: Path) -> Planned | None:
    # A third of a second, which a report of single runs need not wait for.
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        hydra = OmegaConf.load(path).hydra
        # Neither what -m stands for, nor the folder, which holds a sweep now.
        own = [
            str(each) for each in hydra.overrides.hydra if not str(each).startswith(("hydra.mode=", "hydra.sweep.dir="))
        ]
        task = [str(each) for each in hydra.overrides.task]
        arguments = [f"{key}={value}" for key, value in (hydra.sweeper.get("params") or {}).items()] + task
        basic = str(hydra.sweeper._target_).endswith(".BasicSweeper")
        return Planned(
            path.parent, shlex.join(["python", "-m", "trainer", "-m", *task, *own]), _jobs(arguments) if basic else None
        )
    except (OSError, ValueError, AttributeError, TypeError, YAMLError, OmegaConfBaseException, HydraException):
        # Not one that Hydra has written for us, or cut short itself: then nothing is known of the plan.
        return None


def _jobs(arguments: list[str]) -> int:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import Glob, Override

    def values(override: Override) -> int:
        if not override.is_sweep_override():
            return 1
        if isinstance(value := override.value(), Glob):
            key = override.get_key_element()
            return len(value.filter(list(OPTIONS.get(key, ())) if key in OPTIONS else list(experiments())))
        return sum(1 for _ in override.sweep_iterator())

    return math.prod(values(each) for each in OverridesParser.create().parse_overrides(arguments))

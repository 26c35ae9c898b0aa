"""The rules, checked once Hydra has composed a configuration and before it makes a folder."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, open_dict, read_write

from trainer.config import ConfigError
from trainer.folders import claim, from_here, take_over
from trainer.follower import Follower
from trainer.invocation import INVOCATION, config_of, nothing_after_a_mistake
from trainer.launchers import BATCH, WITH_LOGS, check, chosen
from trainer.processes import folder_of, launched
from trainer.rules import validate


class Checks(Callback):
    """Refuses what cannot run. `configs/config.yaml` names it."""

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        with nothing_after_a_mistake():
            asked = config_of(config)
            validate(asked)
            if (launcher := chosen(config)) != "basic":
                raise ConfigError(f"hydra/launcher={launcher} starts the runs of a sweep: add -m, also for one run.")
            folder = from_here(Path(config.hydra.run.dir).absolute())
            place = launched(asked)
            if place is None:
                claim(folder, "hydra.run.dir")
                return
            own = folder_of(folder, place.rank)
            if place.rank:
                with read_write(config):
                    config.hydra.run.dir = str(own)
            if place.restarts:
                take_over(own, place.restarts, goes_on=asked.checkpoint.every > 0)
            else:
                # Another process of the same run may have made the folder, to put its own there.
                claim(own, "hydra.run.dir", shared=True)

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        with nothing_after_a_mistake():
            launcher = chosen(config)
            check(launcher)
            jobs = _jobs(config)
            if jobs is not None:
                if not jobs:
                    raise ConfigError("the sweep has no runs: a glob fits no option. --help lists them.")
                _check_launched(jobs)
                _check_rules(jobs)
                _check_folders(jobs)
                INVOCATION.jobs = len(jobs)
            folder = from_here(Path(config.hydra.sweep.dir).absolute())
            claim(folder, "hydra.sweep.dir", below=True)
            INVOCATION.sweep = folder
            INVOCATION.batch = launcher in BATCH
            if launcher in WITH_LOGS:
                INVOCATION.follower = Follower(folder, INVOCATION.jobs)


def _jobs(config: DictConfig) -> list[DictConfig] | None:
    """Every run of a sweep as it will be composed; None where another sweeper than Hydra's own decides as it goes.

    Raises:
        HydraException: one of them cannot be composed.
    """
    sweeper = config.hydra.sweeper
    if not str(sweeper._target_).endswith(".BasicSweeper"):
        return None
    loader = GlobalHydra.instance().config_loader()
    arguments = [f"{key}={value}" for key, value in (sweeper.params or {}).items()] + list(config.hydra.overrides.task)
    overrides = OverridesParser.create(config_loader=loader).parse_overrides(arguments)
    jobs = []
    for number, each in enumerate(itertools.chain.from_iterable(BasicSweeper.split_arguments(overrides, None))):
        job = loader.load_sweep_config(config, list(each))
        with open_dict(job):
            job.hydra.job.num, job.hydra.job.id = number, str(number)
        jobs.append(job)
    return jobs


def _check_rules(jobs: list[DictConfig]) -> None:
    """Refuse a sweep whose runs would all be refused for one reason: that is a mistake in what they have in common.

    Otherwise a combination that the rules refuse is a row of the sweep like the others.
    """
    refusals = []
    for job in jobs:
        config = config_of(job)
        try:
            validate(config)
        except ConfigError as error:
            refusals.append(str(error))
    if len(refusals) == len(jobs) and len(set(refusals)) == 1:
        raise ConfigError(refusals[0])


def _check_launched(jobs: list[DictConfig]) -> None:
    """Refuse a sweep that each of several processes of one launch would make by itself."""
    for config in (config_of(job) for job in jobs):
        if launched(config) is not None:
            raise ConfigError(
                f"--multirun does not go with strategy={config.strategy.name} where a launcher has started the "
                "processes: each launch is one run. Launch every run by itself."
            )


def _check_folders(jobs: list[DictConfig]) -> None:
    """Refuse a sweep in which two runs would share a folder."""
    names = set()
    for job in jobs:
        HydraConfig.instance().set_config(job)
        name = str(job.hydra.sweep.subdir)
        if name in names:
            raise ConfigError(
                f"hydra.sweep.subdir={name} is one folder for several runs. "
                "Leave it out, or name it by ${hydra.job.num}."
            )
        names.add(name)

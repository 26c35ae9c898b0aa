"""How a sweep's runs are started: Hydra's launchers, those of our extras included, and what differs between them.

The option files of `configs/hydra/launcher` have the plugins' own names, so each stands on the plugin's schema under
another one: `PLUGIN_SUFFIX` is behind it. Where an extra is not installed there is no such schema.
"""

from __future__ import annotations

import shutil

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from omegaconf import DictConfig

from trainer.config import ConfigError

GROUP = "hydra/launcher"
PLUGIN_SUFFIX = "_plugin"
# Launchers that an extra of pyproject.toml brings, and those that do not go with the versions of constraints.txt.
EXTRAS = {"submitit_local": "slurm", "submitit_slurm": "slurm", "ray": "ray"}
UNPINNED = ("ray",)
# Their workers' output goes elsewhere, so that the command tells how each run ends.
WITH_LOGS = ("submitit_local", "submitit_slurm", "ray")
# Their workers are asked to end by a signal, and have a way of their own to go about it.
ASKED = ("submitit_local", "submitit_slurm")
# Their runs belong to a batch system: they go on when the command ends.
BATCH = ("submitit_slurm",)


def register() -> None:
    """Give the schemas of the launchers that are installed the names that our option files refer to."""
    Plugins.instance()  # finds them, and Hydra would not do it again
    store = ConfigStore.instance()
    schemas = store.repo["hydra"]["launcher"]
    for name in EXTRAS:
        # Taken out: Hydra would hold a file to a schema of the same name by itself, and warn that it will not for ever.
        if (schema := schemas.pop(f"{name}.yaml", None)) is not None:
            store.store(group=GROUP, name=f"{name}{PLUGIN_SUFFIX}", node=schema.node, provider=schema.provider)


def chosen(composed: DictConfig) -> str:
    """The option of `hydra/launcher`."""
    return str(composed.hydra.runtime.choices[GROUP])


def check(launcher: str) -> None:
    """Hold a sweep's launcher to what it needs on this machine.

    Raises:
        ConfigError: Slurm's commands are not there.
    """
    missing = [name for name in ("sbatch", "srun") if shutil.which(name) is None]
    if launcher in BATCH and missing:
        raise ConfigError(
            f"{GROUP}={launcher} needs Slurm's commands, and {' and '.join(missing)} cannot be found on the PATH. "
            f"Start it on a machine that submits jobs, or take {GROUP}=submitit_local."
        )


def not_installed(option: str) -> str:
    """What to do about a launcher whose plugin is not there; `option` is its schema's name."""
    name = option.removesuffix(PLUGIN_SUFFIX)
    pins, where = ("", "in an environment of its own") if name in UNPINNED else ("-c constraints.txt ", "")
    command = f"pip install {pins}-e '.[{EXTRAS[name]}]'"
    return " ".join(filter(None, (f"{GROUP}={name} is not installed: {command} in the checkout", where))) + "."

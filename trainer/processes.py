"""The processes of one run: which of them this is, who has started them, and how they find each other.

A strategy that has several is started here, one command starts all of them, or by a cluster's launcher, which starts
one command for each. Rank 0 writes the run's folder; the others write `process_1`, `process_2` ... below it. Standard
library only.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from trainer import tf_config
from trainer.config import Config, ConfigError, Processes

# Names that torchrun gives these, which a run's own process is told by as well, whoever has started it.
RANK, SIZE, LOCAL_RANK, LOCAL_SIZE = "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"
RESTARTS = "TORCHELASTIC_RESTART_COUNT"
# By what processes of one machine that were started here find each other: a file, or the variable that says it.
MEETING = "TRAINER_MEETING"
MEETING_NAME = ".meeting"


@dataclass(frozen=True)
class Place:
    """One process among those of a run.

    Attributes:
        rank: 0 to `size` - 1.
        local_rank, local_size: the same among those on its machine.
        launched: whether a cluster's launcher has started it, and the others.
        restarts: how often the launcher has started them again.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    launched: bool = False
    restarts: int = 0

    @property
    def name(self) -> str:
        return f"process {self.rank}"


ALONE = Place()


def here(config: Config) -> Place:
    """The place of the calling process, one that runs replicas."""
    return _read(os.environ) if isinstance(config.strategy, Processes) else ALONE


def launched(config: Config, environment: Mapping[str, str] = os.environ) -> Place | None:
    """The place that a cluster's launcher has given this command; None where there was none, or none is heeded.

    Raises:
        ConfigError: the launcher's environment makes no sense.
    """
    find = LAUNCHERS.get(config.strategy.name)
    return None if find is None else find(environment)


def _by_torchrun(environment: Mapping[str, str]) -> Place | None:
    if RANK not in environment or SIZE not in environment or MEETING in environment:
        return None
    try:
        return _read(environment)
    except ValueError:
        given = ", ".join(f"{name}={environment[name]}" for name in (RANK, SIZE) if name in environment)
        raise ConfigError(f"the environment says {given}, which launchers set to whole numbers. Unset them.") from None


def _by_tf_config(environment: Mapping[str, str]) -> Place | None:
    task = None if MEETING in environment else tf_config.task(environment)
    return None if task is None else Place(*task, launched=True)


# Strategy -> who looks for the place that a launcher has given a command, and where it says of how many.
LAUNCHERS = {"ddp": _by_torchrun, "multi_worker": _by_tf_config}
TOLD = {
    "ddp": f"{SIZE}={{}}, the processes that the launcher has started",
    "multi_worker": "the {} workers of TF_CONFIG",
}


def _read(environment: Mapping[str, str]) -> Place:
    def number(name: str, default: int) -> int:
        return int(environment.get(name, default))

    rank, size = number(RANK, 0), number(SIZE, 1)
    by_launcher = RANK in environment and MEETING not in environment
    restarts = number(RESTARTS, 0) if by_launcher else 0
    return Place(rank, size, number(LOCAL_RANK, rank), number(LOCAL_SIZE, size), by_launcher, restarts)


def as_launched(config: Config) -> Config:
    """The configuration with as many processes as a launcher has started, if one has.

    Raises:
        ConfigError: another number was asked for.
    """
    place = launched(config)
    if place is None:
        return config
    asked = config.num_processes
    if asked not in (place.size, Processes().num_processes):
        raise ConfigError(
            f"strategy.num_processes={asked} differs from {TOLD[config.strategy.name].format(place.size)}. "
            "Leave strategy.num_processes out."
        )
    strategy = dataclasses.replace(config.strategy, num_processes=place.size)
    return dataclasses.replace(config, strategy=strategy)


def to_start(config: Config) -> list[Place]:
    """The places of the processes that this command has to start: all, or the one that a launcher has given it."""
    place = launched(config)
    size = config.num_processes
    return [Place(rank, size, rank, size) for rank in range(size)] if place is None else [place]


def local_size(config: Config) -> int:
    """Processes of the run on this machine."""
    place = launched(config)
    return config.num_processes if place is None else place.local_size


def hosted(config: Config) -> range:
    """The replicas of the calling process, by their numbers among all."""
    first = here(config).rank * config.num_replicas
    return range(first, first + config.num_replicas)


def recorded(config: Config) -> range:
    """The replicas whose rows the calling process has: its own, but workers of TensorFlow tell each other theirs."""
    return range(config.replicas_in_all) if config.strategy.name == "multi_worker" else hosted(config)


def folder_of(folder: Path, rank: int) -> Path:
    """Where a process writes, in or below the run's folder."""
    return folder / f"process_{rank}" if rank else folder


def environment(config: Config, place: Place, folder: Path) -> dict[str, str]:
    """What a process is told by its environment: its place, and what its strategy's processes meet by.

    Args:
        folder: the run's.
    """
    if not isinstance(config.strategy, Processes):
        return {}
    told = {RANK: place.rank, SIZE: place.size, LOCAL_RANK: place.local_rank, LOCAL_SIZE: place.local_size}
    found = {name: str(number) for name, number in told.items()}
    return found if place.launched else found | MEETINGS[config.strategy.name](place, folder)


def _by_file(place: Place, folder: Path) -> dict[str, str]:
    """A file of the run's folder: there is no port that another program could take first."""
    found = {MEETING: str((folder / MEETING_NAME).absolute())}
    if sys.platform == "linux":
        # Else gloo looks the machine's own name up, which need not lead anywhere.
        found |= {"GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo")}
    return found


def _by_port(place: Place, folder: Path) -> dict[str, str]:
    """TensorFlow's own way: the addresses of all."""
    return {MEETING: tf_config.NAME, tf_config.NAME: tf_config.on_loopback(place.rank, place.size, folder)}


# Strategy -> what each process is given to find the others by, where they are started here.
MEETINGS = {"ddp": _by_file, "multi_worker": _by_port}

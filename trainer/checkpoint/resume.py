"""Whether a run can go on from a checkpoint, and from which: told before anything is started. Standard library only.

Each process of a run has checkpoints of its own, and all go on from one step: the newest of which every process has a
good one. Each says which it has, the lowest is what all may have, and so on until all say the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from trainer.checkpoint.identity import difference, identity
from trainer.checkpoint.store import Found, name_of, newest
from trainer.config import Config, ConfigError, LocalSteps
from trainer.processes import folder_of, to_start


class Candidate(NamedTuple):
    """What a process could go on from.

    Attributes:
        step: of its newest good checkpoint; -1 where it has none.
        refusal: why it has none.
    """

    step: int
    refusal: str = ""


def agreed(look: Callable[[int | None], Sequence[Candidate]]) -> int:
    """The step that all processes go on from.

    Args:
        look: what each process has that is of no later step than the one given.

    Raises:
        ConfigError: one of them has none; the same in all.
    """
    most: int | None = None
    while True:
        found = look(most)
        for each in found:
            if each.refusal:
                raise ConfigError(each.refusal)
        most = min(each.step for each in found)
        if all(each.step == most for each in found):
            return most


def check(config: Config) -> None:
    """Hold `resume` to a checkpoint in each process that this command starts.

    Raises:
        ConfigError: there is none, or it is one of another run than this.
    """
    folders = [folder_of(Path(config.resume), place.rank) for place in to_start(config)]
    agreed(lambda most: [Candidate(found(config, folder, most).step) for folder in folders])


def found(config: Config, folder: Path, at_most: int | None = None) -> Found:
    """The checkpoint of one process that the run can go on from.

    Args:
        folder: of that process, in the run that is resumed.
        at_most: the last step that it may be of.

    Raises:
        ConfigError: there is none, or it is one of another run than this.
    """
    newest_one = newest(folder, at_most)
    given, step = f"resume={folder}", newest_one.step
    told = difference(newest_one.facts["identity"], identity(config))
    if told:
        raise ConfigError(f"{given} was another run: {told}. {advice(config)}")
    if step > config.train.steps:
        raise ConfigError(
            f"train.steps={config.train.steps} is less than the {step} steps of {given}. "
            f"Try train.steps={step} or more."
        )
    mode = config.update_mode
    if isinstance(mode, LocalSteps) and step % mode.average_every and step < config.train.steps:
        raise ConfigError(
            f"{given} ended with an average after step {step}, which is none of every "
            f"update_mode.average_every={mode.average_every}: a longer run would not have made it. Leave "
            f"train.steps={step}, or remove {name_of(step)} to go on from the one before."
        )
    return newest_one


def advice(config: Config) -> str:
    """How to resume rightly."""
    return f"Repeat its command, which its verdict.json and .hydra have, and add resume={config.resume}."

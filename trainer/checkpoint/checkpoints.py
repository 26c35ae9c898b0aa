"""What a strategy is handed where a run makes checkpoints, or goes on from one. NumPy only."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.dataset import Dataset
from trainer.audit.records import Evaluation, Floats, RunRecord
from trainer.checkpoint import files, resume
from trainer.checkpoint.contents import Snapshot, pack, unpack
from trainer.checkpoint.files import Arrays
from trainer.checkpoint.identity import difference, identity
from trainer.checkpoint.resume import Candidate
from trainer.checkpoint.store import Found, remove_after
from trainer.config import Config, ConfigError
from trainer.processes import folder_of, here
from trainer.state.layout import Layout

log = logging.getLogger(__name__)

# What each process says is told to all: by rank, in each of them.
TellAll = Callable[[Any], list[Any]]
# Checkpoints that one process may be ahead of another: a replica hands over one while the one before waits and the one
# before that is written, and until then it lets no other process take a step.
MOST_AHEAD = 3


def alone(own: Any) -> list[Any]:
    """Of a run in one process."""
    return [own]


class Checkpoints:
    """One run's.

    Attributes:
        first_step: the step to begin with: 0, or as many as the checkpoint that is resumed has.
        arrays, facts: what the strategy had put into that, by its own names; empty for a run that begins anew.

    Args:
        folder: the process's own.
        made_of: what the run is made of that only its own process knows, as digests by name.
        warn: tells the user.
        tell_all: by which the processes of the run agree on a step; all make their checkpoints at the same ones.

    Raises:
        ConfigError: there is nothing to resume, or it is of another run.
    """

    def __init__(
        self,
        config: Config,
        folder: Path,
        made_of: Mapping[str, str],
        record: RunRecord,
        warn: Callable[[str], None],
        tell_all: TellAll = alone,
    ) -> None:
        self._config, self._folder, self._warn, self._tell_all = config, folder, warn, tell_all
        place = here(config)
        self._identity, self._made_of = identity(config), dict(made_of)
        self._keep = config.checkpoint.keep
        if place.size > 1:
            self._made_of["the process"] = str(place.rank)
            # So that there is a step of which every process has one.
            self._keep = max(self._keep, MOST_AHEAD + 1)
        self.first_step = 0
        self.arrays: Arrays = {}
        self.facts: dict[str, Any] = {}
        self.resumed: dict[str, Any] | None = None
        self._written: list[int] = []
        self._failed: list[str] = []
        found = self._of_the_life_before() if place.restarts else None
        if found is None and config.resume:
            found = self._agreed(folder_of(Path(config.resume), place.rank))
        if found is not None:
            self._resume(found, record)
        if place.restarts:
            # Of steps that are taken again: here nobody else reads them.
            remove_after(self.first_step, folder)

    def _of_the_life_before(self) -> Found | None:
        """What a run that a launcher has started again goes on from in its own folder; None where it starts anew."""
        try:
            return self._agreed(self._folder) if self._config.checkpoint.every else None
        except ConfigError as error:
            log.warning("the run starts anew: %s", error)
            return None

    def _agreed(self, folder: Path) -> Found | None:
        """This process's checkpoint of the step that all processes go on from.

        Raises:
            ConfigError: a process has none; the same in all.
        """
        found: Found | None = None

        def look(at_most: int | None) -> list[Candidate]:
            nonlocal found
            try:
                found = resume.found(self._config, folder, at_most)
                told = difference(found.facts["made_of"], self._made_of)
                if told:
                    raise ConfigError(f"resume={folder} was another run: {told}. {resume.advice(self._config)}")
                own = Candidate(found.step)
            except ConfigError as error:
                own = Candidate(-1, str(error))
            # As lists, which is what JSON makes of them.
            return [Candidate(*each) for each in self._tell_all(list(own))]

        resume.agreed(look)
        return found

    def _resume(self, found: Found, record: RunRecord) -> None:
        config = self._config
        loaded = files.decode(found)
        folder = str(loaded.path.parent.parent)
        for why in loaded.skipped:
            self._tell(f"resume={folder}: {why}; the one before is taken.")
        unpack(loaded.arrays, loaded.facts, record)
        prefix = "strategy."
        self.arrays = {name[len(prefix) :]: each for name, each in loaded.arrays.items() if name.startswith(prefix)}
        self.facts, self.first_step = loaded.facts["strategy"], loaded.step
        self.resumed = {
            "folder": folder,
            "step": loaded.step,
            "checkpoint": loaded.path.name,
            "skipped": loaded.skipped,
            "not_carried": ["trace"] if config.audit.trace_steps else [],
            "before": loaded.facts["resumed"],
        }
        if config.audit.trace_steps:
            log.warning("audit.trace_steps traces nothing in a resumed run: its first steps were another process's.")
        log.info("resumed from %s, step %d", loaded.path, loaded.step)

    def after(self, step: int) -> int:
        """The next step at whose end there is one, beyond `step`; -1 where there is none."""
        every, steps = self._config.checkpoint.every, self._config.train.steps
        return min((step // every + 1) * every, steps) if every and step < steps else -1

    def write(self, record: RunRecord, taken: Snapshot, evaluations: Sequence[Evaluation]) -> None:
        """Save what was taken. What cannot be written is told, and the run goes on.

        Args:
            evaluations: those that a run which goes on from there does not make again.

        Thread-safety: the main thread; replicas may go on meanwhile.
        """
        arrays, facts = pack(record, taken, evaluations)
        facts |= {"identity": self._identity, "made_of": self._made_of, "resumed": self.resumed}
        try:
            files.save(arrays, facts, taken.step, self._folder, keep=self._keep)
        except OSError as error:
            self._failed.append(f"step {taken.step}: {error.strerror or error}")
            kept = "those before stay" if self._written or self.resumed else "there is none before it"
            self._tell(f"the checkpoint of {self._failed[-1]}; {kept}, and the run goes on.")
        else:
            self._written.append(taken.step)

    @property
    def failed(self) -> list[str]:
        """Those of this process that could not be written, and why."""
        return self._failed

    def note_others(self, failed: Sequence[Sequence[str]]) -> None:
        """Put down what each process could not write, by rank, in the first, whose verdict it is."""
        others = list(enumerate(failed))[1:]
        self._failed += [f"process {rank}: {each}" for rank, own in others for each in own]

    def _tell(self, message: str) -> None:
        log.warning(message)
        self._warn(message)

    @property
    def told(self) -> dict[str, Any]:
        """For the verdict: how many were written, the steps of those that could not be and why, and the last one's."""
        return {
            "written": len(self._written),
            "failed": self._failed,
            "last_step": self._written[-1] if self._written else None,
        }


def digests(layout: Layout, initial: Floats, dataset: Dataset) -> dict[str, str]:
    """What a run is made of that its configuration does not tell: SHA-256 by name.

    Args:
        initial: the flat vector before the first update.
    """
    data = (dataset.train_x, dataset.train_y, dataset.test_x, dataset.test_y)
    return {
        "the SHA-256 of the layout": hashlib.sha256(repr(layout.segments).encode()).hexdigest(),
        "the SHA-256 of the initial values": _digest(initial),
        "the SHA-256 of the data": _digest(*data),
    }


def _digest(*arrays: NDArray[Any]) -> str:
    found = hashlib.sha256()
    for array in arrays:
        found.update(f"{array.dtype.str}{array.shape}".encode())
        found.update(np.ascontiguousarray(array).data)
    return found.hexdigest()

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
from trainer.config import Config, ConfigError
from trainer.state.layout import Layout

log = logging.getLogger(__name__)


class Checkpoints:
    """One run's.

    Attributes:
        first_step: the step to begin with: 0, or as many as the checkpoint that is resumed has.
        arrays, facts: what the strategy had put into that, by its own names; empty for a run that begins anew.

    Args:
        made_of: what the run is made of that only its own process knows, as digests by name.
        warn: tells the user.

    Raises:
        ConfigError: there is nothing to resume, or it is of another run.
    """

    def __init__(
        self, config: Config, folder: Path, made_of: Mapping[str, str], record: RunRecord, warn: Callable[[str], None]
    ) -> None:
        self._config, self._folder, self._warn = config, folder, warn
        self._identity, self._made_of = identity(config), dict(made_of)
        self.first_step = 0
        self.arrays: Arrays = {}
        self.facts: dict[str, Any] = {}
        self.resumed: dict[str, Any] | None = None
        self._written: list[int] = []
        self._failed: list[str] = []
        if config.resume:
            self._resume(record)

    def _resume(self, record: RunRecord) -> None:
        config = self._config
        loaded = files.decode(resume.found(config))
        told = difference(loaded.facts["made_of"], self._made_of)
        if told:
            raise ConfigError(f"resume={config.resume} was another run: {told}. {resume.advice(config)}")
        for why in loaded.skipped:
            self._tell(f"resume={config.resume}: {why}; the one before is taken.")
        unpack(loaded.arrays, loaded.facts, loaded.step, record)
        prefix = "strategy."
        self.arrays = {name[len(prefix) :]: each for name, each in loaded.arrays.items() if name.startswith(prefix)}
        self.facts, self.first_step = loaded.facts["strategy"], loaded.step
        self.resumed = {
            "folder": config.resume,
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
            files.save(arrays, facts, taken.step, self._folder, keep=self._config.checkpoint.keep)
        except OSError as error:
            self._failed.append(f"step {taken.step}: {error.strerror or error}")
            kept = "those before stay" if self._written or self.resumed else "there is none before it"
            self._tell(f"the checkpoint of {self._failed[-1]}; {kept}, and the run goes on.")
        else:
            self._written.append(taken.step)

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

"""`strategy=ddp`: several processes over torch.distributed, each with replicas that are threads over one shared vector.

Replicas have one numbering over all processes, and so have layout, canaries, batch plan, random numbers and records:
process r hosts `num_replicas` of them from r x num_replicas on. Inside a process everything is as under `threads`, on
that process's own copy of the shared variables; the copies are kept alike by the update mode
(`trainer/updates/between_processes.py`). At the end the first process has all records, and judges.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from trainer.audit.records import Average, Floats, Reference, ReplicaRecord, RunRecord
from trainer.checkpoint.checkpoints import Checkpoints
from trainer.checkpoint.files import Arrays
from trainer.config import Config, LocalSteps
from trainer.engines.capture import capture
from trainer.holders import mechanism
from trainer.processes import hosted
from trainer.state.settings import Difference
from trainer.strategies import threads
from trainer.strategies.exchange import PATIENCE_SECONDS, Exchange, Group
from trainer.strategies.hosting import RunBroken, StopFlag, Watcher, turned_on
from trainer.strategies.threads import Threads
from trainer.updates import between_processes
from trainer.updates.between_processes import AllReduceOfProcesses
from trainer.updates.shared_vector import Replica, SharedVector
from trainer.workloads.train import Training

T = TypeVar("T")
prepare = threads.prepare
_group: Group | None = None


def group(config: Config) -> Group:
    """The process group, which a process joins once."""
    global _group
    if _group is None:
        _group = Group(config)
    return _group


def tell_all(config: Config, own: T) -> list[T]:
    """What each process says, by rank, in all of them; all have to call this as often."""
    return group(config).tell_all(own)


def train(
    config: Config,
    training: Training,
    record: RunRecord,
    watcher: Watcher,
    stop: StopFlag,
    checkpoints: Checkpoints | None = None,
) -> None:
    """Train with the replicas of this process and fill `record`, in the first process with all that all have recorded.

    Raises:
        RunBroken: something went wrong in this process, or in another one.
    """
    joined = group(config)
    try:
        with turned_on(training):
            Process(joined, config, training, record, watcher, stop, checkpoints).run()
        record.mode_left = training.mode_left
    except RunBroken:
        raise
    except Exception as error:
        broken = RunBroken("crash", f"{joined.place.name}: {type(error).__name__}: {error}", step=record.steps_done)
        joined.tell(broken)
        raise


@dataclass(frozen=True)
class Part:
    """What one process has recorded.

    Attributes:
        copy: float32 [layout.size], its copy of the shared variables at the end.
        failed: checkpoints that it could not write.
    """

    replicas: list[ReplicaRecord]
    references: list[Reference]
    settings: Mapping[int, list[Difference]]
    copy: Floats
    averages: list[Average]
    first_calls: int
    failed: list[str]


class Process(Threads):
    """The replicas of one process."""

    def __init__(
        self,
        joined: Group,
        config: Config,
        training: Training,
        record: RunRecord,
        watcher: Watcher,
        stop: StopFlag,
        checkpoints: Checkpoints | None = None,
    ) -> None:
        self._group = joined
        record.num_processes = joined.place.size
        shared, mode, replicas, self._exchange = _build(config, training, record, joined, hosted(config))
        self._way = mode
        built = shared, mode, replicas
        super().__init__(config, training, record, watcher, stop, mode=built, checkpoints=checkpoints)

    @property
    def judges(self) -> bool:
        """Whether this is the process that has all records in the end."""
        return self._group.place.rank == 0

    def run(self) -> None:
        try:
            # Who is faster at capturing the step does not wait for the others inside it.
            self._group.meet()
            super().run()
        except RunBroken as broken:
            raise self._cause(broken) from broken

    def state(self) -> tuple[Arrays, dict[str, Any]]:
        arrays, facts = super().state()
        return arrays, facts | {"exchange": self._exchange.position}

    def go_on(self) -> None:
        super().go_on()
        assert self.checkpoints is not None
        self._way.go_on(self.first_step)
        self._exchange.go_on(self.checkpoints.facts["exchange"], self.shared.plain)

    def report(self) -> None:
        super().report()
        if (broken := self._group.told()) is not None:
            raise broken

    def finish(self) -> None:
        super().finish()
        if self.stop.is_set():
            return
        assert self.record.copies is not None
        own = Part(
            [self.record.replicas[own] for own in self.hosted],
            self.record.references,
            self.record.settings,
            self.record.copies[0],
            self.record.averages,
            self.record.first_calls,
            [] if self.checkpoints is None else self.checkpoints.failed,
        )
        parts = self._group.gather(own)
        if parts is not None:
            _put_together(self.record, parts)
            if self.checkpoints is not None:
                self.checkpoints.note_others([part.failed for part in parts])

    def complete(self) -> None:
        if self.judges:
            super().complete()

    def _evaluate(self, step: int, vector: Floats) -> None:
        if self.judges:
            super()._evaluate(step, vector)

    def _cause(self, broken: RunBroken) -> RunBroken:
        """What has gone wrong first, as all processes are told.

        One that has lost another, or waits for it, knows the least: it gives the others time to say what happened, and
        whoever has started it to end it.
        """
        place, waits = self._group.place, bool(self._exchange.lost) or self._exchange.waits
        deadline = time.monotonic() + PATIENCE_SECONDS * (1 if place.launched else 3)
        while (found := self._group.told()) is None and waits and time.monotonic() < deadline:
            time.sleep(0.02)
        if found is not None:
            return found
        message = f"{place.name}: {broken.message}"
        if self._exchange.lost:
            message = f"{place.name} has lost another one: {self._exchange.lost}"
        told = RunBroken("killed" if self._exchange.lost else broken.kind, message, broken.replica, broken.step)
        self._group.tell(told)
        return told


def _build(
    config: Config, training: Training, record: RunRecord, joined: Group, own: range
) -> tuple[SharedVector, AllReduceOfProcesses | between_processes.LocalSteps, list[Replica], Exchange]:
    """The shared vector of this process, the mode over it, a workspace for each replica, and the way to the others."""
    local = config.update_mode if isinstance(config.update_mode, LocalSteps) else None
    layout, steps = training.layout, config.train.steps
    shared = SharedVector(
        training.initial,
        layout,
        training.optimizer,
        capture,
        # Who contributes to one update.
        num_trainers=len(own) if local else training.num_trainers,
        growth_steps=training.growth_steps,
        averages_statistics=mechanism(config, "batch_statistics") == "reduced",
    )
    replicas = [shared.replica(replica_id, whole=False, in_place=True) for replica_id in own]
    length, window = (layout.size, min(local.average_every, steps)) if local else (layout.read_size, 1)
    digest_every = config.audit.digest_every if training.audited else 0
    exchange = Exchange(joined, record, own, length, window, digest_every)
    if local is None:
        return shared, AllReduceOfProcesses(shared, replicas, exchange), replicas, exchange
    mode = between_processes.LocalSteps(shared, replicas, exchange, local.average_every, steps)
    return shared, mode, replicas, exchange


def _put_together(record: RunRecord, parts: list[Part]) -> None:
    """Make one record of all processes'."""
    record.replicas = [replica for part in parts for replica in part.replicas]
    references = [reference for part in parts for reference in part.references]
    record.references = sorted(references, key=lambda each: (each.step, each.replica_id))
    record.settings = {own: found for part in parts for own, found in part.settings.items()}
    record.copies = np.stack([part.copy for part in parts])
    record.first_calls = max(part.first_calls for part in parts)
    record.averages = [
        Average(step[0].step, max(each.largest for each in step), max(each.relative for each in step))
        for step in zip(*(part.averages for part in parts), strict=True)
    ]

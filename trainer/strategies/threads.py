"""`strategy=threads`: replicas are Python threads of one process, over one shared flat vector, on PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trainer.audit.recorder import Recorder
from trainer.audit.records import CODES, Noted, Reference, RunRecord
from trainer.bring import bring
from trainer.checkpoint.checkpoints import Checkpoints
from trainer.checkpoint.files import Arrays
from trainer.config import Config, Custom
from trainer.engines.capture import capture
from trainer.holders import mechanism
from trainer.schedule.operations import BEGIN
from trainer.schedule.point import mark
from trainer.state.cursor import Cursor, Sharded, SharedIterator
from trainer.state.gradients import GradientHolder, PerReplica, SharedGrad
from trainer.strategies.batches import PlannedBatches, batch_of
from trainer.strategies.computing import Computing
from trainer.strategies.hosting import (
    StopFlag,
    Watcher,
    compare_settings,
    turned_on,
)
from trainer.strategies.steps import Steps
from trainer.strategies.thread_host import ThreadHost
from trainer.strategies.traced_threads import traced, watch_training
from trainer.strategies.users_locks import watching
from trainer.updates.all_reduce import AllReduce, UnscaledSum
from trainer.updates.apart import Apart
from trainer.updates.shared_vector import Capture, Replica, SharedVector
from trainer.updates.transactions import (
    Locked,
    LockFree,
    Optimistic,
    Overwrite,
    PerVariableLock,
    ReaderWriter,
    Serialized,
    SlotsUnlocked,
    UpdateMode,
    WriteLocked,
    reads_in_place,
)
from trainer.workloads.train import Training

NUMBERS = 512  # step numbers that a replica makes at a time
UNNOTED = Noted(-1, -1, -1, -1, -1, -1)

MODES: dict[str, type[UpdateMode]] = {
    "all_reduce": AllReduce,
    "serialized": Serialized,
    "locked": Locked,
    "reader_writer": ReaderWriter,
    "optimistic": Optimistic,
    "per_variable_lock": PerVariableLock,
    "lock_free": LockFree,
    "slots_unlocked": SlotsUnlocked,
    "write_locked": WriteLocked,
    "overwrite": Overwrite,
    "unscaled_sum": UnscaledSum,
}


def prepare(num_replicas: int, threads_per_replica: int) -> None:
    """Set what the process must have before it computes anything."""
    # Threads started later inherit this; running ones keep what they have.
    torch.set_num_threads(threads_per_replica)


def train(
    config: Config,
    training: Training,
    record: RunRecord,
    watcher: Watcher,
    stop: StopFlag,
    checkpoints: Checkpoints | None = None,
) -> None:
    """Train with one thread a replica and fill `record`.

    Raises:
        RunBroken: a replica raised, or no replica finished a step for `watchdog.seconds`.
    """
    _run(config, training, record, watcher, stop, checkpoints)
    record.mode_left = training.mode_left


def _run(
    config: Config,
    training: Training,
    record: RunRecord,
    watcher: Watcher,
    stop: StopFlag,
    checkpoints: Checkpoints | None,
) -> None:
    with turned_on(training):
        steps: Steps | type[Steps] = Steps
        if config.train.engine == "native":
            # Here, for only this engine needs it.
            from trainer.strategies.native_threads import NativeThreads, compiled_loop

            steps = Steps(config, training)
            loop = compiled_loop(config, training, steps)
            if loop is not None:
                NativeThreads(config, training, record, watcher, stop, steps, loop, checkpoints).run()
                return
        build = partial(Threads, config, training, record, watcher, stop, steps=steps, checkpoints=checkpoints)
        if config.audit.trace_steps and not record.steps_done:
            traced(record, config.audit.trace_steps, build, watch_training, Threads.run)
        else:
            build().run()


def kind_of(config: Config) -> type[UpdateMode]:
    """The update mode's class, the user's own included."""
    option = config.update_mode
    kind: type[UpdateMode] = bring("update_mode", option) if isinstance(option, Custom) else MODES[option.name]
    return kind


def build_mode(
    config: Config,
    training: Training,
    *,
    kind: type[UpdateMode] | None = None,
    captured: Capture = capture,
    watch: Callable[[SharedVector], None] = lambda shared: None,
) -> tuple[SharedVector, UpdateMode, list[Replica]]:
    """The shared vector, the mode over it, and a workspace for each replica.

    Args:
        kind: the mode's class, where it is not to be the option's own.
        captured: captures the optimizer's rule.
        watch: called with the shared vector before anybody else has it.
    """
    kind = kind or kind_of(config)
    arguments = config.update_mode.arguments if isinstance(config.update_mode, Custom) else {}
    shared = SharedVector(
        training.initial,
        training.layout,
        training.optimizer,
        captured,
        num_trainers=training.num_trainers,
        growth_steps=training.growth_steps,
        averages_statistics=mechanism(config, "batch_statistics") == "reduced",
    )
    watch(shared)
    in_place = reads_in_place(kind)
    replicas = [
        shared.replica(own, whole=kind.whole_snapshot, in_place=in_place) for own in range(training.num_replicas)
    ]
    mode = kind(shared, replicas, **arguments)
    return shared, mode, replicas


class Threads(ThreadHost):
    """Replicas whose loop is Python: any update mode, state holder and audit, in free runs and under a schedule.

    Args:
        mode: the update mode with all that it works on; built where it is not given.
        steps: captured for an earlier run of the same configuration, or the class of those that are to be captured.
        checkpoints: where there are any to be made, or one to go on from.
    """

    def __init__(
        self,
        config: Config,
        training: Training,
        record: RunRecord,
        watcher: Watcher,
        stop: StopFlag,
        *,
        mode: tuple[SharedVector, UpdateMode, list[Replica]] | None = None,
        steps: Steps | type[Steps] = Steps,
        checkpoints: Checkpoints | None = None,
    ) -> None:
        locks = None
        if mode is None:
            with watching(config) as locks:
                mode = build_mode(config, training)
        shared, self.mode, replicas = mode
        self.replicas = {replica.replica_id: replica for replica in replicas}
        super().__init__(config, training, record, watcher, stop, shared, steps, checkpoints, list(self.replicas))
        self.locks = locks
        self.apart = Apart(self.shared) if training.layout.apart else None
        shares_grad = mechanism(config, "gradients") == "shared"
        self.gradients: GradientHolder = SharedGrad(training.layout) if shares_grad else PerReplica()
        self.steps.gradients = self.gradients
        self.cursor = self._cursor()
        self.computing = self._computing()
        self._audited, self._current = training.audited, training.precision.current

        # A sum per replica, each with one writer; in double precision, which adds no rounding of note to theirs.
        size = (training.num_replicas, training.layout.size)
        self.added = torch.zeros(size, dtype=torch.float64) if config.audit.name == "full" else None
        self.magnitudes = torch.zeros_like(self.added) if self.added is not None else torch.empty(0)

    def abort(self) -> None:
        self.mode.abort()

    def finish(self) -> None:
        super().finish()
        if self.added is not None:
            self.record.added = self.added.sum(dim=0).numpy()
            self.record.magnitudes = self.magnitudes.sum(dim=0).numpy()

    def state(self) -> tuple[Arrays, dict[str, Any]]:
        arrays: Arrays = {}
        if self.added is not None:
            arrays |= {"added": self.added.sum(dim=0).numpy(), "magnitudes": self.magnitudes.sum(dim=0).numpy()}
        return arrays, {"position": self.cursor.position} if isinstance(self.cursor, SharedIterator) else {}

    def go_on(self) -> None:
        super().go_on()
        assert self.checkpoints is not None
        arrays, facts = self.checkpoints.arrays, self.checkpoints.facts
        if isinstance(self.cursor, SharedIterator):
            self.cursor.position = facts["position"]
        if self.added is not None:
            self.added[0] = torch.from_numpy(arrays["added"])
            self.magnitudes[0] = torch.from_numpy(arrays["magnitudes"])

    # What a replica's thread does.

    def take_steps(self, own: int) -> None:
        torch.set_grad_enabled(False)  # thread-local: each replica sets its own
        recorder = Recorder(self.record.replicas[own], self.training.row, self.training.layout)
        compare_settings(self.record, own)
        try:
            meets = self.meets_after(self.first_step)
            for step, number in enumerate(self._numbers(), self.first_step):
                if self.ended.is_set():
                    break
                self._take_step(self.replicas[own], recorder, step, number)
                if step + 1 == meets:
                    recorder.flush()
                    meets = self.meet(own, meets)
        finally:
            recorder.flush()
            compare_settings(self.record, own)

    def _take_step(self, replica: Replica, recorder: Recorder, step: int, number: Tensor) -> None:
        own = replica.replica_id
        computing = self.computing[own]
        mark(BEGIN)
        batch, samples = self.cursor.take(own, step)
        refers = step in self.reference_steps
        evaluates = own == 0 and self.evaluates_at(step)
        entry = self._current() if self._audited else None
        replica.keeps = refers or self.added is not None
        wanted = refers or evaluates
        computing.begin(number, samples, reads=wanted and replica.in_place)

        self.mode.step(replica, computing)
        assert computing.row is not None, "the update mode took no step"
        if self.apart is not None:
            self.apart.write(replica)
        recorder.note(
            computing.row.numpy(), self._noted(replica, computing, batch, entry) if self._audited else UNNOTED
        )
        if self.added is not None and (added := self.mode.added(replica)) is not None:
            self.added[own] += added
            self.magnitudes[own] += self.shared.plain.abs()
        if wanted and not replica.in_place:
            # Only now: nobody else may have written to it since it was filled, and the audit would see that.
            computing.read = replica.prefix.numpy().copy()
        if evaluates:
            self.to_evaluate.put((step, computing.read))
        if refers and own < self.training.num_trainers:
            self._refer(replica, computing, step, batch)

    def _noted(self, replica: Replica, computing: Computing, batch: int, entry: str | None) -> Noted:
        mixed = self.gradients.mixed()
        return Noted(
            replica.version,
            replica.staleness,
            batch,
            CODES[computing.asked],
            CODES[entry],
            CODES[self._current()],
            -1 if mixed is None else mixed,
            computing.made_first,
        )

    def _refer(self, replica: Replica, computing: Computing, step: int, batch: int) -> None:
        """Keep what the audit compares gradients by."""
        own = replica.replica_id
        self.references[own].append(
            Reference(
                own,
                step,
                computing.read,
                replica.contribution.numpy().copy(),
                self.mode.applied(replica).numpy().copy(),
                batch=batch,
                asked=computing.asked,
            )
        )

    def _numbers(self) -> Iterator[Tensor]:
        """Each step's number, an int64 scalar."""
        steps = self.config.train.steps
        for first in range(self.first_step, steps, NUMBERS):
            yield from torch.arange(first, min(first + NUMBERS, steps)).unbind()

    # What the main thread does before.

    def _computing(self) -> dict[int, Computing]:
        """Each replica's; one that looks at every gradient or has faults only where that was asked for."""
        kind: type[Computing] = Computing
        if self.config.faults or self.config.train.on_nonfinite == "stop":
            from trainer.strategies.guarded_threads import GuardedComputing

            kind = GuardedComputing
        return {own: kind(self, own) for own in self.hosted}

    def _cursor(self) -> Cursor[Tensor]:
        num_replicas = self.training.num_replicas
        if mechanism(self.config, "cursor") == "sharded":
            return Sharded(PlannedBatches(self.training.batches, self.config.train.steps).fetch, num_replicas)
        x = torch.from_numpy(self.training.dataset.train_x)

        def fetch(number: int) -> Tensor:
            samples = batch_of(self.training.batches, number)
            # As a loader of a map-style dataset: sample by sample, then stacked. Steps gather by index what was read.
            torch.stack([x[index] for index in samples.tolist()])
            return samples

        return SharedIterator(fetch, self.config.train.steps * num_replicas)

    def make_first_call(self) -> None:
        """So that no replica's call is the first; capturing the step has been one."""
        if not self.steps.captures:
            prefix = torch.from_numpy(self.training.initial[: self.training.layout.read_size].copy())
            with torch.no_grad(), self.training.put_back():
                _, samples = self.cursor.take(0, 0)
                self.steps.take(0, prefix, torch.tensor(0), samples, self.training.asked[0])
            self.cursor = self._cursor()

"""`strategy=threads`: replicas are Python threads of one process, over one shared flat vector, on PyTorch."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from trainer.audit.recorder import Recorder
from trainer.audit.records import CODES, Floats, Noted, Reference, RunRecord
from trainer.bring import bring
from trainer.config import Config, Custom
from trainer.holders import holder, mechanism
from trainer.schedule.operations import BEGIN, COMPUTE, GENERATOR, UPDATE
from trainer.schedule.point import mark, point
from trainer.state.cursor import Cursor, Sharded, SharedIterator
from trainer.state.gradients import GradientHolder, PerReplica, SharedGrad
from trainer.strategies.batches import PlannedBatches, batch_of
from trainer.strategies.capture import capture
from trainer.strategies.hosting import (
    StopFlag,
    Watcher,
    compare_settings,
    complete_references,
    evaluate,
    expect,
    joint_samples,
    reference_steps,
    turned_on,
)
from trainer.strategies.replica_threads import ReplicaThreads
from trainer.strategies.steps import Steps
from trainer.strategies.traced_threads import traced, watch_training
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
)
from trainer.workloads.train import Training

NUMBERS = 512  # step numbers that a replica makes at a time

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


def train(config: Config, training: Training, record: RunRecord, watcher: Watcher, stop: StopFlag) -> None:
    """Train with one thread a replica and fill `record`.

    Raises:
        RunBroken: a replica raised, or no replica finished a step for `train.stall_seconds`.
    """
    build = partial(Threads, config, training, record, watcher, stop)
    with turned_on(training):
        if config.audit.trace_steps:
            traced(record, config.audit.trace_steps, build, watch_training, Threads.run)
        else:
            build().run()
    record.mode_left = training.mode_left


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
    replicas = [shared.replica(own, whole=kind.whole_snapshot) for own in range(training.num_replicas)]
    mode = kind(shared, replicas, **arguments)
    return shared, mode, replicas


def draw(shape: tuple[int, int]) -> Tensor:
    """32-bit words from PyTorch's process-wide generator: int64."""
    point(UPDATE, "generator", of=GENERATOR)
    return torch.randint(0, 2**32, shape, dtype=torch.int64)


class Threads:
    """Built and run by the main thread, with the precision mode turned on if that is main's to do.

    Args:
        mode: the update mode with all that it works on; built where it is not given.
        steps: captured for an earlier run of the same configuration, or the class of those that are to be captured.
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
    ) -> None:
        self.config, self.training, self.record = config, training, record
        self.watcher, self.stop = watcher, stop
        self.shared, self.mode, self.replicas = mode or build_mode(config, training)
        self.apart = Apart(self.shared) if training.layout.apart else None
        self.reference_steps, record.references_skipped = reference_steps(config, training.layout)
        if not training.derived:
            training.generator = draw
        shares_grad = mechanism(config, "gradients") == "shared"
        self.gradients: GradientHolder = SharedGrad(training.layout) if shares_grad else PerReplica()
        self.steps = steps if isinstance(steps, Steps) else steps(config, training)
        self.steps.gradients = self.gradients
        record.engine, record.compiled = self.steps.engine, self.steps.compiled
        self.cursor = self._cursor()
        self.first_by_main = mechanism(config, "first_call") == "before_start"
        self.runners = [training.precision.hand_over() for _ in self.replicas]

        # A sum per replica, each with one writer; in double precision, which adds no rounding of note to theirs.
        size = (training.num_replicas, training.layout.size)
        self.added = torch.zeros(size, dtype=torch.float64) if config.audit.name == "full" else None
        self.magnitudes = torch.zeros_like(self.added) if self.added is not None else torch.empty(0)
        self.to_evaluate: queue.SimpleQueue[tuple[int, Floats]] = queue.SimpleQueue()
        self.references: list[list[Reference]] = [[] for _ in self.replicas]
        self.ended = threading.Event()

    def run(self) -> None:
        """Run the replicas freely."""
        threads = ReplicaThreads(
            self.record,
            self.replica,
            self.ended,
            abort=self.mode.abort,
            report=self._report,
            stop=self.stop,
            stall_seconds=self.config.train.stall_seconds,
        )
        self.begin()
        threads.run()
        self.record.duration_seconds = threads.seconds
        self.finish()
        if not self.stop.is_set():
            self._evaluate(self.config.train.steps, self.shared.plain.numpy())
            self.complete()

    def begin(self, *, again: bool = False) -> None:
        """What comes before the replicas' first steps.

        Args:
            again: an earlier run in this process had the same steps, so that their first call was made.
        """
        if self.first_by_main:
            self.record.first_calls = 1
            if not again:
                self._make_first_call()
        if not self.training.derived:
            torch.manual_seed(self.training.seed)
            self.record.settings_asked = {**self.record.settings_asked, "torch seed": str(self.training.seed)}

    def replica(self, own: int) -> None:
        """The body of one replica's thread."""
        self.runners[own](lambda: self._replica(own))

    def finish(self) -> None:
        """Put down what the replicas have left."""
        if self.added is not None:
            self.record.added = self.added.sum(dim=0).numpy()
            self.record.magnitudes = self.magnitudes.sum(dim=0).numpy()
        self.record.copies = self.shared.plain.numpy()[np.newaxis].copy()
        self.record.references = sorted(
            (reference for own in self.references for reference in own), key=lambda r: (r.step, r.replica_id)
        )

    def complete(self) -> None:
        """Compute again what the audit holds the replicas' gradients to."""
        if self.training.audited:
            self._expect()
            with torch.no_grad():
                complete_references(self.record, self._recompute, self._joint)

    # What a replica's thread does.

    def _replica(self, own: int) -> None:
        torch.set_grad_enabled(False)  # thread-local: each replica sets its own
        recorder = Recorder(self.record.replicas[own], self.training.row, self.training.layout)
        compare_settings(self.record, own)
        try:
            for step, number in enumerate(self._numbers()):
                if self.ended.is_set():
                    break
                self._take_step(self.replicas[own], recorder, step, number)
        finally:
            recorder.flush()
            compare_settings(self.record, own)

    def _take_step(self, replica: Replica, recorder: Recorder, step: int, number: Tensor) -> None:
        own, training = replica.replica_id, self.training
        mark(BEGIN)
        batch, samples = self.cursor.take(own, step)
        current = training.precision.current
        entry = current()
        row, asked, made_first = None, training.asked[own], False

        def compute(replica: Replica) -> None:
            nonlocal row, asked, made_first
            mark(COMPUTE)
            if self.steps.captures and training.draws and not training.derived:
                # A captured step draws where nobody can come in between, so all of it is announced at once.
                point(UPDATE, "generator", of=GENERATOR)
            if self.first_by_main:
                replica.contribution, row = self.steps.take(own, replica.prefix, number, samples, asked)
            else:
                with training.first_call.call() as first:
                    # What the attempt that counts was asked for: a mode may compute a gradient again.
                    asked = "float32" if first else training.asked[own]
                    replica.contribution, row = self.steps.take(own, replica.prefix, number, samples, asked)
                made_first = made_first or first
            if self.apart is not None:
                self.apart.take(replica)

        self.mode.step(replica, compute)
        assert row is not None, "the update mode took no step"
        if self.apart is not None:
            self.apart.write(replica)
        mixed = self.gradients.mixed()
        left = current()
        recorder.note(
            row.numpy(),
            Noted(
                replica.version,
                replica.staleness,
                batch,
                CODES[asked],
                CODES[entry],
                CODES[left],
                -1 if mixed is None else mixed,
                made_first,
            ),
        )
        if self.added is not None and (added := self.mode.added(replica)) is not None:
            self.added[own] += added
            self.magnitudes[own] += self.shared.plain.abs()
        if own == 0 and self._evaluates_at(step):
            self.to_evaluate.put((step, replica.snapshot.numpy().copy()))
        if step in self.reference_steps and own < training.num_trainers:
            self.references[own].append(
                Reference(
                    own,
                    step,
                    replica.prefix.numpy().copy(),
                    replica.contribution.numpy().copy(),
                    self.mode.applied(replica).numpy().copy(),
                    batch=batch,
                    asked=asked,
                )
            )

    def _numbers(self) -> Iterator[Tensor]:
        """Each step's number, an int64 scalar."""
        steps = self.config.train.steps
        for first in range(0, steps, NUMBERS):
            yield from torch.arange(first, min(first + NUMBERS, steps)).unbind()

    def _evaluates_at(self, step: int) -> bool:
        every = self.config.train.evaluate_every
        return every > 0 and step > 0 and step % every == 0

    # What the main thread does before, meanwhile and afterwards.

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

    def _make_first_call(self) -> None:
        """So that no replica's call is the first; capturing the step has been one."""
        if not self.steps.captures:
            prefix = torch.from_numpy(self.training.initial[: self.training.layout.read_size].copy())
            with torch.no_grad(), self.training.put_back():
                _, samples = self.cursor.take(0, 0)
                self.steps.take(0, prefix, torch.tensor(0), samples, self.training.asked[0])
            self.cursor = self._cursor()

    def _report(self) -> None:
        self.watcher.progress(self.record)
        if self.training.audited:
            # Read while replicas write: what is under way may be missing from `kept`.
            kept = self.training.layout.kept(self.shared.plain.numpy())
            self.watcher.kept(self.record.steps_done, float(kept.sum()), sum(self.shared.commits))
        while not self.to_evaluate.empty():
            self._evaluate(*self.to_evaluate.get())

    def _evaluate(self, step: int, vector: Floats) -> None:
        def predict(x: Floats) -> Floats:
            with torch.no_grad():
                logits: Floats = self.training.predict(prefix, torch.from_numpy(x)).numpy()
            return logits

        prefix = torch.from_numpy(vector[: self.training.layout.read_size])
        evaluation = evaluate(step, predict, self.training.dataset.test_x, self.training.dataset.test_y)
        self.record.evaluations.append(evaluation)
        self.watcher.evaluated(evaluation)

    def _expect(self) -> None:
        """Put down what the audit holds batches and random numbers to."""
        training, record = self.training, self.record
        expect(record, training)
        if self.steps.captures and holder(self.config, "precision").safe != "always":
            record.frozen = "main captured the step for each dtype: changes of mode inside it do not reach the layers"
        if training.draws and not training.derived:
            record.expected_words = self._words_in_turn(self.config.train.steps)

    def _words_in_turn(self, steps: int) -> Floats:
        """What each step would have drawn from the shared generator, had replicas come in turn."""
        generator = torch.Generator().manual_seed(self.training.seed)
        words = np.full((self.training.num_replicas, steps, 2), -1, np.float32)
        for step in range(steps):
            for own in range(self.training.num_trainers):
                for index, drawn in enumerate(self.training.draws):
                    assert drawn.batch is not None
                    shape = (drawn.batch, drawn.num_elements)
                    found = torch.randint(0, 2**32, shape, dtype=torch.int64, generator=generator)
                    if not index:
                        words[own, step] = (found[[0, -1], 0] >> 8).numpy()
        return words

    def _recompute(self, reference: Reference) -> Floats:
        own, samples = reference.replica_id, batch_of(self.training.batches, reference.batch)
        return self.steps.again(
            own, reference.snapshot, reference.step, samples, self.steps.positions(own), reference.asked
        )

    def _joint(self, reference: Reference) -> Floats:
        """The gradient of the batches that the training replicas used at the reference's step, taken as one."""
        samples = torch.from_numpy(joint_samples(self.record, self.training, reference.step)).to(torch.int64)
        positions = torch.arange(len(samples), dtype=torch.int32)
        return self.steps.again(
            reference.replica_id, reference.snapshot, reference.step, samples, positions, reference.asked
        )

"""`strategy=threads`: replicas are Python threads of one process, over one shared flat vector, on PyTorch."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.audit.recorder import Recorder
from trainer.audit.records import Floats, Reference, RunRecord
from trainer.bring import bring
from trainer.config import Config, Custom
from trainer.strategies.capture import Captured, capture
from trainer.strategies.hosting import (
    StopFlag,
    Watcher,
    complete_references,
    evaluate,
    reference_steps,
)
from trainer.strategies.replica_threads import ReplicaThreads
from trainer.updates.all_reduce import AllReduce, UnscaledSum
from trainer.updates.shared_vector import Replica, SharedVector
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

PLAN_STEPS = 512  # steps of the batch plan that a replica holds at a time

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
    _Threads(config, training, record, watcher, stop).run()


def gradients_by_autograd(
    loss_of: Callable[[list[Tensor]], tuple[Tensor, Any]], weights: list[Tensor]
) -> tuple[Tensor, Any, Sequence[Tensor]]:
    """A loss and its gradients, computed in a graph of their own: nothing is kept in a shared `.grad`."""
    with torch.enable_grad():
        leaves = [weight.detach().requires_grad_() for weight in weights]
        loss, rest = loss_of(leaves)
        return loss, rest, torch.autograd.grad(loss, leaves, allow_unused=True)


def build_mode(option: Any, initial: Floats, training: Training) -> tuple[SharedVector, UpdateMode, list[Replica]]:
    """The shared vector, the mode over it, and a workspace for each replica."""
    brought = isinstance(option, Custom)
    kind = bring("update_mode", option) if brought else MODES[option.name]
    arguments = option.arguments if brought else {}
    shared = SharedVector(initial, training.layout, training.optimizer, capture)
    replicas = [shared.replica(own, whole=kind.whole_snapshot) for own in range(training.num_replicas)]
    mode = kind(shared, replicas, **arguments)
    return shared, mode, replicas


class _Threads:
    def __init__(self, config: Config, training: Training, record: RunRecord, watcher: Watcher, stop: StopFlag) -> None:
        self.config, self.training, self.record = config, training, record
        self.watcher, self.stop = watcher, stop
        self.shared, self.mode, self.replicas = build_mode(config.update_mode, training.initial, training)
        self.reference_steps, record.references_skipped = reference_steps(config, training.layout)
        self.train_x = torch.from_numpy(training.dataset.train_x)
        self.train_y = torch.from_numpy(training.dataset.train_y)
        self.templates = [
            torch.from_numpy(training.layout.own_canaries(replica.replica_id)) for replica in self.replicas
        ]
        self.positions = [torch.from_numpy(training.positions(replica.replica_id)) for replica in self.replicas]
        self.step = self._capture(training.batch_size)
        record.engine = self.step.engine

        # A sum per replica, each with one writer; in double precision, which adds no rounding of note to theirs.
        size = (training.num_replicas, training.layout.size)
        self.added = torch.zeros(size, dtype=torch.float64) if config.audit.name == "full" else None
        self.magnitudes = torch.zeros_like(self.added) if self.added is not None else torch.empty(0)
        self.to_evaluate: queue.SimpleQueue[tuple[int, Floats]] = queue.SimpleQueue()
        self.references: list[list[Reference]] = [[] for _ in self.replicas]
        self.threads = ReplicaThreads(
            record,
            self._replica,
            abort=self.mode.abort,
            report=self._report,
            stop=stop,
            stall_seconds=config.train.stall_seconds,
        )

    def run(self) -> None:
        self.threads.run()
        self.record.duration_seconds = self.threads.seconds
        if self.added is not None:
            self.record.added = self.added.sum(dim=0).numpy()
            self.record.magnitudes = self.magnitudes.sum(dim=0).numpy()
        self.record.copies = self.shared.vector.numpy()[np.newaxis].copy()
        self.record.references = sorted(
            (reference for own in self.references for reference in own), key=lambda r: (r.step, r.replica_id)
        )
        if not self.stop.is_set():
            self._evaluate(self.config.train.steps, self.record.copies[0])
            self._complete_references()

    # What a replica's thread does.

    def _replica(self, own: int) -> None:
        torch.set_grad_enabled(False)  # thread-local: each replica sets its own
        recorder = Recorder(self.record.replicas[own], self.training.num_replicas, self.training.probe_size)
        try:
            for step, (number, samples) in enumerate(self._batches(own)):
                if self.threads.ended.is_set():
                    break
                self._take_step(self.replicas[own], recorder, step, number, samples)
        finally:
            recorder.flush()

    def _take_step(self, replica: Replica, recorder: Recorder, step: int, number: Tensor, samples: Tensor) -> None:
        own = replica.replica_id
        row = None

        def compute(replica: Replica) -> None:
            nonlocal row
            replica.contribution, row = self._captured_step(own, replica.prefix, number, samples)

        self.mode.step(replica, compute)
        assert row is not None, "the update mode took no step"
        recorder.note(row.numpy(), replica.version, replica.staleness)
        if self.added is not None and (added := self.mode.added(replica)) is not None:
            self.added[own] += added
            self.magnitudes[own] += self.shared.vector.abs()
        if own == 0 and self._evaluates_at(step):
            self.to_evaluate.put((step, replica.snapshot.numpy().copy()))
        if step in self.reference_steps:
            self.references[own].append(
                Reference(
                    own,
                    step,
                    replica.prefix.numpy().copy(),
                    replica.contribution.numpy().copy(),
                    self.mode.applied(replica).numpy().copy(),
                )
            )

    def _captured_step(self, own: int, prefix: Tensor, number: Tensor, samples: Tensor) -> tuple[Tensor, Tensor]:
        contribution, row = self.step(
            prefix, self.templates[own], self.train_x, self.train_y, samples, number, self.positions[own]
        )
        return contribution, row

    def _batches(self, own: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Each step's number, an int64 scalar, and this replica's sample indices, int64 [batch]."""
        steps = self.config.train.steps
        for first in range(0, steps, PLAN_STEPS):
            last = min(first + PLAN_STEPS, steps)
            plan = torch.from_numpy(self.training.batches.indices(first, last)[:, own].astype(np.int64))
            yield from zip(torch.arange(first, last).unbind(), plan.unbind(), strict=True)

    def _evaluates_at(self, step: int) -> bool:
        every = self.config.train.evaluate_every
        return every > 0 and step > 0 and step % every == 0

    # What the main thread does meanwhile and afterwards.

    def _report(self) -> None:
        self.watcher.progress(self.record)
        if self.training.audited:
            # Read while replicas write: what is under way may be missing from `kept`.
            kept = self.training.layout.kept(self.shared.vector.numpy())
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

    def _capture(self, batch_size: int) -> Captured:
        def step(
            prefix: Tensor, template: Tensor, x: Tensor, y: Tensor, samples: Tensor, step: Tensor, positions: Tensor
        ) -> tuple[Tensor, Tensor]:
            contribution, row = self.training.step(
                gradients_by_autograd, prefix, template, x[samples], y[samples], step, positions
            )
            return contribution.detach(), row.detach()

        return capture(
            step,
            self.shared.vector[: self.training.layout.read_size].clone(),
            self.templates[0],
            self.train_x,
            self.train_y,
            torch.arange(batch_size),
            torch.tensor(0),
            torch.arange(batch_size, dtype=torch.int32),
        )

    def _complete_references(self) -> None:
        if not self.record.references:
            return
        joint_size = self.training.num_replicas * self.training.batch_size
        joint_step = self.step if joint_size == self.training.batch_size else self._capture(joint_size)
        joint_positions = torch.arange(joint_size, dtype=torch.int32)

        def samples(step: int) -> NDArray[np.int64]:
            plan: NDArray[np.int64] = self.training.batches.indices(step, step + 1)[0].astype(np.int64)
            return plan

        def recompute(reference: Reference) -> Floats:
            own = torch.from_numpy(samples(reference.step)[reference.replica_id])
            snapshot = torch.from_numpy(reference.snapshot)
            contribution, _ = self._captured_step(reference.replica_id, snapshot, torch.tensor(reference.step), own)
            vector: Floats = contribution.numpy()
            return vector

        def joint(reference: Reference) -> Floats:
            contribution, _ = joint_step(
                torch.from_numpy(reference.snapshot),
                self.templates[reference.replica_id],
                self.train_x,
                self.train_y,
                torch.from_numpy(samples(reference.step).reshape(-1)),
                torch.tensor(reference.step),
                joint_positions,
            )
            vector: Floats = contribution.numpy()
            return vector

        with torch.no_grad():
            complete_references(self.record, recompute, joint)

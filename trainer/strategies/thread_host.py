"""What hosts replicas that are threads over one shared vector, whatever runs their loop."""

from __future__ import annotations

import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from trainer.audit.records import Floats, Reference, RunRecord
from trainer.checkpoint.checkpoints import Checkpoints
from trainer.checkpoint.contents import Snapshot, snapshot
from trainer.checkpoint.files import Arrays
from trainer.config import Config
from trainer.holders import holder, mechanism
from trainer.strategies.batches import batch_of
from trainer.strategies.hosting import (
    StopFlag,
    Watcher,
    complete_references,
    evaluate,
    expect,
    joint_samples,
    reference_steps,
)
from trainer.strategies.lock_watch import LockWatch
from trainer.strategies.meeting import Meeting
from trainer.strategies.replica_threads import ReplicaThreads
from trainer.strategies.steps import Steps
from trainer.updates.shared_vector import SharedVector
from trainer.workloads.train import Training

TELLS_AFTER = 19  # times what telling took before it is done again


class ThreadHost(ABC):
    """Built and run by the main thread, with the precision mode turned on if that is main's to do.

    Attributes:
        to_evaluate: step and weights (float32, [read_size] or more) that a replica wants evaluated.
        references: what replicas have kept for the audit, a list each.
        ended: replicas are to begin no further step.
        first_step: the step to begin with, above 0 where a checkpoint is resumed.
        locks: watches the locks of the update mode, where any are watched.

    Args:
        steps: captured already, or the class of those that are to be captured.
        checkpoints: where there are any to be made, or one to go on from.
        hosted: the replicas whose threads are here; all where None.
    """

    def __init__(
        self,
        config: Config,
        training: Training,
        record: RunRecord,
        watcher: Watcher,
        stop: StopFlag,
        shared: SharedVector,
        steps: Steps | type[Steps],
        checkpoints: Checkpoints | None = None,
        hosted: Sequence[int] | None = None,
    ) -> None:
        self.config, self.training, self.record = config, training, record
        self.watcher, self.stop, self.shared = watcher, stop, shared
        self.reference_steps, record.references_skipped = reference_steps(config, training.layout)
        self.steps = steps if isinstance(steps, Steps) else steps(config, training)
        record.engine, record.compiled = self.steps.engine, self.steps.compiled
        self.first_by_main = mechanism(config, "first_call") == "before_start"
        self.runners = [training.precision.hand_over() for _ in range(training.num_replicas)]
        self.to_evaluate: queue.SimpleQueue[tuple[int, Floats]] = queue.SimpleQueue()
        self.references: list[list[Reference]] = [[] for _ in range(training.num_replicas)]
        self.ended = threading.Event()
        self.hosted: Sequence[int] = range(training.num_replicas) if hosted is None else hosted
        self.locks: LockWatch | None = None
        self._reports_again = 0.0
        self.checkpoints = checkpoints
        self.first_step = 0 if checkpoints is None else checkpoints.first_step
        self._meeting: Meeting | None = None
        if checkpoints is not None:
            self._meeting = Meeting(self.hosted, training.precision, self._snapshot, self.ended)
        self._began = 0.0

    @abstractmethod
    def take_steps(self, own: int) -> None:
        """All steps of one replica, by its thread, until `ended`."""

    @abstractmethod
    def abort(self) -> None:
        """Wake replicas that wait for each other."""

    @abstractmethod
    def make_first_call(self) -> None:
        """So that no replica's call of the step is the first one."""

    def run(self) -> None:
        """Run the replicas freely."""
        threads = ReplicaThreads(
            self.record,
            self.replica,
            self.ended,
            abort=self._wake,
            report=self.report,
            stop=self.stop,
            stall_seconds=self.config.watchdog.seconds,
            locks=self.locks,
            hosted=self.hosted,
        )
        self.begin()
        if self.first_step:
            self.go_on()
        before = self.record.duration_seconds
        self._began = time.perf_counter() - before
        threads.run()
        self.record.duration_seconds = before + threads.seconds
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
                self.make_first_call()
        if not self.training.derived:
            torch.manual_seed(self.training.seed)
            self.record.settings_asked = {**self.record.settings_asked, "torch seed": str(self.training.seed)}

    def go_on(self) -> None:
        """Be where the run was that is resumed; what threads have for themselves they put back (`Meeting.resume`)."""
        assert self.checkpoints is not None
        arrays, facts = self.checkpoints.arrays, self.checkpoints.facts
        self.shared.plain.copy_(torch.from_numpy(arrays["copies"][0]))
        self.shared.commits[:] = facts["commits"]
        if "generator" in arrays:
            torch.set_rng_state(torch.from_numpy(arrays["generator"]))
        with self.training.first_call.call():
            pass  # it was made, by whoever was to make it
        for reference in self.record.references:
            self.references[reference.replica_id].append(reference)

    def replica(self, own: int) -> None:
        """The body of one replica's thread."""
        self.runners[own](lambda: self._take_steps(own))

    def _take_steps(self, own: int) -> None:
        if self.first_step and self._meeting is not None and self.checkpoints is not None:
            self._meeting.resume(own, self.checkpoints.facts["modes"][self.hosted.index(own)])
        self.take_steps(own)

    # Checkpoints.

    def meets_after(self, step: int) -> int:
        """The number of steps after which replicas meet next, beyond `step`; -1 where they do not."""
        return -1 if self.checkpoints is None else self.checkpoints.after(step)

    def meet(self, own: int, step: int) -> int:
        """Come to a step's end with its rows read off, and go on when all have come.

        Returns:
            When replicas meet next.

        Raises:
            threading.BrokenBarrierError: the run is to end.
        """
        assert self._meeting is not None
        if self.record.replicas[own].steps_done != step:
            raise threading.BrokenBarrierError  # it was stopped in between
        self._meeting.attend(own, step)
        return self.meets_after(step)

    def _snapshot(self, step: int) -> Snapshot:
        """What there is at a step's end; replicas wait meanwhile."""
        assert self._meeting is not None
        arrays, facts = self.state()
        arrays["copies"] = self.shared.plain.numpy()[np.newaxis].copy()
        if not self.training.derived:
            arrays["generator"] = torch.get_rng_state().numpy().copy()
        facts |= {"commits": self.committed(), "modes": list(self._meeting.modes.values())}
        seconds = time.perf_counter() - self._began
        references = [reference for own in self.references for reference in own]
        return snapshot(self.record, step, seconds, arrays, facts, references)

    def state(self) -> tuple[Arrays, dict[str, Any]]:
        """What else the host keeps, to be saved: arrays, and JSON."""
        return {}, {}

    def committed(self) -> list[int]:
        """Updates committed by each replica."""
        return list(self.shared.commits)

    def _wake(self) -> None:
        self.abort()
        if self._meeting is not None:
            self._meeting.abort()

    def finish(self) -> None:
        """Put down what the replicas have left."""
        self.record.copies = self.shared.plain.numpy()[np.newaxis].copy()
        self.record.references = sorted(
            (reference for own in self.references for reference in own), key=lambda r: (r.step, r.replica_id)
        )

    def complete(self) -> None:
        """Compute again what the audit holds the replicas' gradients to."""
        if self.training.audited:
            self._expect()
            with torch.no_grad():
                complete_references(self.config, self.record, self._recompute, self._joint)

    def evaluates_at(self, step: int) -> bool:
        every = self.config.train.evaluate_every
        return every > 0 and step > 0 and step % every == 0

    def report(self) -> None:
        goes_on = self.record.steps_done < self.config.train.steps and not self.stop.is_set()
        if not goes_on or time.perf_counter() >= self._reports_again:
            self._tell()
        # Before the evaluations that belong to it: they were asked for before it was taken.
        taken = None if self._meeting is None else self._meeting.taken()
        while not self.to_evaluate.empty():
            self._evaluate(*self.to_evaluate.get())
        if taken is not None and self.checkpoints is not None:
            # Step s is evaluated by whoever takes it, which comes after s steps are done.
            self.checkpoints.write(
                self.record, taken, [each for each in self.record.evaluations if each.step < taken.step]
            )

    def _tell(self) -> None:
        """Tell how the run goes, in a twentieth of the time at most: what writes rows takes the GIL, and a core."""
        began = time.perf_counter()
        self.watcher.progress(self.record)
        if self.training.audited:
            # Read while replicas write: what is under way may be missing from `kept`.
            kept = self.training.layout.kept(self.shared.plain.numpy())
            self.watcher.kept(self.record.steps_done, float(kept.sum()), sum(self.shared.commits))
        ended = time.perf_counter()
        self._reports_again = ended + TELLS_AFTER * (ended - began)

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

    def _joint(self, reference: Reference, dtype: str) -> Floats:
        """The gradient of the batches that the training replicas used at the reference's step, taken as one."""
        samples = torch.from_numpy(joint_samples(self.record, self.training, reference.step)).to(torch.int64)
        positions = torch.arange(len(samples), dtype=torch.int32)
        return self.steps.again(reference.replica_id, reference.snapshot, reference.step, samples, positions, dtype)

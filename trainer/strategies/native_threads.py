"""`train.engine=native`: threads whose steps run in the native loop, several in one call outside the interpreter.

A thread comes back to Python when the host has something to do: a gradient reference, an evaluation, a look at the
clock. What the loop cannot do, the loop in Python does (`why_not`), with the same compiled step.
"""

from __future__ import annotations

import ctypes
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trainer.audit.recorder import Recorder
from trainer.audit.records import CODES, Noted, Reference, RunRecord
from trainer.audit.spans import DATA, LOGGING, MAX_SPANS, READ, UPDATE, WRITE, Span, Trace
from trainer.checkpoint.checkpoints import Checkpoints
from trainer.config import Config, Custom
from trainer.describe import cores
from trainer.engines.library import CannotCompile
from trainer.engines.library_calls import Bound
from trainer.engines.native.build import load_loop
from trainer.engines.native.loop import KINDS, LoopFailed, NativeLoop, Taken, Update
from trainer.holders import mechanism
from trainer.strategies.hosting import StopFlag, Watcher, compare_settings
from trainer.strategies.steps import Steps
from trainer.strategies.thread_host import ThreadHost
from trainer.updates.shared_vector import SharedVector
from trainer.workloads.train import Training

log = logging.getLogger(__name__)

CALL_SECONDS = 0.1  # what one call should take, so that progress shows and Ctrl-C is heeded
FIRST_STEPS = 8
KEPT_BYTES = 64 * 2**20  # of vectors that one call keeps
NAMES = {READ: "read snapshot", WRITE: "write", UPDATE: "update"}  # of spans that are not called by their kind
JOINT = ("all_reduce", "unscaled_sum")


@dataclass
class Inputs:
    """What a replica's compiled step is called with that differs from replica to replica or from step to step.

    Attributes:
        prefix: float32 [read_size], what the step reads: of the snapshot, or of the shared vector itself.
        samples: int64 [batch_size]; number: int64 scalar; the loop fills both before each step.
        snapshot: float32, None where the step reads in place.
        bound: the step with these inputs, once the replica's thread has bound it.
    """

    prefix: Tensor
    samples: Tensor
    number: Tensor
    snapshot: Tensor | None
    bound: Bound | None = None


def compiled_loop(config: Config, training: Training, steps: Steps) -> ctypes.CDLL | None:
    """The loop's functions; none where the loop has to run in Python, which is logged."""
    why = why_not(config, training, steps)
    if not why and steps.compiler is not None:
        try:
            return load_loop(steps.compiler.store)
        except CannotCompile as error:
            why = str(error)
    log.warning("The replicas' loop runs in Python, not compiled: %s.", why.removesuffix("."))
    return None


def why_not(config: Config, training: Training, steps: Steps) -> str:
    """Why the replicas' loop has to run in Python; nothing where it need not."""
    if not steps.libraries:
        return "the captured step is no compiled library"
    if isinstance(config.update_mode, Custom):
        return "an update mode of your own is Python"
    if config.audit.name == "full":
        return "audit=full sums every step's delta in Python"
    if config.faults:
        return "faults are injected in Python"
    if config.train.on_nonfinite != "continue":
        return f"train.on_nonfinite={config.train.on_nonfinite} looks at every gradient in Python"
    if training.layout.apart:
        return "state holders write a part of the variables by themselves"
    if training.layout.loss_scale:
        return f"precision={config.precision.name} has a loss scale"
    for key, fits in (("gradients", "per_replica"), ("cursor", "sharded"), ("first_call", "before_start")):
        if (held := mechanism(config, key)) != fits:
            return f"state.{key}={held} is Python"
    return ""


class NativeThreads(ThreadHost):
    """Replicas whose loop is compiled, round steps that have been compiled to libraries.

    Args:
        loop: the loop's functions.
    """

    def __init__(
        self,
        config: Config,
        training: Training,
        record: RunRecord,
        watcher: Watcher,
        stop: StopFlag,
        steps: Steps,
        loop: ctypes.CDLL,
        checkpoints: Checkpoints | None = None,
    ) -> None:
        super().__init__(config, training, record, watcher, stop, _vector(training), steps, checkpoints)
        # Those of a resumed run are another process's.
        self._trace_steps = 0 if self.first_step else config.audit.trace_steps
        # The loop counts from where it begins.
        self._commits_before = list(self.shared.commits)
        self.update = _update(config, training)
        _, row = next(iter(steps.libraries.values())).description.outputs
        self.loop = NativeLoop(
            loop,
            training.layout,
            training.optimizer,
            self.update,
            self.shared.plain.numpy(),
            batch_size=training.batch_size,
            row_size=row.shape[0],
            keeps=bool(self.reference_steps) or config.train.evaluate_every > 0,
            spins=training.num_replicas * torch.get_num_threads() <= cores(),
        )
        record.engine = "native"
        # Of each replica, where its first steps are traced; its own only.
        self._spans: list[list[Span]] = [[] for _ in range(training.num_replicas)]
        self._inputs: list[Inputs] = [self._inputs_of(own) for own in range(training.num_replicas)]

    def abort(self) -> None:
        self.loop.stop()

    def make_first_call(self) -> None:
        """Capturing the step has been one."""

    # What a replica's thread does.

    def take_steps(self, own: int) -> None:
        torch.set_grad_enabled(False)  # thread-local: each replica sets its own
        recorder = Recorder(self.record.replicas[own], self.training.row, self.training.layout)
        compare_settings(self.record, own)
        try:
            self._join(own)
            first, length, meets = self.first_step, FIRST_STEPS, self.meets_after(self.first_step)
            while not self.ended.is_set() and (last := self._next_stop(first, first + length, meets)) > first:
                began = time.perf_counter()
                self._take_some(own, recorder, first, last)
                seconds = max(time.perf_counter() - began, 1e-6)
                first, length = last, max(1, min(2 * length, int((last - first) * CALL_SECONDS / seconds)))
                if last == meets:
                    meets = self.meet(own, meets)
        finally:
            compare_settings(self.record, own)

    def _next_stop(self, first: int, last: int, meets: int) -> int:
        """Where a call that begins at `first` ends: by `last`, where replicas meet, where no further step is traced, or
        enough is kept."""
        traced = self._trace_steps
        ends = [last, self.config.train.steps, *([traced] if first < traced else []), *([meets] if meets > 0 else [])]
        last = min(ends)
        most = max(1, KEPT_BYTES // (3 * 4 * self.training.layout.read_size))
        return min([last, *(step + 1 for step in self._kept(first, last)[most - 1 : most])])

    def _kept(self, first: int, last: int) -> list[int]:
        """The steps whose vectors are kept; the same for all replicas."""
        return [step for step in range(first, last) if step in self.reference_steps or self.evaluates_at(step)]

    def _join(self, own: int) -> None:
        training, inputs = self.training, self._inputs[own]
        dtype = self.steps.in_force(training.asked[own])
        library = self.steps.libraries[dtype, own < training.num_trainers, training.batch_size]
        inputs.bound = library.bind(
            inputs.prefix,
            self.steps.templates[own],
            self.steps.x,
            self.steps.y,
            inputs.samples,
            inputs.number,
            self.steps.positions(own),
        )
        snapshot = None if inputs.snapshot is None else inputs.snapshot.numpy()
        self.loop.join(
            own, inputs.bound.run, inputs.bound.frame, inputs.samples.numpy(), inputs.number.numpy(), snapshot
        )

    def _inputs_of(self, own: int) -> Inputs:
        layout, plain = self.training.layout, self.shared.plain
        snapshot = None
        if not self.update.in_place:
            snapshot = torch.zeros(layout.size if self.update.whole_snapshot else layout.read_size)
        prefix = (plain if snapshot is None else snapshot)[: layout.read_size]
        samples = torch.zeros(self.training.batch_size, dtype=torch.int64)
        return Inputs(prefix, samples, torch.tensor(0), snapshot)

    def _take_some(self, own: int, recorder: Recorder, first: int, last: int) -> None:
        entry = self.training.precision.current()
        kept = self._kept(first, last)
        with self._told(own, first, DATA, "look batches up"):
            samples = np.ascontiguousarray(self.training.batches.indices(first, last)[:, own], np.int64)
        try:
            taken = self.loop.run(own, first, samples, kept=kept, num_spans=self._room(own, first))
        except LoopFailed as failed:
            bound = self._inputs[own].bound
            raise (failed if bound is None else bound.error(failed.status)) from failed
        if len(taken.rows) < last - first:
            return  # stopped
        for index, step in enumerate(kept):
            self._keep(own, step, taken, index)
        self._spans[own] += [
            Span(own, step, KINDS[kind], NAMES.get(KINDS[kind], KINDS[kind]), start, stop)
            for step, kind, start, stop in taken.spans.tolist()
        ]
        with self._told(own, first, LOGGING, "read rows off"):
            self._note(own, recorder, first, taken, entry)

    def _keep(self, own: int, step: int, taken: Taken, index: int) -> None:
        """Give the main thread what it evaluates, and the audit what it compares gradients by."""
        training, snapshot, contribution = self.training, taken.snapshots[index], taken.contributions[index]
        if own == 0 and self.evaluates_at(step):
            self.to_evaluate.put((step, snapshot))
        if step in self.reference_steps and own < training.num_trainers:
            applied = taken.totals[index] * np.float32(self.update.scale) if self.update.joint else contribution
            batch = step * training.num_replicas + own
            self.references[own].append(
                Reference(own, step, snapshot, contribution, applied, batch=batch, asked=training.asked[own])
            )

    def _note(self, own: int, recorder: Recorder, first: int, taken: Taken, entry: str | None) -> None:
        """Hand a call's rows to the recorder, each with what a thread in Python would have noted of its step."""
        training, left = self.training, self.training.precision.current()
        steps = np.arange(first, first + len(taken.rows))
        noted = np.full((len(steps), len(Noted._fields)), -1, np.int64)
        noted[:, :2] = taken.notes
        noted[:, 0] += sum(self._commits_before)
        noted[:, 2] = steps * training.num_replicas + own
        noted[:, 3:] = (CODES[training.asked[own]], CODES[entry], CODES[left], -1, 0)
        recorder.extend(taken.rows, noted)

    def _room(self, own: int, step: int) -> int:
        """How many more spans are wanted of a replica, from a step on."""
        traced = step < self._trace_steps
        return MAX_SPANS // self.training.num_replicas - len(self._spans[own]) if traced else 0

    @contextmanager
    def _told(self, own: int, step: int, kind: str, name: str) -> Iterator[None]:
        """Round what a replica does between two calls of the loop."""
        start = time.perf_counter_ns()
        yield
        if self._room(own, step):
            self._spans[own].append(Span(own, step, kind, name, start, time.perf_counter_ns()))

    # What the main thread does.

    def report(self) -> None:
        self.shared.commits[:] = self.committed()
        super().report()

    def committed(self) -> list[int]:
        return [before + made for before, made in zip(self._commits_before, self.loop.commits(), strict=True)]

    def go_on(self) -> None:
        super().go_on()
        self._commits_before = list(self.shared.commits)

    def finish(self) -> None:
        super().finish()
        if self._trace_steps:
            spans = [span for own in self._spans for span in own]
            self.record.trace = Trace(self.training.num_replicas, spans, told_apart=KINDS)
        for inputs in self._inputs:
            if inputs.bound is not None:
                inputs.bound.release()  # not before: others read what a replica's last step has left


def _vector(training: Training) -> SharedVector:
    return SharedVector(training.initial, training.layout, training.optimizer, num_trainers=training.num_trainers)


def _update(config: Config, training: Training) -> Update:
    name, share = config.update_mode.name, 1.0 / training.num_trainers
    joint = name in JOINT
    scale = share if name == "all_reduce" else 1.0
    reduced = mechanism(config, "batch_statistics") == "reduced"
    return Update("all_reduce" if joint else name, scale, share if reduced else scale)

"""`strategy=mirrored`: replicas of TensorFlow's MirroredStrategy, each with its own copy of one flat variable.

MirroredStrategy runs replicas one at a time at the Python level, so each mode has one order only, unless a schedule has
them take turns (`controlled_mirrored.py`); the captured graphs run side by side. Several steps are one call: the loop
is in the graph, and each call ends where the host has something to do (a gradient reference, an evaluation, a look at
the clock).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from trainer.audit.recorder import Recorder
from trainer.audit.records import DTYPES, Floats, Noted, Reference, RunRecord, code
from trainer.config import Config
from trainer.holders import captures, mechanism
from trainer.schedule.operations import BEGIN, COMPUTE, CURSOR, GENERATOR, READ, UPDATE, WRITE
from trainer.schedule.point import mark, point
from trainer.strategies.after_the_run import AfterTheRun
from trainer.strategies.deltas import Deltas
from trainer.strategies.hosting import (
    StopFlag,
    Watcher,
    compare_settings,
    evaluate,
    reference_steps,
    turned_on,
)
from trainer.strategies.in_replica import barrier, gradients_by_tape, point_in_copy, replica_id
from trainer.strategies.reduction import DirectReduction
from trainer.updates.mirrored import ASSIGNMENTS
from trainer.workloads.train import Training

CALL_SECONDS = 0.2  # what one call should take, so that progress shows and Ctrl-C is heeded
FIRST_STEPS = 4
# What ends a replica's row: updates that its copy showed in its first variable when it was read, how many more when it
# was written, and where the cursor stood.
COUNTS = ("read_version", "staleness", "position")
SHARED = "shared"  # the flat variable's name
Tensor = Any


class Outcome(NamedTuple):
    """One replica's results of a call: the rows of all steps, the last step's vectors, with `audit=full` the sums."""

    rows: Floats
    snapshot: Floats
    contribution: Floats
    total: Floats
    sums: NDArray[np.float64] | None = None


def prepare(num_replicas: int, threads_per_replica: int) -> None:
    """Set what the process must have before it computes anything: threads, and a logical CPU device for each replica.

    TensorFlow fixes both at its first operation; building a Keras model is one.
    """
    tf.config.threading.set_inter_op_parallelism_threads(num_replicas)
    tf.config.threading.set_intra_op_parallelism_threads(threads_per_replica)
    if len(tf.config.list_physical_devices("GPU")) < num_replicas:
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * num_replicas)


def train(config: Config, training: Training, record: RunRecord, watcher: Watcher, stop: StopFlag) -> None:
    """Train under MirroredStrategy over the machine's GPUs, or over logical CPU devices, and fill `record`."""
    with turned_on(training):
        Mirrored(config, training, record, watcher, stop).run()
    record.mode_left = training.mode_left


def _devices(num_replicas: int) -> list[str]:
    """One device a replica: GPUs where there are enough, else logical CPUs."""
    kind = "gpu" if len(tf.config.list_physical_devices("GPU")) >= num_replicas else "cpu"
    return [f"/{kind}:{replica_id}" for replica_id in range(num_replicas)]


class Mirrored:
    def __init__(self, config: Config, training: Training, record: RunRecord, watcher: Watcher, stop: StopFlag) -> None:
        self.config, self.training, self.record = config, training, record
        self.watcher, self.stop = watcher, stop
        self.layout = training.layout
        self.num_replicas = config.num_replicas
        self.full = config.audit.name == "full"
        self.assignment = ASSIGNMENTS[config.update_mode.name]
        averaged = self.assignment.reduced and self.assignment.averaged
        self.scale = 1.0 / training.num_trainers if averaged else 1.0
        # Whatever the mode does with gradients.
        self.reduces_statistics = mechanism(config, "batch_statistics") == "reduced"
        self.deltas = Deltas(
            self.layout,
            training.optimizer,
            self.scale,
            1.0 / training.num_trainers if self.reduces_statistics else self.scale,
            training.growth_steps,
        )
        self.strategy = tf.distribute.MirroredStrategy(_devices(self.num_replicas), cross_device_ops=DirectReduction())
        with self.strategy.scope():
            self.flat = tf.Variable(
                training.initial, aggregation=tf.VariableAggregation[self.assignment.aggregation], name=SHARED
            )
            # Unsafe, both: a variable made in the strategy's scope has a copy on each device, and each replica moves
            # its own, so that all replicas draw the same numbers and take the same batches.
            self.generator = None if training.derived else tf.Variable([training.seed, 0], dtype=tf.int32)
            self.position = tf.Variable(0, dtype=tf.int32) if self.shares_iterator else None
        training.generator = self._draw
        if self.shares_iterator:
            planned = training.batches.indices(0, config.train.steps)
            self.table = tf.constant(planned.reshape(-1, training.batch_size)[: config.train.steps])
        self.train_x = tf.constant(training.dataset.train_x)
        self.train_y = tf.constant(training.dataset.train_y)
        self.templates = tf.constant(
            np.stack([self.layout.own_canaries(replica_id) for replica_id in range(self.num_replicas)])
        )
        self.positions = tf.constant(
            np.stack([training.positions(replica_id) for replica_id in range(self.num_replicas)])
        )
        self.first_canaries = tf.constant(self.layout.canaries[0, 0].astype(np.int32))
        plan = tf.TensorSpec([None, self.num_replicas, training.batch_size], tf.int32)
        scalar, roles = tf.TensorSpec([], tf.int32), tf.TensorSpec([self.num_replicas], tf.int32)
        self.captures = captures(config)
        self.take_steps = self._take_steps_eagerly
        if self.captures:
            self.take_steps = tf.function(self._take_steps, autograph=False, input_signature=[plan, scalar, roles])
        self.predict = tf.function(training.predict, autograph=False)
        self.after_the_run = AfterTheRun(self)
        self._make_ready()

    def begin_again(self, record: RunRecord) -> None:
        """Forget what was trained, and train into another record."""
        self.record = record
        self.put(self.flat, self.training.initial)
        if self.generator is not None:
            self.put(self.generator, [self.training.seed, 0])
        if self.position is not None:
            self.put(self.position, 0)
        self._make_ready()

    def _make_ready(self) -> None:
        self.record.engine = "tf.function" if self.captures else "eager"
        self.runners = [self.training.precision.hand_over() for _ in range(self.num_replicas)]
        # What each replica's Python code noted each time that it ran: at every step, or once, while it was traced.
        self.noted: list[list[Noted]] = [[] for _ in range(self.num_replicas)]

    def put(self, variable: Any, value: Any) -> None:
        """Set every copy of a variable."""
        for own in range(self.num_replicas):
            self.put_in_copy(variable, own, value)

    def put_in_copy(self, variable: Any, own: int, value: Any) -> None:
        self.strategy.experimental_local_results(variable)[own].assign(value)

    @property
    def shares_iterator(self) -> bool:
        return mechanism(self.config, "cursor") == "shared_iterator"

    def run(self) -> None:
        steps = self.config.train.steps
        recorders = self.recorders()
        kept_steps, self.record.references_skipped = reference_steps(self.config, self.layout)
        self.make_first_call()
        first, length, started = 0, FIRST_STEPS, time.perf_counter()
        while first < steps and not self.stop.is_set():
            last = self._next_stop(first, first + length, kept_steps)
            called = time.perf_counter()
            results = self.call(first, last)
            seconds = max(time.perf_counter() - called, 1e-6)
            length = max(1, min(2 * length, int((last - first) * CALL_SECONDS / seconds)))
            for recorder, result in zip(recorders, results, strict=True):
                self.read_off(recorder, first, result.rows)
            self.add_up(results)
            if last - 1 in kept_steps:
                self.keep_references(last - 1, results, [noted[-1] for noted in self.noted])
            self.record.duration_seconds = time.perf_counter() - started
            self._report(last)
            first = last
        self.record.copies = self.copies()
        if self.stop.is_set():
            return
        self._evaluate(steps)
        if self.training.audited:
            self.after_the_run.complete()
            self.after_the_run.look_again()

    def _next_stop(self, first: int, last: int, kept_steps: frozenset[int]) -> int:
        """Where a call that begins at `first` ends: by `last`, after a reference, or before an evaluation."""
        every = self.config.train.evaluate_every
        last = min(last, self.config.train.steps)
        ends = [step + 1 for step in range(first, last) if step in kept_steps or (every and (step + 1) % every == 0)]
        return min([last, *ends])

    # What a replica does: traced once and run by TensorFlow, or with train.capture=never by Python at every step.

    def replica_step(self, plan: Tensor, step: Tensor, roles: Tensor) -> tuple[Tensor, ...]:
        own = replica_id()
        outcome: tuple[Tensor, ...] = self.runners[own](lambda: self._own_step(own, plan, step, roles))
        return outcome

    def _own_step(self, own: int, plan: Tensor, step: Tensor, roles: Tensor) -> tuple[Tensor, ...]:
        context, training = tf.distribute.get_replica_context(), self.training
        mark(BEGIN)
        if not self.noted[own]:
            compare_settings(self.record, own)
        role = tf.gather(roles, own)
        at, samples = self._taken(plan, step, role)
        point_in_copy(READ, SHARED)
        before = self.flat.read_value()
        prefix = before[: self.layout.read_size]
        entry = training.precision.current()
        mark(COMPUTE)
        with training.first_call.call() as first:
            asked = "float32" if first else training.asked[own]
            contribution, row = training.step(
                gradients_by_tape,
                prefix,
                tf.gather(self.templates, role),
                tf.gather(self.train_x, samples),
                tf.gather(self.train_y, samples),
                samples,
                step,
                tf.gather(self.positions, role),
                compute_dtype=asked,
                trains=own < training.num_trainers,
            )
        left = training.precision.current()
        self.noted[own].append(Noted(-1, -1, -1, code(asked), code(entry), code(left), -1, first))
        total = contribution
        if self.assignment.reduced:
            total = context.all_reduce(tf.distribute.ReduceOp.SUM, contribution)
        averaged = None
        if self.reduces_statistics:
            region = contribution[self.layout.regions["statistics"]]
            averaged = context.all_reduce(tf.distribute.ReduceOp.SUM, region)
        point_in_copy(READ, SHARED)
        base = self.flat.read_value()
        seen, now = (tf.gather(vector, self.first_canaries) for vector in (before, base))
        counts = tf.stack([tf.reduce_sum(seen), tf.reduce_sum(now - seen), tf.cast(at, tf.float32)])
        delta = self.deltas.full(total, contribution, averaged, base)
        self._assign(own, base, delta)
        outcome: tuple[Tensor, ...] = (tf.concat([row, counts], 0), prefix, contribution, total)
        if self.full:
            outcome += (tf.cast(tf.stack([delta, tf.abs(base + delta)]), tf.float64),)
        return outcome

    def _assign(self, own: int, base: Tensor, delta: Tensor) -> None:
        """Write to the copies: each replica to its own, or TensorFlow to all at once when all have come."""
        if self.assignment.aggregation != "NONE":
            # So that nobody reads a copy after its change was announced and before it is made.
            barrier("assign")
        for copy in self._written_by(own):
            point(WRITE if self.assignment.reassigned else UPDATE, f"{copy}:{SHARED}")
        if self.assignment.reassigned:
            self.flat.assign(base + delta)
        else:
            self.flat.assign_add(delta)

    def _written_by(self, own: int) -> Iterable[int]:
        """The copies that what this replica assigns gets to."""
        if self.assignment.aggregation == "ONLY_FIRST_REPLICA":
            return range(0 if own else self.num_replicas)
        return [own]

    def _taken(self, plan: Tensor, step: Tensor, role: Tensor) -> tuple[Tensor, Tensor]:
        """Where the cursor stood, and the samples that it gave: int32 [batch]."""
        if self.position is None:
            return step, tf.gather(plan, role)
        point_in_copy(READ, "cursor", of=CURSOR)
        at = self.position.read_value()
        point_in_copy(UPDATE, "cursor", of=CURSOR)
        self.position.assign_add(1)
        return at, tf.gather(self.table, at)

    def _draw(self, shape: tuple[int, int]) -> Tensor:
        """32-bit words as Keras' random layers draw: from a seed that is a variable, and counts the draws."""
        assert self.generator is not None
        point_in_copy(READ, "generator", of=GENERATOR)
        seed = self.generator.read_value()
        point_in_copy(UPDATE, "generator", of=GENERATOR)
        self.generator.assign_add([0, 1])
        return tf.cast(tf.random.stateless_uniform(shape, seed, None, None, tf.uint32), tf.int64)

    def _take_steps(self, plan: Tensor, first: Tensor, roles: Tensor) -> list[list[Tensor]]:
        """Steps `first` and on, one for each row of the plan, in one graph.

        Returns, per replica: the rows of all steps, each ending in `COUNTS`; the last step's snapshot, contribution
        and their total; under `audit=full` the sums of all steps' deltas and of the values' magnitudes, float64
        [2, layout.size].
        """
        num_steps = tf.shape(plan)[0]
        vector = tf.zeros([self.layout.read_size])
        rows = tuple(tf.TensorArray(tf.float32, size=num_steps) for _ in range(self.num_replicas))
        vectors = tuple((vector, vector, vector) for _ in range(self.num_replicas))
        sums = tuple(tf.zeros([2, self.layout.size], tf.float64) for _ in range(self.num_replicas if self.full else 0))

        def body(done: Tensor, rows: Any, vectors: Any, sums: Any) -> Any:
            outcome = self.strategy.run(self.replica_step, args=(plan[done], first + done, roles))
            parts = [self.strategy.experimental_local_results(part) for part in outcome]
            rows = tuple(array.write(done, row) for array, row in zip(rows, parts[0], strict=True))
            if self.full:
                sums = tuple(total + delta for total, delta in zip(sums, parts[4], strict=True))
            return done + 1, rows, tuple(zip(*parts[1:4], strict=True)), sums

        _, rows, vectors, sums = tf.while_loop(
            lambda done, *_: done < num_steps, body, (tf.constant(0), rows, vectors, sums), parallel_iterations=1
        )
        outcomes = [[array.stack(), *own] for array, own in zip(rows, vectors, strict=True)]
        for outcome, total in zip(outcomes, sums, strict=False):
            outcome.append(total)
        return outcomes

    def _take_steps_eagerly(self, plan: Tensor, first: Tensor, roles: Tensor) -> list[list[Tensor]]:
        """The same, operator by operator."""
        rows: list[list[Tensor]] = [[] for _ in range(self.num_replicas)]
        outcomes: list[list[Tensor]] = [[] for _ in rows]
        for done in range(len(plan)):
            outcome = self.strategy.run(self.replica_step, args=(plan[done], first + done, roles))
            parts = [self.strategy.experimental_local_results(part) for part in outcome]
            for own, row in enumerate(parts[0]):
                rows[own].append(row)
                sums = [parts[4][own] + (outcomes[own][4] if done else 0.0)] if self.full else []
                outcomes[own] = [row, *(part[own] for part in parts[1:4]), *sums]
        return [[tf.stack(own), *outcome[1:]] for own, outcome in zip(rows, outcomes, strict=True)]

    # What the host does.

    def make_first_call(self) -> None:
        """Trace the graph before the clock starts: no steps. A call that main makes first is made here, outside."""
        if mechanism(self.config, "first_call") == "before_start":
            self.record.first_calls = 1
        if self.captures:
            self.call(0, 0)

    def recorders(self) -> list[Recorder]:
        return [Recorder(replica, self.training.row, self.layout) for replica in self.record.replicas]

    def read_off(self, recorder: Recorder, first: int, rows: Floats) -> None:
        """Record one replica's steps from `first` on, which are the last that it took."""
        noted = self._notes(recorder.record.replica_id, first, rows)
        recorder.extend(rows[:, : -len(COUNTS)], noted)

    def _notes(self, own: int, first: int, rows: Floats) -> NDArray[np.int64]:
        """What is noted of the steps whose rows these are: int64 [steps, len(Noted)]."""
        # Counts that overflowed are counts no more: not recorded.
        counts = np.nan_to_num(rows[:, -len(COUNTS) :], nan=-1, posinf=-1, neginf=-1).astype(np.int64)
        # What was traced is what every step repeats.
        code_ran = self.noted[own][-1:] * len(rows) if self.captures else self.noted[own][-len(rows) :]
        noted = np.array(code_ran, np.int64)
        noted[:, :2] = counts[:, :2]
        noted[:, 2] = counts[:, 2] if self.shares_iterator else counts[:, 2] * self.num_replicas + own
        if self.captures:
            # The first call was made once, though what it computed in goes on in every step of the graph.
            later = np.arange(first, first + len(rows)) > 0
            noted[later, Noted._fields.index("first_call")] = 0
            noted[later, Noted._fields.index("asked")] = code(self.training.asked[own])
        return noted

    def call(self, first: int, last: int, roles: Sequence[int] | None = None) -> list[Outcome]:
        plan = self.training.batches.indices(first, last)
        roles = range(self.num_replicas) if roles is None else roles
        results = self.take_steps(tf.constant(plan), tf.constant(first), tf.constant(list(roles)))
        return [Outcome(*(part.numpy() for part in own)) for own in results]

    def copies(self) -> Floats:
        """All copies of the flat vector: float32 [num_replicas, layout.size]."""
        return np.stack([copy.numpy() for copy in self.strategy.experimental_local_results(self.flat)])

    def _report(self, step: int) -> None:
        self.watcher.progress(self.record)
        every = self.config.train.evaluate_every
        if every and step % every == 0 and step < self.config.train.steps:
            self._evaluate(step)
        if self.training.audited:
            # Missing from any copy is missing.
            kept = np.min([self.layout.kept(copy) for copy in self.copies()], axis=0)
            self.watcher.kept(step, float(kept.sum()), step * self.num_replicas)

    def keep_references(self, step: int, results: Sequence[Outcome], noted: Sequence[Noted]) -> None:
        """Keep the gradients of one step, whose results and notes these are, by replica."""
        scale = np.float32(self.scale)
        self.record.references += [
            Reference(
                own,
                step,
                result.snapshot,
                result.contribution,
                result.total * scale,
                batch=step if self.shares_iterator else step * self.num_replicas + own,
                asked=DTYPES[noted[own].asked],
            )
            for own, result in enumerate(results[: self.training.num_trainers])
        ]

    def add_up(self, results: Sequence[Outcome]) -> None:
        """Sum what every copy should have been given: all replicas' deltas, or under a reduction the one they share."""
        for result in results[:1] if self.assignment.reduced else results:
            if result.sums is not None:
                added, magnitudes = result.sums
                self.record.added = added + _or_zero(self.record.added)
                self.record.magnitudes = magnitudes + _or_zero(self.record.magnitudes)

    def _evaluate(self, step: int) -> None:
        prefix = tf.constant(self.copies()[0, : self.layout.read_size])
        test = self.training.dataset
        evaluation = evaluate(step, lambda x: self.predict(prefix, tf.constant(x)).numpy(), test.test_x, test.test_y)
        self.record.evaluations.append(evaluation)
        self.watcher.evaluated(evaluation)


def _or_zero(total: NDArray[np.float64] | None) -> NDArray[np.float64] | float:
    return 0.0 if total is None else total

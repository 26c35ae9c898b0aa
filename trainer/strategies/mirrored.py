"""`strategy=mirrored`: replicas of TensorFlow's MirroredStrategy, each with its own copy of one flat variable.

MirroredStrategy runs replicas one at a time at the Python level, so each mode has one order only; the captured graphs
run side by side. Several steps are one call: the loop is in the graph, and each call ends where the host has something
to do (a gradient reference, an evaluation, a look at the clock).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from trainer.audit.recorder import Recorder
from trainer.audit.records import Floats, Reference, RunRecord
from trainer.config import Config
from trainer.state.layout import Layout
from trainer.strategies.hosting import StopFlag, Watcher, complete_references, evaluate, reference_steps
from trainer.strategies.reduction import DirectReduction
from trainer.updates.mirrored import ASSIGNMENTS
from trainer.updates.optimizers import Optimizer
from trainer.workloads.train import Training

CALL_SECONDS = 0.2  # what one call should take, so that progress shows and Ctrl-C is heeded
FIRST_STEPS = 4
Tensor = Any


class _Outcome(NamedTuple):
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
    _Mirrored(config, training, record, watcher, stop).run()


def _devices(num_replicas: int) -> list[str]:
    """One device a replica: GPUs where there are enough, else logical CPUs."""
    kind = "gpu" if len(tf.config.list_physical_devices("GPU")) >= num_replicas else "cpu"
    return [f"/{kind}:{replica_id}" for replica_id in range(num_replicas)]


def gradients_by_tape(
    loss_of: Callable[[list[Tensor]], tuple[Tensor, Any]], weights: list[Tensor]
) -> tuple[Tensor, Any, Sequence[Tensor]]:
    """A loss and its gradients."""
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(weights)
        loss, rest = loss_of(weights)
    return loss, rest, tape.gradient(loss, weights)


def full_delta(layout: Layout, optimizer: Optimizer, contribution: Tensor, base: Tensor, scale: float) -> Tensor:
    """What a contribution adds to everything, slots taken from `base`: float32 [layout.size].

    Values are scaled and go through the optimizer's rule; canaries are taken over as they are.
    """
    weights, statistics = layout.regions["weights"], layout.regions["statistics"]
    scaled = contribution * scale if scale != 1.0 else contribution
    slots = [base[layout.regions[name]] for name in layout.slots]
    counter = layout.of_kind("counter")
    iterations = base[counter[0].span] if counter else None
    deltas = optimizer.delta(scaled[weights], slots, iterations)
    parts = [deltas[0], scaled[statistics], *deltas[1:]]
    if counter:
        parts.append(tf.ones(counter[0].end - counter[0].start))
    sources = np.zeros(layout.size, np.int32)
    sources[layout.canaries.reshape(-1)] = layout.canary_sources.reshape(-1)
    is_canary = np.zeros(layout.size, np.bool_)
    is_canary[layout.canaries.reshape(-1)] = True
    return tf.where(is_canary, tf.gather(contribution, sources), tf.concat(parts, 0))


class _Mirrored:
    def __init__(self, config: Config, training: Training, record: RunRecord, watcher: Watcher, stop: StopFlag) -> None:
        self.config, self.training, self.record = config, training, record
        self.watcher, self.stop = watcher, stop
        self.layout = training.layout
        self.num_replicas = config.num_replicas
        self.full = config.audit.name == "full"
        self.assignment = ASSIGNMENTS[config.update_mode.name]
        averaged = self.assignment.reduced and self.assignment.averaged
        self.scale = 1.0 / self.num_replicas if averaged else 1.0
        self.strategy = tf.distribute.MirroredStrategy(_devices(self.num_replicas), cross_device_ops=DirectReduction())
        with self.strategy.scope():
            self.flat = tf.Variable(
                training.initial, aggregation=tf.VariableAggregation[self.assignment.aggregation], name="shared"
            )
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
        self.take_steps = tf.function(self._take_steps, autograph=False, input_signature=[plan, scalar, roles])
        self.joint_step = tf.function(self._joint_step, autograph=False)
        self.predict = tf.function(training.predict, autograph=False)
        record.engine = "tf.function"

    def run(self) -> None:
        steps = self.config.train.steps
        recorders = [Recorder(replica, self.num_replicas, self.training.probe_size) for replica in self.record.replicas]
        kept_steps, self.record.references_skipped = reference_steps(self.config, self.layout)
        self._call(0, 0)  # trace the graph before the clock starts: no steps
        first, length, started = 0, FIRST_STEPS, time.perf_counter()
        while first < steps and not self.stop.is_set():
            last = self._next_stop(first, first + length, kept_steps)
            called = time.perf_counter()
            results = self._call(first, last)
            seconds = max(time.perf_counter() - called, 1e-6)
            length = max(1, min(2 * length, int((last - first) * CALL_SECONDS / seconds)))
            for recorder, result in zip(recorders, results, strict=True):
                # Counts that overflowed are counts no more: not recorded.
                counts = np.nan_to_num(result.rows[:, -2:], nan=-1, posinf=-1, neginf=-1)
                recorder.extend(result.rows[:, :-2], counts.astype(np.int64))
            self._add_up(results)
            if last - 1 in kept_steps:
                self._keep_references(last - 1, results)
            self.record.duration_seconds = time.perf_counter() - started
            self._report(last)
            first = last
        self.record.copies = self._copies()
        if not self.stop.is_set():
            self._evaluate(steps)
            self._complete_references()

    def _next_stop(self, first: int, last: int, kept_steps: frozenset[int]) -> int:
        """Where a call that begins at `first` ends: by `last`, after a reference, or before an evaluation."""
        every = self.config.train.evaluate_every
        last = min(last, self.config.train.steps)
        ends = [step + 1 for step in range(first, last) if step in kept_steps or (every and (step + 1) % every == 0)]
        return min([last, *ends])

    # What a replica does: traced once, run by TensorFlow.

    def _replica_step(self, plan: Tensor, step: Tensor, roles: Tensor) -> tuple[Tensor, ...]:
        context = tf.distribute.get_replica_context()
        role = tf.gather(roles, context.replica_id_in_sync_group)
        samples = tf.gather(plan, role)
        before = self.flat.read_value()
        prefix = before[: self.layout.read_size]
        contribution, row = self.training.step(
            gradients_by_tape,
            prefix,
            tf.gather(self.templates, role),
            tf.gather(self.train_x, samples),
            tf.gather(self.train_y, samples),
            step,
            tf.gather(self.positions, role),
        )
        total = contribution
        if self.assignment.reduced:
            total = context.all_reduce(tf.distribute.ReduceOp.SUM, contribution)
        base = self.flat.read_value()
        seen, now = (tf.gather(vector, self.first_canaries) for vector in (before, base))
        counts = tf.stack([tf.reduce_sum(seen), tf.reduce_sum(now - seen)])
        delta = full_delta(self.layout, self.training.optimizer, total, base, self.scale)
        if self.assignment.reassigned:
            self.flat.assign(base + delta)
        else:
            self.flat.assign_add(delta)
        outcome: tuple[Tensor, ...] = (tf.concat([row, counts], 0), prefix, contribution, total)
        if self.full:
            outcome += (tf.cast(tf.stack([delta, tf.abs(base + delta)]), tf.float64),)
        return outcome

    def _take_steps(self, plan: Tensor, first: Tensor, roles: Tensor) -> list[list[Tensor]]:
        """Steps `first` and on, one for each row of the plan, in one graph.

        Returns, per replica: the rows of all steps, each ending in the updates that the replica's copy showed in its
        first variable when it was read, and how many more when it was written; the last step's snapshot, contribution
        and their total; under `audit=full` the sums of all steps' deltas and of the values' magnitudes, float64
        [2, layout.size].
        """
        num_steps = tf.shape(plan)[0]
        vector = tf.zeros([self.layout.read_size])
        rows = tuple(tf.TensorArray(tf.float32, size=num_steps) for _ in range(self.num_replicas))
        vectors = tuple((vector, vector, vector) for _ in range(self.num_replicas))
        sums = tuple(tf.zeros([2, self.layout.size], tf.float64) for _ in range(self.num_replicas if self.full else 0))

        def body(done: Tensor, rows: Any, vectors: Any, sums: Any) -> Any:
            outcome = self.strategy.run(self._replica_step, args=(plan[done], first + done, roles))
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

    # What the host does.

    def _call(self, first: int, last: int, roles: Sequence[int] | None = None) -> list[_Outcome]:
        plan = self.training.batches.indices(first, last)
        roles = range(self.num_replicas) if roles is None else roles
        results = self.take_steps(tf.constant(plan), tf.constant(first), tf.constant(list(roles)))
        return [_Outcome(*(part.numpy() for part in own)) for own in results]

    def _copies(self) -> Floats:
        """All copies of the flat vector: float32 [num_replicas, layout.size]."""
        return np.stack([copy.numpy() for copy in self.strategy.experimental_local_results(self.flat)])

    def _report(self, step: int) -> None:
        self.watcher.progress(self.record)
        every = self.config.train.evaluate_every
        if every and step % every == 0 and step < self.config.train.steps:
            self._evaluate(step)
        if self.training.audited:
            # Missing from any copy is missing.
            kept = np.min([self.layout.kept(copy) for copy in self._copies()], axis=0)
            self.watcher.kept(step, float(kept.sum()), step * self.num_replicas)

    def _keep_references(self, step: int, results: Sequence[_Outcome]) -> None:
        scale = np.float32(self.scale)
        self.record.references += [
            Reference(own, step, result.snapshot, result.contribution, result.total * scale)
            for own, result in enumerate(results)
        ]

    def _add_up(self, results: Sequence[_Outcome]) -> None:
        """Sum what every copy should have been given: all replicas' deltas, or under a reduction the one they share."""
        for result in results[:1] if self.assignment.reduced else results:
            if result.sums is not None:
                added, magnitudes = result.sums
                self.record.added = added + _or_zero(self.record.added)
                self.record.magnitudes = magnitudes + _or_zero(self.record.magnitudes)

    def _evaluate(self, step: int) -> None:
        prefix = tf.constant(self._copies()[0, : self.layout.read_size])
        test = self.training.dataset
        evaluation = evaluate(step, lambda x: self.predict(prefix, tf.constant(x)).numpy(), test.test_x, test.test_y)
        self.record.evaluations.append(evaluation)
        self.watcher.evaluated(evaluation)

    def _complete_references(self) -> None:
        """Run each kept step again, every replica in its neighbour's place, and the joint batch at each snapshot.

        The shared variables are written over: the run is done and its copies are kept.
        """
        # Synchronized normalization adds up over devices in their order, which a change of places would change.
        moved = 0 if getattr(self.config.model, "normalization", "none") == "sync_batch" else 1
        roles = [(own - moved) % self.num_replicas for own in range(self.num_replicas)]
        again: dict[int, list[_Outcome]] = {}
        snapshots = {(reference.step, reference.replica_id): reference.snapshot for reference in self.record.references}

        def recompute(reference: Reference) -> Floats:
            step = reference.step
            if step not in again:
                copies = self.strategy.experimental_local_results(self.flat)
                for copy, role in zip(copies, roles, strict=True):
                    copy.assign(np.pad(snapshots[step, role], (0, self.layout.size - self.layout.read_size)))
                again[step] = self._call(step, step + 1, roles)
            return again[step][roles.index(reference.replica_id)].contribution

        complete_references(self.record, recompute, self._joint_gradient)

    def _joint_gradient(self, reference: Reference) -> Floats:
        plan = self.training.batches.indices(reference.step, reference.step + 1)
        vector: Floats = self.joint_step(
            tf.constant(reference.snapshot), tf.constant(plan.reshape(-1)), tf.constant(reference.step)
        ).numpy()
        return vector

    def _joint_step(self, prefix: Tensor, samples: Tensor, step: Tensor) -> Tensor:
        contribution, _ = self.training.step(
            gradients_by_tape,
            prefix,
            self.templates[0],
            tf.gather(self.train_x, samples),
            tf.gather(self.train_y, samples),
            step,
            tf.range(tf.size(samples)),
        )
        return contribution


def _or_zero(total: NDArray[np.float64] | None) -> NDArray[np.float64] | float:
    return 0.0 if total is None else total

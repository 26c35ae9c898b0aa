"""`strategy=mirrored`: replicas of TensorFlow's MirroredStrategy, each with its own copy of one flat variable.

MirroredStrategy runs replicas one at a time at the Python level, so each mode has one order only, unless a schedule has
them take turns (`controlled_mirrored.py`); the captured graphs run side by side. Several steps are one call
(`mirrored_calls.py`), and each call ends where the host has something to do (an evaluation, a look at the clock).

What one device hands another costs a step more than a small operation does. So whatever a replica needs stands on its
own device, its count of steps included, and only what is reduced and the loop's condition cross over.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from trainer.audit.copies import largest_difference
from trainer.audit.recorder import Recorder
from trainer.audit.records import DTYPES, Floats, Noted, Reference, RunRecord, code
from trainer.checkpoint.checkpoints import Checkpoints
from trainer.config import Config
from trainer.doing import doing
from trainer.faults import InjectedFault
from trainer.holders import captures, mechanism
from trainer.schedule.operations import BEGIN, COMPUTE, CURSOR, GENERATOR, READ, UPDATE, WRITE
from trainer.schedule.point import mark, point
from trainer.strategies import mirrored_checkpoints
from trainer.strategies.after_the_run import AfterTheRun
from trainer.strategies.deltas import Deltas
from trainer.strategies.hosting import (
    RunBroken,
    StopFlag,
    Watcher,
    compare_settings,
    evaluate,
    reference_steps,
    turned_on,
)
from trainer.strategies.in_replica import barrier, gradients_by_tape, point_in_copy, replica_id
from trainer.strategies.mirrored_calls import Calls, Outcome, Place
from trainer.strategies.reduction import DirectReduction
from trainer.strategies.stall import stalls_end_the_run
from trainer.strategies.traced_mirrored import calls_traced
from trainer.updates.mirrored import ASSIGNMENTS
from trainer.workloads.train import Training

if TYPE_CHECKING:
    from trainer.strategies.guarded_mirrored import Guard

log = logging.getLogger(__name__)

CALL_SECONDS = 0.2  # what one call should take, so that progress shows and Ctrl-C is heeded
FIRST_STEPS = 4
# What ends a replica's row: updates that its copy showed in its first variable when it was read, how many more when it
# was written, and where the cursor stood.
COUNTS = ("read_version", "staleness", "position")
NOTHING_NOTED = np.zeros((0, len(Noted._fields)), np.int64)
SHARED = "shared"  # the flat variable's name
Tensor = Any


def prepare(num_replicas: int, threads_per_replica: int) -> None:
    """Set what the process must have before it computes anything: threads, and a logical CPU device for each replica.

    TensorFlow fixes both at its first operation; building a Keras model is one.
    """
    tf.config.threading.set_inter_op_parallelism_threads(num_replicas)
    tf.config.threading.set_intra_op_parallelism_threads(threads_per_replica)
    if len(tf.config.list_physical_devices("GPU")) < num_replicas:
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * num_replicas)


def train(
    config: Config,
    training: Training,
    record: RunRecord,
    watcher: Watcher,
    stop: StopFlag,
    checkpoints: Checkpoints | None = None,
) -> None:
    """Train under MirroredStrategy over the machine's GPUs, or over logical CPU devices, and fill `record`."""
    with turned_on(training):
        mirrored = Mirrored(config, training, record, watcher, stop, checkpoints)
        with calls_traced(mirrored), mirrored.told():
            mirrored.run()
    record.mode_left = training.mode_left


def _devices(num_replicas: int) -> list[str]:
    """One device a replica: GPUs where there are enough, else logical CPUs."""
    kind = "gpu" if len(tf.config.list_physical_devices("GPU")) >= num_replicas else "cpu"
    return [f"/{kind}:{replica_id}" for replica_id in range(num_replicas)]


class Mirrored:
    """Replicas of one run.

    Attributes:
        first_step: the step to begin with, above 0 where a checkpoint is resumed.

    Args:
        checkpoints: where there are any to be made, or one to go on from.
    """

    def __init__(
        self,
        config: Config,
        training: Training,
        record: RunRecord,
        watcher: Watcher,
        stop: StopFlag,
        checkpoints: Checkpoints | None = None,
    ) -> None:
        self.config, self.training, self.record = config, training, record
        self.checkpoints = checkpoints
        self.first_step = 0 if checkpoints is None else checkpoints.first_step
        self.watcher, self.stop = watcher, stop
        self.layout = training.layout
        self.num_replicas = training.num_replicas
        # The replicas that are hosted here; what stands in a list by device is in their order.
        self.own_ids = self.hosted()
        self.full = config.audit.name == "full"
        self.assignment = ASSIGNMENTS[config.update_mode.name]
        averaged = self.assignment.reduced and self.assignment.averaged
        self.scale = 1.0 / training.num_trainers if averaged else 1.0
        # Whatever the mode does with gradients. Where there is nothing, TensorFlow's ring between processes crashes.
        has_statistics = bool(self.layout.of_kind("statistic"))
        self.reduces_statistics = mechanism(config, "batch_statistics") == "reduced" and has_statistics
        self.deltas = Deltas(
            self.layout,
            training.optimizer,
            self.scale,
            1.0 / training.num_trainers if self.reduces_statistics else self.scale,
            training.growth_steps,
        )
        self.strategy = self.make_strategy()
        self.devices = list(self.strategy.extended.worker_devices)
        # Otherwise the write is the optimizer's delta, added: what it is added to nobody has to look at before.
        self.needs_base = training.audited or self.assignment.reassigned or self.deltas.needs_base
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
            self.tables = self._on_each(planned.reshape(-1, training.batch_size)[: config.train.steps])
        self.train_x = self._on_each(training.dataset.train_x)
        self.train_y = self._on_each(training.dataset.train_y)
        self.first_canaries = tf.constant(self.layout.canaries[0, 0].astype(np.int32))
        self.guard = self._guard()
        self.places = [self.place(own, own) for own in self.own_ids]
        self.captures = captures(config)
        self.calls = Calls(
            self.strategy, self.flat, training, self.replica_step, sums=self.full, captures=self.captures
        )
        self.predict = tf.function(training.predict, autograph=False)
        self.after_the_run = AfterTheRun(self)
        self._make_ready()

    def hosted(self) -> range:
        """The replicas that are hosted in this process."""
        return range(self.num_replicas)

    def make_strategy(self) -> tf.distribute.Strategy:
        return tf.distribute.MirroredStrategy(_devices(self.num_replicas), cross_device_ops=DirectReduction())

    def begin_again(self, record: RunRecord) -> None:
        """Forget what was trained, and train into another record."""
        self.record = record
        self.put(self.flat, self.training.initial)
        if self.generator is not None:
            self.put(self.generator, [self.training.seed, 0])
        if self.position is not None:
            self.put(self.position, 0)
        self._make_ready()

    def _guard(self) -> Guard | None:
        """What injects faults and looks at gradients, where that was asked for."""
        if not self.config.faults and self.config.train.on_nonfinite != "stop":
            return None
        from trainer.strategies.guarded_mirrored import Guard

        return Guard(self.config, self.layout, self.training.row)

    def _on_each(self, value: NDArray[Any]) -> list[Tensor]:
        """The same tensor on every replica's device; CPU devices share its memory."""
        first = tf.constant(value)
        found = []
        for device in self.devices:
            with tf.device(device):
                found.append(tf.identity(first))
        return found

    def at(self, own: int) -> int:
        """Where what belongs to a replica of this process stands in a list by device."""
        return own - self.own_ids.start

    def device(self, own: int) -> str:
        found: str = self.devices[self.at(own)]
        return found

    def place(self, own: int, role: int) -> Place:
        """What replica `own` needs to take the part of replica `role`."""
        template = self.layout.own_canaries(role)
        with tf.device(self.device(own)):
            return Place(
                tf.constant(template),
                [tf.constant(template[gap]) for gap in self.training.gaps],
                tf.constant(self.training.positions(role)),
            )

    def _make_ready(self) -> None:
        self.record.engine = "tf.function" if self.captures else "eager"
        self.runners = [self.training.precision.hand_over() for _ in self.own_ids]
        # The replica whose Python code was the first to raise.
        self.raised_in: int | None = None
        # What each replica's Python code noted each time that it ran: at every step, or once, while it was traced.
        self.noted: list[list[Noted]] = [[] for _ in range(self.num_replicas)]

    def put(self, variable: Any, value: Any) -> None:
        """Set every copy of a variable."""
        for own in self.own_ids:
            self.put_in_copy(variable, own, value)

    def put_in_copy(self, variable: Any, own: int, value: Any) -> None:
        self.strategy.experimental_local_results(variable)[self.at(own)].assign(value)

    @property
    def shares_iterator(self) -> bool:
        return mechanism(self.config, "cursor") == "shared_iterator"

    @contextmanager
    def told(self) -> Iterator[None]:
        """Say of what a replica raises whose it is, as far as that is known.

        Raises:
            RunBroken: a replica raised.
        """
        try:
            yield
        except InjectedFault as error:
            message = f"replica {error.replica} raised InjectedFault: {error}"
            raise RunBroken("crash", message, error.replica, error.step) from error
        except Exception as error:
            broken = self.guard.broken(error) if self.guard is not None else None
            if broken is None and self.raised_in is not None:
                # A graph is traced before its first step; operator by operator, each step runs the replicas' code.
                step = max(self.record.steps_done, len(self.noted[self.raised_in])) if not self.captures else 0
                message = f"replica {self.raised_in} raised {type(error).__name__}: {error}"
                broken = RunBroken("crash", message, self.raised_in, step)
            if broken is None:
                raise
            log.exception("a replica raised")
            raise broken from error

    def run(self) -> None:
        recorders = self.recorders()
        kept_steps, self.record.references_skipped = reference_steps(self.config, self.layout)
        self.make_first_call()
        if self.checkpoints is not None and self.first_step:
            mirrored_checkpoints.go_on(self, self.checkpoints)
        with stalls_end_the_run(self.record, self.config.watchdog.seconds, self.stop):
            stopped = self._take_all(recorders, kept_steps)
        self.record.copies = self.copies()
        if stopped:
            return
        self.evaluate(self.config.train.steps)
        if self.training.audited:
            self.after_the_run.complete()
            self.after_the_run.look_again()

    def _take_all(self, recorders: Sequence[Recorder], kept_steps: Container[int]) -> bool:
        """All steps, call by call.

        Returns:
            Whether the run was stopped on the way.
        """
        steps = self.config.train.steps
        first, length = self.first_step, FIRST_STEPS
        started = time.perf_counter() - self.record.duration_seconds
        stopped = self.stop.is_set()
        while first < steps and not stopped:
            if self.guard is not None:
                self.guard.faults.strike(first, self.own_ids)
            last = self._next_stop(first, first + length)
            called = time.perf_counter()
            kept = [step for step in range(first, last) if step in kept_steps]
            results = self.call(first, last, kept)
            seconds, stopped = self.agree(max(time.perf_counter() - called, 1e-6))
            length = max(1, min(2 * length, int((last - first) * CALL_SECONDS / seconds)))
            for recorder, result in zip(recorders, results, strict=True):
                self.read_off(recorder, first, result.rows)
            self.add_up(results)
            for slot, step in enumerate(kept):
                # What was traced is what every step repeats; what Python ran was noted at each.
                self.keep_references(
                    step, slot, results, [noted[-1 if self.captures else step - last] for noted in self.noted]
                )
            self.record.duration_seconds = time.perf_counter() - started
            self._report(last)
            if self.checkpoints is not None and self.checkpoints.after(first) == last:
                mirrored_checkpoints.save(self, self.checkpoints, last)
            first = last
        return stopped

    def agree(self, seconds: float) -> tuple[float, bool]:
        """What all who host replicas go by after a call that took `seconds`: its time, and whether to stop."""
        return seconds, self.stop.is_set()

    def _next_stop(self, first: int, last: int) -> int:
        """Where a call that begins at `first` ends: by `last`, or before an evaluation, a checkpoint or a fault."""
        every = self.config.train.evaluate_every
        ends = [self.config.train.steps, last, *([(first // every + 1) * every] if every else [])]
        saved = -1 if self.checkpoints is None else self.checkpoints.after(first)
        if saved > 0:
            ends.append(saved)
        if self.guard is not None:
            ends += [step for step in self.guard.faults.struck_at() if step > first]
        return min(ends)

    # What a replica does: traced once and run by TensorFlow, or with train.capture=never by Python at every step.

    def replica_step(
        self, samples: Sequence[Tensor], steps: Sequence[Tensor], places: Sequence[Place]
    ) -> tuple[Tensor, ...]:
        """One step of the replica that calls, which takes what is its own of what is given for each.

        Returns:
            The step's row; as audited, its snapshot, contribution and their total; under `audit=full` its sums.
        """
        own = replica_id()
        at = self.at(own)
        try:
            outcome: tuple[Tensor, ...] = self.runners[at](
                lambda: self._own_step(own, samples[at], steps[at], places[at])
            )
        except Exception:
            self.raised_in = own if self.raised_in is None else self.raised_in
            raise
        return outcome

    def _own_step(self, own: int, samples: Tensor, step: Tensor, place: Place) -> tuple[Tensor, ...]:
        context, training = tf.distribute.get_replica_context(), self.training
        mark(BEGIN)
        if not self.noted[own]:
            compare_settings(self.record, own)
        at, samples = self._taken(own, samples, step)
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
                place.template,
                tf.gather(self.train_x[self.at(own)], samples),
                tf.gather(self.train_y[self.at(own)], samples),
                samples,
                step,
                place.positions,
                gaps=place.gaps,
                compute_dtype=asked,
                trains=own < training.num_trainers,
            )
        if self.guard is not None:
            contribution, row = self.guard.guarded(own, step, contribution, row, place.template, place.positions)
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
        base = self.flat.read_value() if self.needs_base else before
        delta = self.deltas.full(total, contribution, averaged, base)
        if training.audited:
            seen, now = (tf.gather(vector, self.first_canaries) for vector in (before, base))
            counts = tf.stack([tf.reduce_sum(seen), tf.reduce_sum(now - seen), tf.cast(at, tf.float32)])
            row = tf.concat([row, counts], 0)
        # When nobody reads the old values any more, TensorFlow adds to them where they stand; else to a copy.
        with tf.control_dependencies([row]):
            self._assign(own, base, delta)
        if not training.audited:
            return (row,)
        if not self.full:
            return row, prefix, contribution, total
        return row, prefix, contribution, total, tf.cast(tf.stack([delta, tf.abs(base + delta)]), tf.float64)

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

    def _taken(self, own: int, samples: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """Where the cursor stood, and the samples that it gave, the plan's where there is none: int32 [batch]."""
        if self.position is None:
            return step, samples
        point_in_copy(READ, "cursor", of=CURSOR)
        at = self.position.read_value()
        point_in_copy(UPDATE, "cursor", of=CURSOR)
        self.position.assign_add(1)
        return at, tf.gather(self.tables[self.at(own)], at)

    def _draw(self, shape: tuple[int, int]) -> Tensor:
        """32-bit words as Keras' random layers draw: from a seed that is a variable, and counts the draws."""
        assert self.generator is not None
        point_in_copy(READ, "generator", of=GENERATOR)
        seed = self.generator.read_value()
        point_in_copy(UPDATE, "generator", of=GENERATOR)
        self.generator.assign_add([0, 1])
        return tf.cast(tf.random.stateless_uniform(shape, seed, None, None, tf.uint32), tf.int64)

    # What the host does.

    def make_first_call(self) -> None:
        """Trace the graph before the clock starts: no steps. A call that main makes first is made here, outside."""
        if mechanism(self.config, "first_call") == "before_start":
            self.record.first_calls = 1
        if self.captures:
            with doing("tracing the step"):
                self.call(0, 0, [])

    def recorders(self) -> list[Recorder]:
        return [Recorder(replica, self.training.row, self.layout) for replica in self.record.replicas]

    def read_off(self, recorder: Recorder, first: int, rows: Floats) -> None:
        """Record one replica's steps from `first` on, which are the last that it took."""
        if not self.training.audited:
            recorder.extend(rows, NOTHING_NOTED)
            return
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

    def call(self, first: int, last: int, kept: Sequence[int], roles: Sequence[int] | None = None) -> list[Outcome]:
        """Take the steps from `first` up to but without `last`, and keep the vectors of those in `kept`.

        Args:
            roles: whose part each replica takes; its own where None.

        Returns:
            Every replica's results.
        """
        plan = self.training.batches.indices(first, last)
        taken = [roles[own] if roles else own for own in self.own_ids]
        places = self.places if roles is None else [self.place(*each) for each in zip(self.own_ids, taken, strict=True)]
        plans, firsts = [], []
        for device, role in zip(self.devices, taken, strict=True):
            with tf.device(device):
                plans.append(tf.constant(plan[:, role]))
                firsts.append(tf.constant(first))
        return self.calls(first, last, kept, plans, firsts, places)

    def copies(self) -> Floats:
        """All copies of the flat vector: float32 [num_replicas, layout.size]."""
        return self.own_copies()

    def own_copies(self) -> Floats:
        """Those of the replicas that are hosted here."""
        return np.stack([copy.numpy() for copy in self.strategy.experimental_local_results(self.flat)])

    def _report(self, step: int) -> None:
        self.watcher.progress(self.record)
        every = self.config.train.evaluate_every
        if every and step % every == 0 and step < self.config.train.steps:
            self.evaluate(step)
        if self.training.audited:
            # Missing from any copy is missing.
            own = self.own_copies()
            kept, apart = self.kept(own), largest_difference(self.layout, own)
            self.watcher.kept(step, float(kept.sum()), step * self.num_replicas, apart)

    def kept(self, own: Floats) -> Floats:
        """Per replica, how many of its updates are in every copy: float32 [num_replicas].

        Args:
            own: the copies that are here.
        """
        found: Floats = np.min([self.layout.kept(copy) for copy in own], axis=0)
        return found

    def keep_references(self, step: int, slot: int, results: Sequence[Outcome], noted: Sequence[Noted]) -> None:
        """Keep the gradients of one step, by replica: those that stand at `slot` of the results, and its notes."""
        self.record.references += [
            Reference(
                own,
                step,
                result.snapshots[slot],
                result.contributions[slot],
                result.totals[slot] * np.float32(self.scale),
                batch=step if self.shares_iterator else step * self.num_replicas + own,
                asked=DTYPES[noted[own].asked],
            )
            for own, result in enumerate(results[: self.training.num_trainers])
            if result.snapshots is not None and result.contributions is not None and result.totals is not None
        ]

    def add_up(self, results: Sequence[Outcome]) -> None:
        """Sum what every copy should have been given: all replicas' deltas, or under a reduction the one they share."""
        for result in results[:1] if self.assignment.reduced else results:
            if result.sums is not None:
                added, magnitudes = result.sums
                self.record.added = added + _or_zero(self.record.added)
                self.record.magnitudes = magnitudes + _or_zero(self.record.magnitudes)

    def evaluate(self, step: int) -> None:
        prefix = tf.constant(self.own_copies()[0, : self.layout.read_size])
        test = self.training.dataset
        evaluation = evaluate(step, lambda x: self.predict(prefix, tf.constant(x)).numpy(), test.test_x, test.test_y)
        self.record.evaluations.append(evaluation)
        self.watcher.evaluated(evaluation)


def _or_zero(total: NDArray[np.float64] | None) -> NDArray[np.float64] | float:
    return 0.0 if total is None else total

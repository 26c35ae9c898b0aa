"""Replicas of MirroredStrategy that count in one variable, of which each has a copy.

A mode is what `trainer/updates/mirrored.py` says of it: whether increments are reduced first, and how TensorFlow
aggregates what replicas assign. A count is summed, never averaged, so that for counts `unscaled_sum` is `all_reduce`.

Every element is a row with a place for each replica, which counts in its own: what a copy lacks is known by replica.
With one place for all, copies that each lack another replica's increments would look alike.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import tensorflow as tf

from trainer.audit.records import RunRecord
from trainer.config import Config
from trainer.schedule.operations import BEGIN, COMPUTE, READ, UPDATE, WRITE
from trainer.schedule.order import Order
from trainer.schedule.point import mark, point
from trainer.schedule.turn_table import TurnTable
from trainer.strategies.hosting import StopFlag, Watcher
from trainer.strategies.in_replica import barrier, point_in_copy, replica_id
from trainer.strategies.reduction import DirectReduction
from trainer.updates.mirrored import ASSIGNMENTS
from trainer.workloads.counter.ended import Ended
from trainer.workloads.counter.found import find
from trainer.workloads.counter.gradients import TAKEN
from trainer.workloads.counter.shared import TOTAL, Numbers
from trainer.workloads.counter.ways import start_of, way_of

# Steps of one call of the graph, so that progress shows and a stop is heeded.
STEPS_A_CALL = 100


class Copies:
    """The variable with its copies, made once; `reset` sets all of them."""

    def __init__(self, config: Config) -> None:
        self.config, self.num_replicas = config, config.num_replicas
        self.assignment = ASSIGNMENTS[config.update_mode.name]
        self._take = TAKEN.get(way_of(config).name)
        elements = config.workload.elements
        # Gradient steps are not counted, and have no places.
        self._shape = (max(1, elements), *([self.num_replicas] if self._take is None else []))
        gpus = tf.config.list_logical_devices("GPU")
        devices = gpus if len(gpus) >= self.num_replicas else tf.config.list_logical_devices("CPU")
        names = [device.name for device in devices[: self.num_replicas]]
        self.strategy = tf.distribute.MirroredStrategy(names, cross_device_ops=DirectReduction())
        with self.strategy.scope():
            self.variable = tf.Variable(
                tf.zeros(self._shape, tf.float64), aggregation=tf.VariableAggregation[self.assignment.aggregation]
            )
        self.steps_in_graph = tf.function(self._steps, autograph=False)

    def reset(self) -> None:
        for copy in self.strategy.experimental_local_results(self.variable):
            copy.assign(tf.fill(self._shape, tf.constant(start_of(self.config), tf.float64)))

    def values(self) -> Numbers:
        """All copies: float64 [num_replicas, elements, places]."""
        copies = self.strategy.experimental_local_results(self.variable)
        return np.stack([copy.numpy().reshape(self._shape[0], -1) for copy in copies])

    def step(self) -> None:
        """One replica's step: what it adds, reduced or not, put into its copy or into all."""
        own = replica_id()
        mark(BEGIN)
        added = self._added(own)
        mark(COMPUTE)
        if self.assignment.reduced:
            added = tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, added)
            if self._take is not None and self.assignment.averaged:
                added = added / self.num_replicas
        self._assign(own, added)

    def _added(self, own: int) -> Any:
        if self._take is None:
            return tf.broadcast_to(tf.one_hot(own, self.num_replicas, dtype=tf.float64), self._shape)
        point_in_copy(READ, TOTAL)
        return -self._take(self.variable.read_value(), tf.constant(own + 1, tf.float64))

    def _assign(self, own: int, added: Any) -> None:
        base = None
        if self.assignment.reassigned:
            point_in_copy(READ, TOTAL)
            base = self.variable.read_value()
        if self.assignment.aggregation != "NONE":
            # So that nobody reads a copy after its change was announced and before it is made.
            barrier("assign")
        for copy in self._written_by(own):
            point(UPDATE if base is None else WRITE, f"{copy}:{TOTAL}")
        if base is None:
            self.variable.assign_add(added)
        else:
            self.variable.assign(base + added)

    def _written_by(self, own: int) -> Iterable[int]:
        """The copies that what this replica assigns gets to."""
        if self.assignment.aggregation == "ONLY_FIRST_REPLICA":
            return range(0 if own else self.num_replicas)
        return [own]

    def _steps(self, count: Any) -> Any:
        """Several steps in one graph."""

        def body(done: Any) -> Any:
            self.strategy.run(self.step)
            return done + 1

        return tf.while_loop(lambda done: done < count, body, (tf.constant(0),), parallel_iterations=1)


def count(config: Config, record: RunRecord, watcher: Watcher, stop: StopFlag) -> Ended:
    """Take all steps in graphs."""
    record.engine = "tf.function"
    copies = Copies(config)
    copies.reset()
    done = 0
    while done < record.steps and not stop.is_set():
        steps = min(STEPS_A_CALL, record.steps - done)
        copies.steps_in_graph(tf.constant(steps))
        done += steps
        for replica in record.replicas:
            replica.steps_done = done
        watcher.progress(record)
    return Ended(config, copies.values())


class MirroredCase:
    """`trainer/schedule/case.py` for MirroredStrategy: steps are taken eagerly, for a graph has an order of its own."""

    copies = True

    def __init__(self, config: Config) -> None:
        self.num_replicas = config.num_replicas
        self._config, self._copies = config, Copies(config)
        assignment = self._copies.assignment
        # What TensorFlow sums over replicas holds them all, too.
        self.joint = assignment.reduced or assignment.aggregation == "SUM"

    def run(self, order: Order, record: RunRecord) -> None:
        record.engine = "eager"
        self._copies.reset()

        def replica() -> None:
            for step in range(record.steps):
                if step:
                    barrier("step")  # as between two calls of `strategy.run`
                self._copies.step()

        TurnTable(order, self._config.watchdog.seconds).run(self._copies.strategy, replica)
        for each in record.replicas:
            each.steps_done = record.steps
        values = self._copies.values()
        record.findings = find(Ended(self._config, values))
        record.ended_in = values.tobytes()

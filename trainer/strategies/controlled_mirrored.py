"""Runs of `strategy=mirrored` in one order after another: `trainer/schedule/case.py` for the training step.

Steps are taken eagerly: a graph's operations have an order of their own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from trainer.audit.records import Floats, Reference, RunRecord
from trainer.config import Config
from trainer.schedule.locks import modelled
from trainer.schedule.order import Order
from trainer.schedule.turn_table import TurnTable
from trainer.strategies.hosting import StopFlag, Watcher, compare_settings, reference_steps, turned_on
from trainer.strategies.in_replica import barrier, replica_id
from trainer.strategies.mirrored import Mirrored
from trainer.strategies.mirrored_calls import Outcome, outcome_of
from trainer.updates.mirrored import ASSIGNMENTS
from trainer.workloads.train import Training

Steps = list[list[Outcome]]  # by step, then by replica


class MirroredCase:
    """The training step, from the initial weights on, with everything that replicas share as it was at first.

    What costs time and is the same every time is kept: the strategy, its variables and the model.
    """

    copies = True

    def __init__(self, config: Config, training: Training, watcher: Watcher, stop: StopFlag) -> None:
        self.num_replicas = training.num_replicas
        assignment = ASSIGNMENTS[config.update_mode.name]
        # What TensorFlow sums over replicas holds them all, too.
        self.joint = assignment.reduced or assignment.aggregation == "SUM"
        self._config = dataclasses.replace(config, train=dataclasses.replace(config.train, capture="never"))
        self._training = training
        self._watcher, self._stop = watcher, stop
        self._mirrored: Mirrored | None = None

    def run(self, order: Order, record: RunRecord) -> None:
        training = self._training
        run, steps = self._take_all_steps(order, record)
        record.mode_left = training.mode_left
        self._read_off(run, steps)
        if training.audited:
            # Where a step depends on what others do meanwhile, it is the whole order that is run again.
            recompute = None if run.after_the_run.is_order_free else self._taken_again(order, record)
            with turned_on(training):
                run.after_the_run.complete(recompute)

    def _take_all_steps(self, order: Order, record: RunRecord) -> tuple[Mirrored, Steps]:
        """Begin as at first and take every step."""
        with modelled():
            self._training.renew()
            with turned_on(self._training):
                run = self._begun(record)
                return run, self._take_steps(run, order)

    def _begun(self, record: RunRecord) -> Mirrored:
        if self._mirrored is None:
            self._mirrored = Mirrored(self._config, self._training, record, self._watcher, self._stop)
        else:
            self._mirrored.begin_again(record)
        self._mirrored.make_first_call()
        return self._mirrored

    def _take_steps(self, run: Mirrored, order: Order) -> Steps:
        """All steps in the order that `order` makes; what each has come to."""
        plan = [tf.constant(batches) for batches in self._training.batches.indices(0, self._config.train.steps)]

        def take_steps() -> list[tuple[Any, ...]]:
            found = []
            for step, batches in enumerate(plan):
                if step:
                    barrier("step")  # as between two calls of `strategy.run`
                steps = [tf.constant(step)] * self.num_replicas
                found.append(run.replica_step(batches, steps, run.places))
            compare_settings(run.record, replica_id())
            return found

        by_replica = TurnTable(order, self._config.watchdog.seconds).run(run.strategy, take_steps)
        return [[_taken(*parts) for parts in step] for step in zip(*by_replica, strict=True)]

    def _read_off(self, run: Mirrored, steps: Steps) -> None:
        """Record what the steps have come to."""
        for own, recorder in enumerate(run.recorders()):
            run.read_off(recorder, 0, np.concatenate([step[own].rows for step in steps]))
        kept, run.record.references_skipped = reference_steps(self._config, run.layout)
        for number, step in enumerate(steps):
            run.add_up(step)
            if number in kept:
                run.keep_references(number, 0, step, [noted[number] for noted in run.noted])
        run.record.copies = run.copies()

    def _taken_again(self, order: Order, record: RunRecord) -> Callable[[Reference], Floats]:
        """Every step's contributions from a second run in the same order."""
        granted = order.granted
        _, steps = self._take_all_steps(Order(self.num_replicas, lambda again: granted[len(again.granted)]), record)

        def contribution(reference: Reference) -> Floats:
            found = steps[reference.step][reference.replica_id].contributions
            assert found is not None, "only audited runs are computed again"
            vector: Floats = found[0]
            return vector

        return contribution


def _taken(row: Any, *parts: Any) -> Outcome:
    """One replica's results of one step, as a call that keeps it would return them."""
    vectors = [part.numpy()[np.newaxis] for part in parts[:3]]
    return outcome_of(1, row.numpy()[np.newaxis], *vectors, *(part.numpy() for part in parts[3:]))

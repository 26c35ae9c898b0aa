"""What is done for the audit once a mirrored run is over: gradients are computed again, settings looked at again."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from trainer.audit.records import DTYPES, Floats, Noted, Reference
from trainer.holders import holder
from trainer.strategies.hosting import compare_settings, complete_references, expect, joint_samples, turned_on
from trainer.strategies.in_replica import gradients_by_tape, replica_id

if TYPE_CHECKING:
    from trainer.strategies.mirrored import Mirrored

Tensor = Any
Recompute = Callable[[Reference], Floats]


class AfterTheRun:
    """Fills in what the record of an audited run still lacks.

    The shared variables are written over: the run is done and its copies are kept. What was computed again is kept as
    long as the same is asked for: under a schedule one run after another comes to the same steps.
    """

    def __init__(self, run: Mirrored) -> None:
        self._run = run
        self._joint_step = tf.function(self._take_joint_step, autograph=False)
        self._again: dict[int, tuple[Any, list[Floats]]] = {}
        self._joint: dict[tuple[int, int, str], tuple[Any, Floats]] = {}
        # Synchronized normalization adds up over devices in their order, which a change of places would change. And
        # where replicas were asked for different things, or may have got them, the place decides what is computed.
        config = run.config
        alike = getattr(config.model, "normalization", "none") != "sync_batch" and not config.train.evaluators
        moved = 1 if alike and self.is_order_free else 0
        self._roles = [(own - moved) % run.num_replicas for own in range(run.num_replicas)]

    @property
    def is_order_free(self) -> bool:
        """Whether what a replica computes at a snapshot depends on nothing that other replicas do meanwhile."""
        return all(holder(self._run.config, key).safe == "always" for key in ("precision", "first_call"))

    def complete(self, recompute: Recompute | None = None) -> None:
        """Put down what the audit holds batches, random numbers and gradients to.

        Args:
            recompute: computes a reference's contribution again, where the step alone does not say what it was.
        """
        run = self._run
        expect(run.record, run.training)
        if run.captures and not run.training.explicit:
            modes = ", ".join(f"replica {own} {_mode(notes[-1])}" for own, notes in enumerate(run.noted))
            run.record.frozen = f"the graph keeps what was in force while it was traced ({modes})"
        if not run.training.draws or run.training.derived:  # else the numbers that the steps drew are gone
            complete_references(
                run.config, run.record, recompute or self._in_the_neighbours_place(), self._joint_gradient
            )

    def look_again(self) -> None:
        """Compare the settings that a replica's thread has after the last step: it runs its Python code once more."""
        run = self._run

        def look() -> None:
            own = replica_id()
            run.runners[run.at(own)](lambda: compare_settings(run.record, own))

        run.strategy.run(look)

    def _in_the_neighbours_place(self) -> Recompute:
        """Runs each kept step again, every replica in its neighbour's place where that changes nothing."""
        snapshots = {(each.step, each.replica_id): each.snapshot for each in self._run.record.references}

        def recompute(reference: Reference) -> Floats:
            # An evaluator keeps no reference; what it computes here is not looked at.
            given = [snapshots.get((reference.step, role), reference.snapshot) for role in self._roles]
            return self._take_again(reference, given)[self._roles.index(reference.replica_id)]

        return recompute

    def _take_again(self, reference: Reference, given: list[Floats]) -> list[Floats]:
        """Every replica's contribution at the reference's step from the snapshots given, by place."""
        run, step = self._run, reference.step
        key = (reference.batch if run.position is not None else 0, [snapshot.tobytes() for snapshot in given])
        if step not in self._again or self._again[step][0] != key:
            for own in run.own_ids:
                padded = np.pad(given[own], (0, run.layout.size - run.layout.read_size))
                run.put_in_copy(run.flat, own, padded)
            if run.position is not None:
                run.put(run.position, np.int32(reference.batch))
            if not run.captures and any(noted[step].first_call for noted in run.noted):
                run.training.forget_first_call()  # or it would not be made again
            results = run.call(step, step + 1, [step], self._roles)
            self._again[step] = key, [result.contributions[0] for result in results if result.contributions is not None]
        return self._again[step][1]

    def _joint_gradient(self, reference: Reference, dtype: str) -> Floats:
        """The gradient of the batches that the training replicas used at the reference's step, taken as one."""
        run, step, at = self._run, reference.step, (reference.step, reference.replica_id, dtype)
        samples = joint_samples(run.record, run.training, step)
        key = (samples.tobytes(), reference.snapshot.tobytes())
        if at not in self._joint or self._joint[at][0] != key:
            with turned_on(run.training):  # again, in case that a replica has turned it off
                vector = self._joint_step(
                    tf.constant(reference.snapshot), tf.constant(samples), tf.constant(step), dtype
                )
            self._joint[at] = key, vector.numpy()
        return self._joint[at][1]

    def _take_joint_step(self, prefix: Tensor, samples: Tensor, step: Tensor, dtype: str) -> Tensor:
        run = self._run
        contribution, _ = run.training.step(
            gradients_by_tape,
            prefix,
            run.places[0].template,
            tf.gather(run.train_x[0], samples),
            tf.gather(run.train_y[0], samples),
            samples,
            step,
            tf.range(tf.size(samples)),
            compute_dtype=dtype,
        )
        return contribution


def _mode(noted: Noted) -> str:
    entry, left = (DTYPES[mode] if mode else "no mode" for mode in (noted.entry, noted.exit))
    return f"from {entry} to {left}" if entry != left else f"in {entry}"

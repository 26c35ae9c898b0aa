"""What is done for the audit once a mirrored run is over: gradients are computed again, settings looked at again."""

from __future__ import annotations

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


def complete(run: Mirrored) -> None:
    """Fill in what the record of an audited run still lacks.

    The shared variables are written over: the run is done and its copies are kept.
    """
    _expect(run)
    _complete_references(run)
    _look_again(run)


def _expect(run: Mirrored) -> None:
    """Put down what the audit holds batches and random numbers to."""
    expect(run.record, run.training)
    if run.captures and not run.training.explicit:
        modes = ", ".join(f"replica {own} {_mode(notes[-1])}" for own, notes in enumerate(run.noted))
        run.record.frozen = f"the graph keeps what was in force while it was traced ({modes})"


def _look_again(run: Mirrored) -> None:
    """Compare the settings that a replica's thread has after the last step: it runs its Python code once more."""

    def look() -> None:
        own = replica_id()
        run.runners[own](lambda: compare_settings(run.record, own))

    run.strategy.run(look)


def _complete_references(run: Mirrored) -> None:
    """Run each kept step again, every replica in its neighbour's place, and the joint batch at each snapshot."""
    if run.training.draws and not run.training.derived:
        return  # the numbers that the step drew are gone
    # Synchronized normalization adds up over devices in their order, which a change of places would change. And
    # where replicas were asked for different things, or may have got them, the place decides what is computed.
    config = run.config
    alike = getattr(config.model, "normalization", "none") != "sync_batch" and not config.train.evaluators
    safe = all(holder(config, key).safe == "always" for key in ("precision", "first_call"))
    moved = 1 if alike and safe else 0
    roles = [(own - moved) % run.num_replicas for own in range(run.num_replicas)]
    again: dict[int, Any] = {}
    joint_step = tf.function(lambda *inputs: _joint_step(run, *inputs), autograph=False)
    snapshots = {(reference.step, reference.replica_id): reference.snapshot for reference in run.record.references}

    def recompute(reference: Reference) -> Floats:
        step = reference.step
        if step not in again:
            for own, role in enumerate(roles):
                # An evaluator keeps no reference; what it computes here is not looked at.
                snapshot = snapshots.get((step, role), reference.snapshot)
                _put(run, run.flat, own, np.pad(snapshot, (0, run.layout.size - run.layout.read_size)))
                if run.position is not None:
                    _put(run, run.position, own, np.int32(reference.batch))
            again[step] = run.call(step, step + 1, roles)
        contribution: Floats = again[step][roles.index(reference.replica_id)].contribution
        return contribution

    complete_references(run.record, recompute, lambda reference: _joint_gradient(run, joint_step, reference))


def _put(run: Mirrored, variable: Any, own: int, value: Any) -> None:
    run.strategy.experimental_local_results(variable)[own].assign(value)


def _joint_gradient(run: Mirrored, joint_step: Any, reference: Reference) -> Floats:
    """The gradient of the batches that the training replicas used at the reference's step, taken as one."""
    samples = joint_samples(run.record, run.training, reference.step)
    with turned_on(run.training):  # again, in case that a replica has turned it off
        vector: Floats = joint_step(
            tf.constant(reference.snapshot), tf.constant(samples), tf.constant(reference.step)
        ).numpy()
    return vector


def _joint_step(run: Mirrored, prefix: Tensor, samples: Tensor, step: Tensor) -> Tensor:
    contribution, _ = run.training.step(
        gradients_by_tape,
        prefix,
        run.templates[0],
        tf.gather(run.train_x, samples),
        tf.gather(run.train_y, samples),
        samples,
        step,
        tf.range(tf.size(samples)),
        compute_dtype=run.training.asked[0],
    )
    return contribution


def _mode(noted: Noted) -> str:
    entry, left = (DTYPES[mode] if mode else "no mode" for mode in (noted.entry, noted.exit))
    return f"from {entry} to {left}" if entry != left else f"in {entry}"

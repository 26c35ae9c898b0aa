"""Checkpoints of mirrored replicas: what a process saves of its own, and how it goes on from there."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.audit.records import Noted
from trainer.checkpoint.checkpoints import Checkpoints
from trainer.checkpoint.contents import snapshot
from trainer.checkpoint.files import Arrays

if TYPE_CHECKING:
    from trainer.strategies.mirrored import Mirrored


def save(run: Mirrored, checkpoints: Checkpoints, step: int) -> None:
    """Save the run as it is after `step` steps, between two calls of the graph."""
    record, results = run.record, run.strategy.experimental_local_results
    arrays: Arrays = {"copies": run.own_copies()}
    for name, variable in _beside(run).items():
        arrays[name] = np.stack([copy.numpy() for copy in results(variable)])
    if record.added is not None and record.magnitudes is not None:
        arrays |= {"added": record.added, "magnitudes": record.magnitudes}
    facts = {"modes": [runner(run.training.precision.current) for runner in run.runners]}
    taken = snapshot(record, step, record.duration_seconds, arrays, facts, record.references)
    checkpoints.write(record, taken, record.evaluations)


def go_on(run: Mirrored, checkpoints: Checkpoints) -> None:
    """Be where the run was that is resumed.

    A graph that is run was traced just now as it was then, so that what is frozen in it is the same.
    """
    arrays, record, training = checkpoints.arrays, run.record, run.training
    for name, variable in {"copies": run.flat, **_beside(run)}.items():
        for own in run.own_ids:
            run.put_in_copy(variable, own, arrays[name][run.at(own)])
    record.added, record.magnitudes = arrays.get("added"), arrays.get("magnitudes")
    if not run.captures:
        with training.first_call.call():
            pass  # it was made, by whoever was to make it
        run.after_the_run.look_again()  # settings, at this process's first step
        for own, replica in enumerate(record.replicas):
            run.noted[own] = [Noted(*row) for row in replica.noted[: run.first_step].tolist()]
    for runner, mode in zip(run.runners, checkpoints.facts["modes"], strict=True):
        if runner(training.precision.current) != mode:
            runner(partial(training.precision.enable, mode))
    every, step = run.config.train.evaluate_every, run.first_step
    missing = all(each.step != step for each in record.evaluations)
    if every and step % every == 0 and step < run.config.train.steps and missing:
        run.evaluate(step)  # it was the last step then, and is not any more


def _beside(run: Mirrored) -> dict[str, Any]:
    """The variables that there are beside the flat one, by name."""
    found = {"generator": run.generator, "position": run.position}
    return {name: variable for name, variable in found.items() if variable is not None}

"""What every strategy needs besides its framework: who watches, when to keep a reference, how a run breaks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from data.plan import BatchPlan
from trainer.audit.findings import JOINT_TOLERANCE
from trainer.audit.gradients import joint_errors_above
from trainer.audit.orders import Explored
from trainer.audit.records import Evaluation, Floats, Noted, Reference, RunRecord
from trainer.audit.verdict import ErrorKind
from trainer.config import Config
from trainer.state.layout import Layout
from trainer.state.settings import differences, snapshot

if TYPE_CHECKING:
    from trainer.workloads.train import Training

VECTORS_A_REFERENCE = 5  # snapshot, contribution, applied, recomputed, joint
PLAN_STEPS = 4096  # steps of the batch plan that are looked up at a time
EVALUATION_BATCH = 1024  # samples a call, so that a large held-out set does not need one large activation


class Watcher(Protocol):
    """Who is told how a run goes. All calls come from the process's main thread."""

    def progress(self, record: RunRecord) -> None: ...

    def kept(self, step: int, kept: float, made: int, apart: float | None = None) -> None:
        """Updates that the canaries of the shared variables show, of those committed so far, at about `step`.

        Args:
            apart: largest difference between the copies by then, where there is more than one.
        """

    def evaluated(self, evaluation: Evaluation) -> None: ...

    def warned(self, message: str) -> None:
        """Something that the user should know at once, and that the run survives."""

    def explored(self, explored: Explored, share: float) -> None:
        """What the orders that were run have shown so far, and an estimate, 0 to 1, of how much of it all that is."""


class StopFlag(Protocol):
    def is_set(self) -> bool: ...


class RunBroken(Exception):
    """The run cannot go on: a replica raised, or nothing moves any more."""

    def __init__(self, kind: ErrorKind, message: str, replica: int | None = None, step: int | None = None) -> None:
        super().__init__(message)
        self.kind: ErrorKind = kind
        self.message = message
        self.replica = replica
        self.step = step


def nonfinite(layout: Layout, contribution: Floats, own: int, step: int) -> RunBroken:
    """A replica's contribution that is not finite: which variable's part, the first one's."""
    for place, segment in enumerate(layout.read_segments):
        wrong = np.flatnonzero(~np.isfinite(contribution[segment.span]))
        if wrong.size:
            first = int(wrong[0])
            return stopped_by(
                layout, own, step, place, int(wrong.size), first, f"{contribution[segment.span][first]:g} "
            )
    raise ValueError("all values are finite")


def stopped_by(layout: Layout, own: int, step: int, place: int, values: int, first: int, value: str = "") -> RunBroken:
    """A run that `train.on_nonfinite=stop` ends.

    Args:
        place: of the variable in `layout.read_segments`; `values` of it are not finite, the `first` and others.
        value: of the first, with a space behind it, where it is known.
    """
    segment = layout.read_segments[place]
    what = "change" if segment.kind == "statistic" else "gradient"
    message = (
        f"the {what} of {segment.name} is not finite: replica {own}, step {step}, {values:,} of {segment.size:,} "
        f"values, the first {value}at {first} (train.on_nonfinite=stop)"
    )
    return RunBroken("nonfinite", message, own, step)


def reference_steps(config: Config, layout: Layout) -> tuple[frozenset[int], int]:
    """The steps whose gradients are kept whole, and how many more did not fit the memory set aside for them."""
    if config.audit.name == "none":
        return frozenset(), 0
    wanted = range(0, config.train.steps, config.audit.reference_every)
    bytes_a_step = VECTORS_A_REFERENCE * layout.read_size * 4 * config.replicas_in_all
    fits = config.audit.reference_mebibytes * 2**20 // bytes_a_step
    return frozenset(wanted[:fits]), max(0, len(wanted) - fits)


def complete_references(
    config: Config,
    record: RunRecord,
    recompute: Callable[[Reference], Floats],
    joint: Callable[[Reference, str], Floats],
) -> None:
    """After the run: compute each reference's gradient again, and the joint batch's gradient at its snapshot.

    Where that is not what was applied and the precision is a low one, how much of it is rounding.

    Args:
        joint: in a dtype, that which the reference was asked for or float32.
    """
    each_once = _Once(joint)
    for reference in record.references:
        reference.recomputed = recompute(reference)
        reference.joint = each_once(reference, reference.asked)
    doubted = joint_errors_above(record, JOINT_TOLERANCE[config.precision.name])
    in_float32 = _Once(joint)
    for reference in record.references:
        if reference.asked != "float32" and (reference.step, reference.replica_id) in doubted:
            reference.joint_in_float32 = in_float32(reference, "float32")


class _Once:
    """Under all-reduce the replicas of a step share one snapshot, and so one joint gradient."""

    def __init__(self, joint: Callable[[Reference, str], Floats]) -> None:
        self._joint = joint
        self._last: tuple[int, Floats, Floats] | None = None

    def __call__(self, reference: Reference, dtype: str) -> Floats:
        last = self._last
        if last is None or last[0] != reference.step or not np.array_equal(last[1], reference.snapshot):
            last = self._last = (reference.step, reference.snapshot, self._joint(reference, dtype))
        return last[2]


def turned_on(training: Training) -> AbstractContextManager[None]:
    """The precision mode round the whole training, where main is who turns it on."""
    return training.turned_on(training.asked[0]) if training.enabled_in == "main" else nullcontext()


def compare_settings(record: RunRecord, own: int) -> None:
    """Note the framework settings of the calling thread, a replica's, that are not what was asked."""
    found = record.settings.setdefault(own, [])
    found += [each for each in differences(record.settings_asked, snapshot()) if each not in found]


def expect(record: RunRecord, training: Training) -> None:
    """After the run, put down what the audit holds batches and derived random numbers to."""
    record.planned = planned_first_samples(training.batches, record.steps)
    record.draws = bool(training.draws)
    if training.draws and training.derived:
        record.expected_words = np.stack(
            [training.expected_words(record.steps, own) for own in range(training.num_replicas)]
        )


def joint_samples(record: RunRecord, training: Training, step: int) -> NDArray[np.int32]:
    """The samples that the training replicas used at a step, end to end."""
    replicas, at = record.replicas[: training.num_trainers], Noted._fields.index("batch")
    return np.concatenate([training.batches.batch(int(replica.noted[step, at])) for replica in replicas])


def planned_first_samples(plan: BatchPlan, steps: int) -> NDArray[np.int32]:
    """The first sample of every batch of the plan, by number: int32 [replicas x steps]."""
    spans = [(first, min(first + PLAN_STEPS, steps)) for first in range(0, steps, PLAN_STEPS)]
    return np.concatenate([plan.indices(first, last)[:, :, 0].reshape(-1) for first, last in spans])


def evaluate(step: int, predict: Callable[[Floats], Floats], x: Floats, y: NDArray[np.int32]) -> Evaluation:
    """Accuracy and mean cross-entropy on held-out samples, in batches."""
    logits = np.concatenate([predict(x[span]) for span in _spans(len(x))]).astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(y)), y]
    return Evaluation(step, float((logits.argmax(axis=1) == y).mean()), float(losses.mean()))


def _spans(samples: int) -> Iterator[slice]:
    for first in range(0, samples, EVALUATION_BATCH):
        yield slice(first, first + EVALUATION_BATCH)

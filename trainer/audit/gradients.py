"""Gradient consistency: how far replicas' gradients agree with each other and with the joint batch's. NumPy only."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np

from trainer.audit.records import Floats, Reference, RunRecord
from trainer.state.layout import Layout

# A joint gradient that has all but vanished is mostly rounding: errors are taken relative to at least this share of the
# run's largest.
VANISHED = 0.01


@dataclass
class GradientRow:
    """Gradients of one step that was kept whole.

    Attributes:
        cosine_min: least pairwise cosine between replicas' gradients; None with one replica.
        norms: replica -> L2 norm of its gradient.
        errors: replica -> L2 distance of what was applied from the joint batch's gradient at the replica's snapshot,
            relative to the latter's norm (see `VANISHED`); empty where no joint gradient was computed.
        rounding: replica -> by how much the joint gradient in float32 is off the same way; where it was computed.
        multiples: replica -> the multiple of the joint gradient that comes nearest to what was applied, and how far
            off it is, relative to its norm; where a joint gradient was computed and is not zero.
    """

    step: int
    cosine_min: float | None
    norms: dict[int, float] = field(default_factory=dict)
    errors: dict[int, float] = field(default_factory=dict)
    rounding: dict[int, float] = field(default_factory=dict)
    multiples: dict[int, tuple[float, float]] = field(default_factory=dict)


def gradient_rows(record: RunRecord) -> list[GradientRow]:
    """One row for each step that was kept, in order."""
    layout = record.layout
    by_step: dict[int, list[Reference]] = defaultdict(list)
    for reference in record.references:
        by_step[reference.step].append(reference)
    joints = [reference.joint for reference in record.references if reference.joint is not None]
    largest = max((_norm(gradient(layout, joint)) for joint in joints), default=0.0)
    return [_row(layout, step, by_step[step], largest) for step in sorted(by_step)]


def joint_errors_above(record: RunRecord, tolerance: float) -> set[tuple[int, int]]:
    """(step, replica) of what was applied and is further than that from the joint gradient, relative to it."""
    return {
        (row.step, own) for row in gradient_rows(record) for own, error in row.errors.items() if not error <= tolerance
    }


def cosines(record: RunRecord, step: int) -> dict[int, dict[int, float]]:
    """Replica -> replica -> cosine between their gradients at a step; not-a-number where one is zero or not finite."""
    found = {
        reference.replica_id: gradient(record.layout, reference.contribution)
        for reference in record.references
        if reference.step == step
    }
    return {one: {other: _cosine(own, others) for other, others in found.items()} for one, own in found.items()}


def _cosine(one: Floats, other: Floats) -> float:
    norms = _norm(one) * _norm(other)
    return float(np.dot(one.astype(np.float64), other)) / norms if norms and math.isfinite(norms) else math.nan


def gradient(layout: Layout, contribution: Floats) -> Floats:
    """The gradient in a contribution, all weights end to end, without canaries and padding."""
    return layout.values_of(contribution, kinds=("weight",))


def _row(layout: Layout, step: int, references: Sequence[Reference], largest: float) -> GradientRow:
    gradients = {reference.replica_id: gradient(layout, reference.contribution) for reference in references}
    row = GradientRow(step, _cosine_min(list(gradients.values())))
    row.norms = {replica_id: _norm(own) for replica_id, own in gradients.items()}
    for reference in references:
        if reference.joint is not None:
            own, joint = reference.replica_id, gradient(layout, reference.joint)
            applied = gradient(layout, reference.applied)
            scale = max(_norm(joint), VANISHED * largest)
            distance = _norm(applied - joint)
            row.errors[own] = distance / scale if scale else distance
            if reference.joint_in_float32 is not None and scale:
                row.rounding[own] = _norm(gradient(layout, reference.joint_in_float32) - joint) / scale
            if _norm(joint):
                row.multiples[own] = _multiple(applied, joint)
    return row


def _multiple(applied: Floats, joint: Floats) -> tuple[float, float]:
    factor = float(np.dot(applied.astype(np.float64), joint)) / _norm(joint) ** 2
    distance = float(np.linalg.norm(applied - factor * joint.astype(np.float64)))
    nearest = abs(factor) * _norm(joint)
    return factor, distance / nearest if nearest else distance


def _cosine_min(gradients: Sequence[Floats]) -> float | None:
    norms = [_norm(gradient) for gradient in gradients]
    pairs = [
        float(np.dot(gradients[one].astype(np.float64), gradients[other])) / (norms[one] * norms[other])
        for one, other in combinations(range(len(gradients)), 2)
        if norms[one] and norms[other]
    ]
    return min(pairs, default=None)


def _norm(vector: Floats) -> float:
    return float(np.linalg.norm(vector.astype(np.float64)))

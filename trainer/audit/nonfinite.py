"""Losses and variables that are not finite, and updates that were skipped for a gradient that was not. NumPy only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from trainer.audit.findings import Finding, not_checked, told_copies
from trainer.audit.records import Floats, RunRecord
from trainer.audit.verdict import Anomaly


def finite_values(record: RunRecord) -> Finding:
    """Look at every loss, and at every value of every copy at the end."""
    if record.copies is None:
        return not_checked("the run did not reach its end")
    segments = record.layout.segments
    finding = Finding(f"every loss and {len(segments)} variables in {told_copies(len(record.copies))} are finite")
    for anomaly in (_losses(record), _variables(record, record.copies)):
        if anomaly is not None:
            finding.anomalies.append(anomaly)
    if finding.anomalies:
        finding.evidence = "; ".join(anomaly.witness for anomaly in finding.anomalies)
    return finding


def _losses(record: RunRecord) -> Anomaly | None:
    wrong = np.array([~np.isfinite(replica.losses[: replica.steps_done]) for replica in record.replicas])
    if not wrong.any():
        return None
    step = int(np.argmax(wrong.any(axis=0)))
    own = int(np.argmax(wrong[:, step]))
    witness = f"replica {own}'s loss at step {step} is {record.replicas[own].losses[step]:g}"
    return Anomaly("nonfinite_loss", int(wrong.sum()), wrong.size, "losses", witness, remedy=REMEDY)


def _variables(record: RunRecord, copies: Floats) -> Anomaly | None:
    """Values that are not finite; canaries are looked at elsewhere."""
    counts = [int((~np.isfinite(copies[:, segment.span])).sum()) for segment in record.layout.segments]
    if not any(counts):
        return None
    worst = int(np.flatnonzero(counts)[0])
    segment = record.layout.segments[worst]
    witness = f"{counts[worst]:,} of {segment.size * len(copies):,} values of {segment.name} are not finite at the end"
    total = sum(segment.size for segment in record.layout.segments) * len(copies)
    return Anomaly("nonfinite_variable", sum(counts), total, "shared variables", witness, remedy=REMEDY)


REMEDY = "train.on_nonfinite=stop says whose gradient was the first; train.on_nonfinite=skip goes on without it"


def scaled(record: RunRecord) -> bool:
    """Whether there is a loss scale, and not only updates that are skipped."""
    return any(bool(replica.loss_scale[: replica.steps_done, 0].any()) for replica in record.replicas)


def skipped(overflows: Sequence[Floats], *, joint: bool) -> NDArray[np.int64]:
    """Updates that were skipped at each step, by each replica's column of overflows: int64 [steps]."""
    wrong = np.stack(overflows) > 0
    return np.asarray(wrong.any(axis=0) if joint else wrong.sum(axis=0), np.int64)


def updates_skipped(record: RunRecord) -> int | None:
    """Updates that were skipped; None where none of the steps was looked at."""
    steps = min(replica.computed.total() for replica in record.replicas)
    if not steps:
        return None
    return int(skipped([replica.loss_scale[:steps, 1] for replica in record.replicas], joint=record.joint).sum())

"""How far the copies of the shared variables have drifted apart. NumPy only."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from trainer.audit.records import Floats, RunRecord
from trainer.state.layout import Layout

ALL = ("weight", "statistic", "loss_scale", "slot", "counter")


def transacted(record: RunRecord) -> tuple[str, ...]:
    """The kinds of shared variables that the update mode answers for."""
    return tuple(kind for kind in ALL if kind not in record.layout.apart)


def divergence(record: RunRecord, kinds: Sequence[str] = ALL) -> float | None:
    """Largest absolute difference between any copy's value and copy 0's; None before the end of the run."""
    return None if record.copies is None else largest_difference(record.layout, record.copies, kinds)


def largest_difference(layout: Layout, copies: Floats, kinds: Sequence[str] = ALL) -> float:
    """Largest absolute difference between any copy's value and copy 0's: float32 [copies, layout.size]."""
    values = np.stack([layout.values_of(copy, kinds=kinds) for copy in copies])
    # Two infinities, or two not-a-numbers, are the same value and yet have no difference.
    same = values.view(np.uint32) == values[0].view(np.uint32)
    with np.errstate(invalid="ignore"):
        return float(np.where(same, 0.0, np.abs(values - values[0])).max())


def kept(record: RunRecord) -> Floats:
    """Per replica, how many of its updates every copy of every variable kept that the update mode answers for.

    Where updates were multiplied, none counts as kept. float32 [num_replicas].
    """
    assert record.copies is not None
    counts = record.copies[:, record.layout.canaries[record.layout.transacted]]
    found: Floats = np.where(counts.max(axis=(0, 1, 2)) <= record.steps, counts.min(axis=(0, 1, 2)), np.float32(0))
    return found


def outcome(record: RunRecord) -> str:
    """SHA-256 of all copies' values end to end: two runs with the same outcome ended in the same bits."""
    if record.ended_in is not None:
        return hashlib.sha256(record.ended_in).hexdigest()
    return hashlib.sha256("".join(digests(record)).encode()).hexdigest()


def digests(record: RunRecord, kinds: Sequence[str] = ALL) -> list[str]:
    """SHA-256 of every copy's values, optimizer slots included: equal digests are equal bits."""
    assert record.copies is not None
    return [
        hashlib.sha256(record.layout.values_of(copy, kinds=kinds).astype("<f4").tobytes()).hexdigest()
        for copy in record.copies
    ]


def final_digest(record: RunRecord) -> str | None:
    """`final_parameters_sha256`: the digest of weights and statistics; None when copies differ, or before the end."""
    if record.copies is None:
        return None
    found = {record.layout.digest(copy) for copy in record.copies}
    return found.pop() if len(found) == 1 else None

"""Scalars of what the state holders keep for each replica: precision, loss scale and gradients."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.audit import nonfinite
from trainer.audit.records import DTYPES, ReplicaRecord, RunRecord

# By code. No mode is on at 0, and no dtype could be told.
BITS = np.array([int(size[0]) if (size := re.search(r"\d+$", dtype)) else 0 for dtype in DTYPES])


class StateScalars:
    """One run's scalars, from its first rows to its last; some of them count from the beginning.

    Thread-safety: none; one thread asks. Replicas may write their records meanwhile: only rows asked for are read.
    """

    def __init__(self) -> None:
        self._overflows = 0
        self._skipped = 0
        self._mixed = 0

    def of(self, record: RunRecord, rows: slice) -> dict[str, float]:
        """The scalars of some rows, which are complete and follow the ones asked for before."""
        values: dict[str, float] = {}
        for replica in record.replicas:
            values |= _bits(replica, rows)
        off = [_off(replica, rows) for replica in record.replicas]
        if any(known for _, known in off):
            values["precision/replicas_off"] = sum(found for found, _ in off)
        if record.layout.loss_scale is not None:
            values |= self._loss_scale(record, rows)
        return values | self._gradients(record, rows)

    def _loss_scale(self, record: RunRecord, rows: slice) -> dict[str, float]:
        used = {replica.replica_id: replica.loss_scale[rows] for replica in record.replicas}
        self._skipped += int(nonfinite.skipped([own[:, 1] for own in used.values()], joint=record.joint).sum())
        if not nonfinite.scaled(record):
            return {"updates/skipped": self._skipped}
        self._overflows += sum(int(np.count_nonzero(own[:, 1])) for own in used.values())
        # The last, not a mean: a scale is a power of two.
        values = {f"precision/loss_scale/replica_{replica}": float(own[-1, 0]) for replica, own in used.items()}
        return {**values, "precision/overflows": self._overflows, "updates/skipped": self._skipped}

    def _gradients(self, record: RunRecord, rows: slice) -> dict[str, float]:
        columns = [replica.column("mixed")[rows] for replica in record.replicas]
        self._mixed += sum(int(np.count_nonzero(column == 1)) for column in columns)
        return {"gradients/mixed": self._mixed} if any((column >= 0).any() for column in columns) else {}


def _off(replica: ReplicaRecord, rows: slice) -> tuple[bool, bool]:
    """Whether any of the rows was computed in another dtype than asked for, and whether any tells a dtype."""
    asked, found = replica.column("asked")[rows], np.stack([replica.computed_in[rows], replica.gradients_in[rows]])
    told = (found > 0) & (asked > 0)
    return bool((told & (found != asked)).any()), bool(told.any())


def _bits(replica: ReplicaRecord, rows: slice) -> dict[str, float]:
    """Mean bits of the rows where they are known."""
    asked, entry, left = (replica.column(name)[rows] for name in ("asked", "entry", "exit"))
    computed, gradients = replica.computed_in[rows], replica.gradients_in[rows]
    known: dict[str, NDArray[np.integer[Any]]] = {
        "asked_bits": asked[asked > 0],
        "computed_bits": computed[computed > 0],
        "gradient_bits": gradients[gradients > 0],
        "mode_at_entry": entry[entry >= 0],
        "mode_at_exit": left[left >= 0],
    }
    return {
        f"precision/{name}/replica_{replica.replica_id}": float(BITS[codes].mean())
        for name, codes in known.items()
        if codes.size
    }

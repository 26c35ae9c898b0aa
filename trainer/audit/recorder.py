"""From the row that each step returns to a `ReplicaRecord`.

A row is what `Training.step` returns for the audit: loss, a probe of the logits, the canaries of the snapshot. Rows are
kept raw while a replica runs and read off in blocks, so that a step pays for one small copy.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trainer.audit.precision import compute_dtypes
from trainer.audit.records import FRACTURED, TORN_TENSOR, WHOLE, Floats, ReplicaRecord

BLOCK = 256


class Recorder:
    """Writes one replica's record.

    Thread-safety: one thread, the replica's.
    """

    def __init__(self, record: ReplicaRecord, num_replicas: int, probe_size: int) -> None:
        self.record = record
        self._num_replicas = num_replicas
        self._probe = slice(1, 1 + probe_size)
        self._rows: list[Floats] = []
        self._counts: list[tuple[int, int]] = []

    def note(self, row: Floats, read_version: int, staleness: int) -> None:
        """Keep one step's row: float32 [1], or [1 + probe + canaries]."""
        step = self.record.steps_done
        self.record.losses[step] = row[0]
        self._rows.append(row)
        self._counts.append((read_version, staleness))
        # Last: whoever sees the count must find the loss in place.
        self.record.steps_done = step + 1
        if len(self._rows) == BLOCK:
            self.flush()

    def flush(self) -> None:
        """Read off what was kept raw."""
        if self._rows:
            rows, counts = np.stack(self._rows), np.asarray(self._counts, np.int64)
            self._rows, self._counts = [], []
            self._read_off(self.record.steps_done - len(rows), rows, counts)

    def extend(self, rows: Floats, counts: NDArray[np.int64]) -> None:
        """Take many steps at once: float32 [steps, row], and int64 [steps, 2]: read version and staleness."""
        first = self.record.steps_done
        self.record.losses[first : first + len(rows)] = rows[:, 0]
        self.record.steps_done = first + len(rows)
        self._read_off(first, rows, counts)

    def _read_off(self, first: int, rows: Floats, counts: NDArray[np.int64]) -> None:
        if rows.shape[1] == 1:
            return  # audit=none
        record, steps = self.record, slice(first, first + len(rows))
        record.read_version[steps], record.staleness[steps] = counts.T
        canaries = rows[:, self._probe.stop :].reshape(len(rows), -1, 2, self._num_replicas)
        record.versions[steps] = canaries.min(axis=(1, 2))
        torn = (canaries[:, :, 0] != canaries[:, :, 1]).any(axis=(1, 2))
        mixed = (canaries != canaries[:, :1, :1]).any(axis=(1, 2, 3))
        record.read_state[steps] = np.where(torn, TORN_TENSOR, np.where(mixed, FRACTURED, WHOLE))
        if record.torn_witness is None and mixed.any():
            at = int(np.argmax(mixed))
            record.torn_witness = (first + at, canaries[at].copy())
        # Last: its total says how many rows have been read off.
        record.computed.update(compute_dtypes(rows[:, self._probe]))

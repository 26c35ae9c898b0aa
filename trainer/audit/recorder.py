"""From the row that each step returns, and what its thread noted beside it, to a `ReplicaRecord`.

Rows (`trainer/audit/row.py`) are kept raw while a replica runs and read off in blocks, so that a step pays for one
small copy.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trainer.audit.precision import compute_dtypes, gradient_codes
from trainer.audit.records import DTYPES, FRACTURED, TORN_TENSOR, WHOLE, Floats, Noted, ReplicaRecord
from trainer.audit.row import Row
from trainer.state.layout import Layout

BLOCK = 256


class Recorder:
    """Writes one replica's record.

    Thread-safety: one thread, the replica's.
    """

    def __init__(self, record: ReplicaRecord, row: Row, layout: Layout) -> None:
        self.record = record
        self._row = row
        self._num_replicas = layout.num_replicas
        # What replicas write by themselves is of other versions than what the update mode writes.
        self._transacted = layout.transacted[: len(layout.read_segments)]
        self._rows: Floats = np.empty((0, 0), np.float32)
        self._noted: list[Noted] = []

    def note(self, row: Floats, noted: Noted) -> None:
        """Keep a copy of one step's row, and what its thread noted."""
        record = self.record
        step = record.steps_done
        record.losses[step] = row[0]
        if len(row) > 1:  # else audit=none
            kept = len(self._noted)
            if not len(self._rows):
                self._rows = np.empty((BLOCK, len(row)), np.float32)
            self._rows[kept] = row
            self._noted.append(noted)
        # Last: whoever sees the count must find the loss in place.
        record.steps_done = step + 1
        if len(self._noted) == BLOCK:
            self.flush()

    def flush(self) -> None:
        """Read off what was kept raw."""
        if self._noted:
            rows, noted = self._rows[: len(self._noted)], np.asarray(self._noted, np.int64)
            self._noted = []
            self._read_off(self.record.steps_done - len(rows), rows, noted)

    def extend(self, rows: Floats, noted: NDArray[np.int64]) -> None:
        """Take many steps at once: float32 [steps, row], and int64 [steps, len(Noted)]."""
        first = self.record.steps_done
        self.record.losses[first : first + len(rows)] = rows[:, 0]
        self.record.steps_done = first + len(rows)
        self._read_off(first, rows, noted)

    def _read_off(self, first: int, rows: Floats, noted: NDArray[np.int64]) -> None:
        if rows.shape[1] == 1:
            return  # audit=none
        record, row, steps = self.record, self._row, slice(first, first + len(rows))
        record.noted[steps] = noted
        record.read_version[steps], record.staleness[steps] = noted[:, :2].T
        self._read_canaries(steps, rows[:, row.canaries].reshape(len(rows), -1, 2, self._num_replicas))
        record.first_samples[steps] = rows[:, row.sample]
        record.random_words[steps] = rows[:, row.random]
        record.loss_scale[steps] = rows[:, row.loss_scale]
        asked = noted[:, Noted._fields.index("asked")]
        record.gradients_in[steps] = gradient_codes(rows[:, row.gradients], rows[:, row.loss_scale.start], asked)
        computed = compute_dtypes(rows[:, row.logits], asked)
        record.computed_in[steps] = computed
        # Last: its total says how many rows have been read off.
        found, counts = np.unique(computed, return_counts=True)
        record.computed.update({DTYPES[code]: int(count) for code, count in zip(found, counts, strict=True)})

    def _read_canaries(self, steps: slice, canaries: Floats) -> None:
        """canaries: float32 [steps, read segments, 2, replicas]."""
        record = self.record
        canaries = canaries[:, self._transacted]
        record.versions[steps] = canaries.min(axis=(1, 2))
        torn = (canaries[:, :, 0] != canaries[:, :, 1]).any(axis=(1, 2))
        mixed = (canaries != canaries[:, :1, :1]).any(axis=(1, 2, 3))
        record.read_state[steps] = np.where(torn, TORN_TENSOR, np.where(mixed, FRACTURED, WHOLE))
        if record.torn_witness is None and mixed.any():
            at = int(np.argmax(mixed))
            record.torn_witness = (steps.start + at, canaries[at].copy())

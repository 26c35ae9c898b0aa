"""The history that `audit=full` leaves: `history.npz`, who read and wrote which version, and in what state.

Arrays, all with a row a replica, dtypes and modes as places in `trainer.audit.records.DTYPES`:
    losses: float32 [replicas, steps].
    read_version: int64 [replicas, steps], updates that all replicas had committed when the snapshot was taken.
    write_version: int64 [replicas, steps], the same when the update was committed.
    read_state: uint8 [replicas, steps], 0 whole, 1 fractured between variables, 2 torn inside one.
    versions: float32 [replicas, steps, replicas], updates of each replica that the snapshot shows.
    batch: int64 [replicas, steps], the number of the batch that the cursor gave; -1 where there is no plan.
    asked, computed_in, gradients_in: uint8 [replicas, steps], the compute dtype asked for, that read off the
        activations and that read off the last kernel's gradient.
    mode_at_entry, mode_at_exit: uint8 [replicas, steps], the precision mode before and after the step, 0 for none.
    loss_scale: float32 [replicas, steps, 2], the loss scale used, and 1 where the gradients overflowed.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer.audit.records import Noted, RunRecord
from trainer.whole_file import whole

FILE_NAME = "history.npz"


def save(record: RunRecord, folder: Path) -> Path:
    """Write `history.npz`, of the steps that every replica completed, so that a reader sees all of it or none."""
    replicas, steps = record.replicas, slice(0, record.steps_done)
    read = np.stack([replica.read_version[steps] for replica in replicas])
    path = folder / FILE_NAME
    with whole(path) as partial, partial.open("wb") as stream:
        np.savez_compressed(
            stream,
            losses=np.stack([replica.losses[steps] for replica in replicas]),
            read_version=read,
            write_version=read + np.stack([replica.staleness[steps] for replica in replicas]),
            read_state=np.stack([replica.read_state[steps] for replica in replicas]),
            versions=np.stack([replica.versions[steps] for replica in replicas]),
            batch=_column(record, "batch", np.int64),
            asked=_column(record, "asked", np.uint8),
            computed_in=np.stack([replica.computed_in[steps] for replica in replicas]),
            gradients_in=np.stack([replica.gradients_in[steps] for replica in replicas]),
            mode_at_entry=_column(record, "entry", np.uint8),
            mode_at_exit=_column(record, "exit", np.uint8),
            loss_scale=np.stack([replica.loss_scale[steps] for replica in replicas]),
        )
    return path


def _column(record: RunRecord, name: str, dtype: type[np.integer]) -> NDArray[np.integer]:
    """One of `Noted`'s fields, of the steps that every replica completed."""
    at = Noted._fields.index(name)
    return np.stack([replica.noted[: record.steps_done, at] for replica in record.replicas]).astype(dtype)

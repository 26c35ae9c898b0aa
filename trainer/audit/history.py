"""The history that `audit=full` leaves: `history.npz`, who read and wrote which version, step by step.

Arrays, all with a row a replica:
    losses: float32 [replicas, steps].
    read_version: int64 [replicas, steps], updates that all replicas had committed when the snapshot was taken.
    write_version: int64 [replicas, steps], the same when the update was committed.
    read_state: uint8 [replicas, steps], 0 whole, 1 fractured between variables, 2 torn inside one.
    versions: float32 [replicas, steps, replicas], updates of each replica that the snapshot shows.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from trainer.audit.records import RunRecord

FILE_NAME = "history.npz"


def save(record: RunRecord, folder: Path) -> Path:
    """Write `history.npz`, of the steps that every replica completed, so that a reader sees all of it or none."""
    replicas, steps = record.replicas, slice(0, record.steps_done)
    read = np.stack([replica.read_version[steps] for replica in replicas])
    path, partial = folder / FILE_NAME, folder / f".{FILE_NAME}"
    with partial.open("wb") as stream:
        np.savez_compressed(
            stream,
            losses=np.stack([replica.losses[steps] for replica in replicas]),
            read_version=read,
            write_version=read + np.stack([replica.staleness[steps] for replica in replicas]),
            read_state=np.stack([replica.read_state[steps] for replica in replicas]),
            versions=np.stack([replica.versions[steps] for replica in replicas]),
        )
    partial.replace(path)
    return path

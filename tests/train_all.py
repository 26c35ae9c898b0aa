"""Train every model in one process of one strategy and size, for `test_parity.py` to compare.

    KERAS_BACKEND=torch python tests/train_all.py threads NUM_REPLICAS BATCH_SIZE OUTPUT.npz

writes, for each case, losses float32 [replicas, steps] and the digests of two runs.
"""

from __future__ import annotations

import importlib
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np

from trainer.audit.copies import final_digest
from trainer.audit.records import ReplicaRecord, RunRecord
from trainer.config import OPTIONS, Cnn, Config, Mlp, Precision, Strategy, Train, Transformer
from trainer.rules import validate

STEPS = 20
CASES = {
    "linear": ({"model": OPTIONS["model"]["linear"]}, "sgd"),
    "mlp": ({"model": Mlp()}, "adam"),
    "mlp_dropout": ({"model": Mlp(dropout=0.3)}, "sgd"),
    "cnn_none": ({"model": Cnn(normalization="none")}, "sgd"),
    "cnn_group": ({"model": Cnn(normalization="group")}, "adam"),
    "cnn_batch": ({"model": Cnn(normalization="batch")}, "momentum"),
    "transformer": ({"model": Transformer()}, "adam"),
    "cnn_sync_batch": ({"model": Cnn(normalization="sync_batch")}, "momentum"),
}


class Nobody:
    """Watches nothing."""

    def progress(self, record: RunRecord) -> None: ...

    def kept(self, step: int, kept: float, made: int, apart: float | None = None) -> None: ...

    def evaluated(self, evaluation: object) -> None: ...


def main(strategy_name: str, num_replicas: int, batch_size: int, output: str) -> None:
    strategy = importlib.import_module(f"trainer.strategies.{strategy_name}")
    strategy.prepare(num_replicas, 1)
    from trainer.workloads.train import Training

    found = {}
    for name, (options, optimizer) in CASES.items():
        if name == "cnn_sync_batch" and strategy_name != "mirrored":
            continue
        config = Config(
            strategy=Strategy(strategy_name),
            num_replicas=num_replicas,
            optimizer=OPTIONS["optimizer"][optimizer],
            precision=Precision("float32"),
            train=Train(steps=STEPS, batch_size=batch_size),
            **options,
        )
        validate(config)
        digests = []
        for _ in range(2):
            training = Training(config)
            replicas = [ReplicaRecord.empty(own, STEPS, num_replicas) for own in range(num_replicas)]
            record = RunRecord(training.layout, STEPS, replicas)
            strategy.train(config, training, record, Nobody(), threading.Event())
            digests.append(final_digest(record))
        found[name] = np.stack([replica.losses for replica in record.replicas])
        found[f"{name}.digests"] = np.array(digests)
        found[f"{name}.engine"] = np.array(record.engine)
    np.savez(output, **found)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])

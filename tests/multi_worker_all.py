"""One worker of `strategy=multi_worker` that trains case after case, for `test_multi_worker.py` to compare.

    KERAS_BACKEND=tensorflow RANK=0 WORLD_SIZE=2 TF_CONFIG=... python tests/multi_worker_all.py OUTPUT.npz
    KERAS_BACKEND=tensorflow python tests/multi_worker_all.py OUTPUT.npz mirrored

The first worker writes losses, digests and what the judge has to say. The second form trains the same as four replicas
of one process.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
from train_all import Nobody

from trainer.audit.copies import digests, final_digest
from trainer.audit.judge import judge
from trainer.audit.records import ReplicaRecord, RunRecord
from trainer.config import OPTIONS, Audit, Cnn, Config, MixedFloat16, Mlp, Processes, Strategy, Train, UpdateMode
from trainer.rules import validate
from trainer.state.settings import ASKED_BY, snapshot

STEPS = 12
OPTIMIZERS = OPTIONS["optimizer"]
# Large enough for gradients in float16 to overflow at first: replicas of all workers have to agree on each update.
OVERFLOWS = MixedFloat16(initial_scale=2.0**20, growth_steps=3)
PARITY: dict[str, dict[str, Any]] = {
    "mlp": {"model": Mlp(hidden=[16]), "optimizer": OPTIMIZERS["momentum"]},
    "cnn_group": {"model": Cnn(filters=[4], normalization="group"), "optimizer": OPTIMIZERS["adam"]},
    "cnn_batch": {"model": Cnn(filters=[4]), "optimizer": OPTIMIZERS["sgd"]},
    "cnn_sync_batch": {"model": Cnn(filters=[4], normalization="sync_batch"), "optimizer": OPTIMIZERS["sgd"]},
    "float16": {"model": Mlp(hidden=[16]), "optimizer": OPTIMIZERS["sgd"], "precision": OVERFLOWS},
    "unreduced": {"model": Mlp(hidden=[16]), "update_mode": UpdateMode("unreduced")},
    "reassigned_sum": {"model": Mlp(hidden=[16]), "update_mode": UpdateMode("reassigned_sum")},
    "unscaled_sum": {"model": Mlp(hidden=[16]), "update_mode": UpdateMode("unscaled_sum")},
}
OTHERS: dict[str, dict[str, Any]] = {
    "again": PARITY["mlp"],
    "eager": PARITY["mlp"] | {"train": Train(steps=STEPS, batch_size=8, capture="never")},
}
ALTERED_AFTER = 7


def main(output: str, strategy_name: str = "multi_worker") -> None:
    strategy = importlib.import_module(f"trainer.strategies.{strategy_name}")
    mirrored = strategy_name == "mirrored"
    strategy.prepare(4 if mirrored else 2, 1)
    cases = PARITY if mirrored else PARITY | OTHERS | {"altered": {"model": Mlp(hidden=[16])}}
    found: dict[str, Any] = {}
    for name, options in cases.items():
        config = _config(mirrored=mirrored, **options)
        if name == "altered":
            strategy.MultiWorker = _altered(strategy.MultiWorker)
        record = _train(strategy, config)
        found |= _kept(name, record)
        found[f"{name}.verdict"] = np.array(json.loads(judge(config, record, None, {}).to_json()), dtype=object)
    if os.environ.get("RANK", "0") == "0":
        np.savez(output, **found)


def _altered(whole: Any) -> Any:
    class Altered(whole):  # type: ignore[misc]
        """Unsafe: one value of the last replica's copy is changed behind everybody's back."""

        def _next_stop(self, first: int, last: int) -> int:
            found: int = super()._next_stop(first, last)
            return min(found, ALTERED_AFTER) if first < ALTERED_AFTER else found

        def _report(self, step: int) -> None:
            if step == ALTERED_AFTER and 3 in self.own_ids:
                copy = self.strategy.experimental_local_results(self.flat)[self.at(3)].numpy()
                copy[self.layout.segments[0].values] += 2.0**-20
                self.put_in_copy(self.flat, 3, copy)
            super()._report(step)

    return Altered


def _config(*, mirrored: bool, **options: Any) -> Config:
    own = {
        "strategy": Strategy("mirrored") if mirrored else Processes("multi_worker", num_processes=2),
        "num_replicas": 4 if mirrored else 2,
        "train": Train(steps=STEPS, batch_size=8),
        "audit": Audit("full", trace_steps=0, reference_every=4, digest_every=1),
    }
    config = Config(**(own | options))
    validate(config)
    return config


def _train(strategy: Any, config: Config) -> RunRecord:
    from trainer.workloads.train import Training

    training = Training(config)
    replicas = [ReplicaRecord.empty(own, STEPS, 4) for own in range(4)]
    record = RunRecord(training.layout, STEPS, replicas, batch_size=config.train.batch_size, initial=training.initial)
    record.settings_asked = {**_settings(), **ASKED_BY[config.strategy.name]}
    strategy.train(config, training, record, Nobody(), threading.Event())
    return record


@functools.cache
def _settings() -> dict[str, str]:
    """Those that the process begins with, as a run's own does: TensorFlow is left otherwise by each run."""
    return snapshot()


def _kept(name: str, record: RunRecord) -> dict[str, Any]:
    return {
        name: np.stack([replica.losses for replica in record.replicas]),
        f"{name}.scales": np.stack([replica.loss_scale for replica in record.replicas]),
        f"{name}.digest": np.array(str(final_digest(record))),
        f"{name}.digests": np.array(digests(record)),
    }


if __name__ == "__main__":
    main(*sys.argv[1:])

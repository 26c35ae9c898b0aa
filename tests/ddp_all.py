"""One process of `strategy=ddp` that trains case after case, for `test_ddp.py` to compare.

    RANK=0 WORLD_SIZE=2 TRAINER_MEETING=FILE KERAS_BACKEND=torch python tests/ddp_all.py OUTPUT.npz

The first process trains the same under `strategy=threads`, with as many replicas in one process, and writes losses,
digests and what the judge has to say.
"""

from __future__ import annotations

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
from trainer.config import OPTIONS, Audit, Cnn, Config, LocalSteps, MixedFloat16, Mlp, Processes, Strategy, Train
from trainer.rules import validate
from trainer.strategies import ddp, threads
from trainer.updates.between_processes import AllReduceOfProcesses
from trainer.updates.between_processes import LocalSteps as LocalStepsMode
from trainer.updates.shared_vector import SharedVector
from trainer.workloads.train import Training

STEPS = 12
OPTIMIZERS = OPTIONS["optimizer"]
# Large enough for gradients in float16 to overflow at first: replicas of all processes have to agree on each update.
OVERFLOWS = MixedFloat16(initial_scale=2.0**20, growth_steps=3)
PARITY: dict[str, dict[str, Any]] = {
    "mlp": {"model": Mlp(hidden=[16]), "optimizer": OPTIMIZERS["momentum"]},
    "cnn_group": {"model": Cnn(filters=[4], normalization="group"), "optimizer": OPTIMIZERS["adam"]},
    "cnn_batch": {"model": Cnn(filters=[4]), "optimizer": OPTIMIZERS["sgd"]},
    "float16": {"model": Mlp(hidden=[16]), "optimizer": OPTIMIZERS["sgd"], "precision": OVERFLOWS},
}
SMALL = OPTIONS["model"]["linear"]
LOCAL = {"model": SMALL, "update_mode": LocalSteps(average_every=5), "optimizer": OPTIMIZERS["adam"]}
EVERY_STEP = Audit("full", trace_steps=0, reference_every=4, digest_every=1)
OTHERS: dict[str, dict[str, Any]] = {
    "again": PARITY["mlp"],
    "sgd": {"model": SMALL},
    "adam": {"model": SMALL, "optimizer": OPTIMIZERS["adam"]},
    "local_1": {"model": SMALL, "update_mode": LocalSteps(average_every=1)},
    "local_1_adam": {"model": SMALL, "update_mode": LocalSteps(average_every=1), "optimizer": OPTIMIZERS["adam"]},
    "local_5": LOCAL,
    "local_5_again": LOCAL,
}
DEFECT_STEP = 7


class Altered(AllReduceOfProcesses):
    """Unsafe: one value of process 1's copy is changed behind everybody's back."""

    def _exchange(self) -> None:
        if self._steps == DEFECT_STEP and os.environ["RANK"] == "1":
            self.shared.plain[self.shared.layout.segments[0].values] += 2.0**-20
        super()._exchange()


class AveragedCounts(LocalStepsMode):
    """Unsafe: canaries are averaged like values, as they would be if they were weights."""

    def __init__(self, shared: SharedVector, *given: Any) -> None:
        super().__init__(shared, *given)
        self._share.fill_(0.5)


def main(output: str) -> None:
    threads.prepare(2, 1)
    first = os.environ["RANK"] == "0"
    found: dict[str, Any] = {}
    for name, options in (PARITY | OTHERS).items():
        record = _train(_config(**options))
        if first:
            found |= _kept(name, record)
            found[f"{name}.verdict"] = _judged(_config(**options), record)
    for name, defect, options in (
        ("altered", Altered, {"model": SMALL}),
        ("averaged_counts", AveragedCounts, LOCAL),
    ):
        whole = (ddp.AllReduceOfProcesses, ddp.between_processes.LocalSteps)
        if defect is Altered:
            ddp.AllReduceOfProcesses = Altered
        else:
            ddp.between_processes.LocalSteps = AveragedCounts
        record = _train(_config(**options))
        ddp.AllReduceOfProcesses, ddp.between_processes.LocalSteps = whole
        if first:
            found[f"{name}.verdict"] = _judged(_config(**options), record)
    if first:
        for name, options in PARITY.items():
            config = _config(**options)
            config.strategy, config.num_replicas = Strategy("threads"), config.replicas_in_all
            found |= _kept(f"{name}.threads", _train(config))
        np.savez(output, **found)
    # Nobody goes before all have what they need of the others.
    ddp.group(_config()).meet()


def _config(**options: Any) -> Config:
    config = Config(
        **{
            "strategy": Processes(num_processes=2),
            "num_replicas": 2,
            "train": Train(steps=STEPS, batch_size=8),
            "audit": EVERY_STEP,
            **options,
        }
    )
    validate(config)
    return config


def _train(config: Config) -> RunRecord:
    training = Training(config)
    everyone = range(config.replicas_in_all)
    replicas = [ReplicaRecord.empty(own, STEPS, config.replicas_in_all) for own in everyone]
    record = RunRecord(training.layout, STEPS, replicas, batch_size=config.train.batch_size, initial=training.initial)
    strategy = threads if config.strategy.name == "threads" else ddp
    strategy.train(config, training, record, Nobody(), threading.Event())
    return record


def _kept(name: str, record: RunRecord) -> dict[str, Any]:
    return {
        name: np.stack([replica.losses for replica in record.replicas]),
        f"{name}.scales": np.stack([replica.loss_scale for replica in record.replicas]),
        f"{name}.digest": np.array(str(final_digest(record))),
        f"{name}.digests": np.array(digests(record)),
        f"{name}.averages": np.array([average.step for average in record.averages]),
    }


def _judged(config: Config, record: RunRecord) -> Any:
    return np.array(json.loads(judge(config, record, None, {}).to_json()), dtype=object)


if __name__ == "__main__":
    main(sys.argv[1])

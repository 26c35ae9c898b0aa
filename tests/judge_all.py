"""Train and judge every update mode of one strategy in one process, for `test_modes.py`.

    KERAS_BACKEND=torch python tests/judge_all.py threads NUM_REPLICAS STEPS MODEL OPTIMIZER,... OUTPUT.json

writes, by mode and optimizer, the verdict and each guarantee's status, the anomalies' kinds, and the metrics.
"""

from __future__ import annotations

import importlib
import json
import sys
import threading
from pathlib import Path

from train_all import Nobody

from trainer.audit import copies
from trainer.audit.judge import judge
from trainer.audit.records import ReplicaRecord, RunRecord
from trainer.config import OPTIONS, Audit, Cnn, Config, Linear, Strategy, Train, UpdateMode
from trainer.rules import validate
from trainer.updates.mechanisms import MODES

# Batch normalization, so that there are statistics among the shared variables.
MODELS = {"cnn": Cnn(filters=[4], normalization="batch"), "linear": Linear()}


def main(strategy_name: str, num_replicas: int, steps: int, model: str, rules: str, output: str) -> None:
    strategy = importlib.import_module(f"trainer.strategies.{strategy_name}")
    strategy.prepare(num_replicas, 1)
    from trainer.workloads.train import Training

    found = {}
    for mode in (name for name, row in MODES.items() if strategy_name in row.strategies and name != "custom"):
        for rule in rules.split(","):
            config = Config(
                strategy=Strategy(strategy_name),
                update_mode=UpdateMode(mode),
                num_replicas=num_replicas,
                model=MODELS[model],
                optimizer=OPTIONS["optimizer"][rule],
                audit=Audit("full", reference_every=3),
                train=Train(steps=steps, batch_size=4),
            )
            validate(config)
            training = Training(config)
            replicas = [ReplicaRecord.empty(own, steps, num_replicas) for own in range(num_replicas)]
            record = RunRecord(training.layout, steps, replicas, initial=training.initial)
            strategy.train(config, training, record, Nobody(), threading.Event())
            verdict = judge(config, record, None, {}, [copies.outcome(record)])
            found[f"{mode} {rule}"] = {
                "verdict": verdict.verdict,
                "statuses": {each.name: each.status for each in verdict.guarantees},
                "anomalies": {each.kind: [each.count, each.of] for each in verdict.anomalies},
                "metrics": verdict.metrics,
            }
    Path(output).write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])

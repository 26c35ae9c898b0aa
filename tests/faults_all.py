"""Trains with faults, every case in one process of one strategy, for `test_faults.py`.

    KERAS_BACKEND=torch python tests/faults_all.py threads CASES.json OUTPUT.json

CASES.json: name -> `mode`, `faults`, and any of `on_nonfinite`, `optimizer`, `precision`, `steps`, `capture` and
`target`. Writes, by name, what broke the run and how many seconds after a fault struck, or what it ended in.
"""

from __future__ import annotations

import importlib
import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from train_all import Nobody

from trainer import faults
from trainer.audit import copies
from trainer.audit.judge import judge
from trainer.config import OPTIONS, Audit, Config, Custom, Linear, Strategy, Train, UpdateMode
from trainer.one_run import empty_record
from trainer.rules import validate
from trainer.strategies.hosting import RunBroken
from trainer.updates.transactions import Compute, Locked

REPLICAS = 3
struck_at = 0.0


class KeepsItsLock(Locked):
    """A user's mode that does not give its lock back when a gradient cannot be computed, and leaves others waiting."""

    def __init__(self, shared: Any, replicas: Any) -> None:
        super().__init__(shared, replicas)
        self.met = threading.Barrier(len(replicas))

    def step(self, replica: Any, compute: Compute) -> None:
        self.met.wait()
        self.lock.acquire()
        compute(replica)
        self.shared.add(replica, self.shared.delta(replica, base=self.shared.vector))
        self.lock.release()


def config_of(strategy: str, case: dict[str, Any]) -> Config:
    target = case.get("target", "")
    config = Config(
        strategy=Strategy(strategy),
        update_mode=Custom(_target_=target) if target else UpdateMode(case["mode"]),
        num_replicas=REPLICAS,
        model=Linear(),
        optimizer=OPTIONS["optimizer"][case.get("optimizer", "sgd")],
        precision=OPTIONS["precision"][case.get("precision", "float32")],
        audit=Audit(reference_every=2),
        train=Train(
            steps=case.get("steps", 6),
            batch_size=4,
            on_nonfinite=case.get("on_nonfinite", "continue"),
            capture=case.get("capture", "auto"),
        ),
        faults=case["faults"],
    )
    validate(config)
    return config


def found(strategy: Any, config: Config) -> dict[str, Any]:
    from trainer.workloads.train import Training

    training, record = Training(config), empty_record(config)
    record.layout, record.initial = training.layout, training.initial
    try:
        strategy.train(config, training, record, Nobody(), threading.Event())
    except RunBroken as broken:
        seconds = time.monotonic() - struck_at
        error = {"kind": broken.kind, "message": broken.message, "replica": broken.replica, "step": broken.step}
        return {"error": error, "seconds": seconds, "began": [each.steps_done for each in record.replicas]}
    verdict = judge(config, record, None, {})
    assert record.copies is not None
    values = np.stack([record.layout.values_of(copy) for copy in record.copies])
    return {
        "error": None,
        "digests": [record.layout.digest(copy) for copy in record.copies],
        "finite": [bool(np.isfinite(each).all()) for each in values],
        "kept": int(copies.kept(record).sum()),
        "metrics": verdict.metrics,
        "statuses": {each.name: each.status for each in verdict.guarantees},
        "anomalies": {each.kind: each.witness for each in verdict.anomalies},
    }


def main(strategy_name: str, cases: str, output: str) -> None:
    strategy = importlib.import_module(f"trainer.strategies.{strategy_name}")
    strategy.prepare(REPLICAS, 1)
    strike = faults._strike

    def timed(fault: faults.Fault) -> None:
        global struck_at
        struck_at = time.monotonic()
        strike(fault)

    faults._strike = timed
    every = json.loads(Path(cases).read_text())
    results = {name: found(strategy, config_of(strategy_name, case)) for name, case in every.items()}
    Path(output).write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])

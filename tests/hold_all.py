"""Run many configurations of one strategy in one process and judge each, for `test_state_runs.py`.

    KERAS_BACKEND=torch python tests/hold_all.py threads CASES.json OUTPUT.json

CASES.json: name -> fields of the configuration, groups by the option's name and keys as a list:
`{"precision": ["mixed_bfloat16", {"enabled_in": "replica"}]}`. Writes, by name, the verdict, statuses and anomalies.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
import threading
from pathlib import Path
from typing import Any

from train_all import Nobody

from trainer.audit import copies
from trainer.audit.judge import judge
from trainer.audit.records import ReplicaRecord, RunRecord
from trainer.config import OPTIONS, Config, State, Train
from trainer.rules import validate
from trainer.state.settings import ASKED_BY, snapshot

STEPS = 12


def config_of(strategy: str, fields: dict[str, Any]) -> Config:
    parts: dict[str, Any] = {"strategy": OPTIONS["strategy"][strategy]}
    for name, value in fields.items():
        if name == "state":
            parts[name] = State(**value)
        elif name == "train":
            parts[name] = Train(**{"steps": STEPS, "batch_size": 8, **value})
        elif isinstance(value, list):
            parts[name] = dataclasses.replace(OPTIONS[name][value[0]], **value[1])
        else:
            parts[name] = value
    parts.setdefault("train", Train(steps=STEPS, batch_size=8))
    parts.setdefault("audit", dataclasses.replace(OPTIONS["audit"]["counters"], reference_every=3))
    return Config(**parts)


def main(strategy_name: str, cases: str, output: str) -> None:
    strategy = importlib.import_module(f"trainer.strategies.{strategy_name}")
    strategy.prepare(4, 1)
    from trainer.workloads.train import Training

    found = {}
    for name, fields in json.loads(Path(cases).read_text()).items():
        config = config_of(strategy_name, fields)
        validate(config)
        training = Training(config)
        replicas = [ReplicaRecord.empty(own, STEPS, config.num_replicas) for own in range(config.num_replicas)]
        record = RunRecord(training.layout, STEPS, replicas, initial=training.initial, batch_size=8)
        record.settings_asked = {**snapshot(), **ASKED_BY[strategy_name], **training.settings_of_replicas}
        strategy.train(config, training, record, Nobody(), threading.Event())
        verdict = judge(config, record, None, {}, [copies.outcome(record)])
        found[name] = {
            "verdict": verdict.verdict,
            "engine": record.engine,
            "claimed": [each.name for each in verdict.guarantees if each.claimed],
            "statuses": {each.name: each.status for each in verdict.guarantees},
            "evidence": {each.name: each.evidence for each in verdict.guarantees},
            "anomalies": {each.kind: [each.count, each.of] for each in verdict.anomalies},
            "witnesses": {each.kind: f"{each.where} | {each.witness}" for each in verdict.anomalies},
            "remedies": {each.kind: each.remedy for each in verdict.anomalies},
            "digest": training.layout.digest(record.copies[0]) if record.copies is not None else None,
            "losses": [replica.losses.tolist() for replica in record.replicas],
        }
    Path(output).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:4])

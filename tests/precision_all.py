"""Run many cases of `workload=precision` in one process, each in every order or freely, and judge each.

    KERAS_BACKEND=tensorflow python tests/precision_all.py mirrored CASES.json OUTPUT.json

CASES.json: name -> `program`, `state` (mechanisms by key) and any of `num_replicas`, `steps`, `dtypes`, `schedule`,
`token` and `watchdog_seconds`. Writes, by name, what was found. `test_precision_workload.py` runs those of plain
threads in its own process.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import logging
import sys
import threading
from pathlib import Path
from typing import Any

from train_all import Nobody

from trainer.audit.judge import judge
from trainer.audit.records import ReplicaRecord, RunRecord
from trainer.audit.verdict import Error
from trainer.config import OPTIONS, Config, PrecisionMode, State, Train, Watchdog
from trainer.one_run import explorer_of
from trainer.rules import validate
from trainer.state.layout import EMPTY
from trainer.strategies.hosting import RunBroken

Facts = dict[str, Any]
MOST_REPLICAS = 4  # of a mirrored case


def config_of(
    strategy: str,
    *,
    program: str,
    state: dict[str, str] | None = None,
    num_replicas: int = 2,
    steps: int = 1,
    dtypes: list[str] | None = None,
    schedule: str = "free",
    watchdog_seconds: float = 30.0,
    token: str = "",
) -> Config:
    workload = PrecisionMode(program=program, **({} if dtypes is None else {"dtypes": dtypes}))
    train = Train(steps=steps)
    order = dataclasses.replace(OPTIONS["schedule"][schedule], **({"token": token} if token else {}))
    config = Config(
        strategy=OPTIONS["strategy"][strategy],
        num_replicas=num_replicas,
        workload=workload,
        state=State(**(state or {})),
        schedule=order,
        train=train,
        watchdog=Watchdog(watchdog_seconds),
    )
    validate(config)
    return config


def run(strategy: str, **case: Any) -> Facts:
    config = config_of(strategy, **case)
    return _in_orders(config) if config.controlled else _freely(config)


def _in_orders(config: Config) -> Facts:
    explorer = explorer_of(config, threading.Event())
    record = explorer.run()
    explored = explorer.explored
    verdict = judge(config, record, None, {}, (), explored)
    return {
        **_told(verdict),
        "kind": explored.kind,
        "orders": explored.orders,
        # Orders in which each thing is seen.
        "seen": {
            label.partition(" ")[2]: number
            for label, number in explored.counts.items()
            if " " in label and not label.startswith("outcome ")
        },
        "tokens": {label.partition(" ")[2]: each.token for label, each in explored.examples.items()},
        "preemptions": {label.partition(" ")[2]: each.preemptions for label, each in explored.examples.items()},
        "telling": {label.partition(" ")[2]: each.anomaly.witness for label, each in explored.examples.items()},
    }


def _freely(config: Config) -> Facts:
    from trainer.workloads.precision import workload

    steps = config.train.steps
    replicas = [ReplicaRecord.empty(own, 0, config.num_replicas) for own in range(config.num_replicas)]
    record, error = RunRecord(EMPTY, steps, replicas, trains=False), None
    try:
        record.findings = workload.run(config, record, Nobody(), threading.Event())
    except RunBroken as broken:
        error = Error(broken.kind, broken.message, broken.replica, broken.step)
    return _told(judge(config, record, error, {}))


def _told(verdict: Any) -> Facts:
    return {
        "verdict": verdict.verdict,
        "error": None if verdict.error is None else [verdict.error.kind, verdict.error.message],
        "claimed": sorted(each.name for each in verdict.guarantees if each.claimed),
        "statuses": {each.name: each.status for each in verdict.guarantees},
        "evidence": {each.name: each.evidence for each in verdict.guarantees},
        "anomalies": {each.kind: [each.count, each.of] for each in verdict.anomalies},
        "remedies": {each.kind: each.remedy for each in verdict.anomalies},
    }


def main(strategy: str, cases: str, output: str) -> None:
    # It warns that eager replicas are slow.
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    importlib.import_module(f"trainer.strategies.{strategy}").prepare(MOST_REPLICAS, 1)
    found = {name: run(strategy, **case) for name, case in json.loads(Path(cases).read_text()).items()}
    Path(output).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:4])

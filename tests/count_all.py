"""Run `workload=counter` in many configurations of one strategy in one process, for `test_counter_variables.py`.

    python tests/count_all.py STRATEGY NUM_REPLICAS CASES.json OUTPUT.json

CASES.json: name -> overrides, as on the command line; those with a schedule are searched, the others run freely.
Writes, by name, statuses and evidence of the guarantees, anomalies, and what a search counted.
"""

from __future__ import annotations

import importlib
import json
import sys
import threading
from pathlib import Path
from typing import Any

from trainer.audit.guarantees import GUARANTEES
from trainer.audit.judge import judge
from trainer.audit.orders import Explored
from trainer.audit.records import RunRecord
from trainer.audit.verdict import Verdict
from trainer.config import Config
from trainer.one_run import UNWATCHED, empty_record, explorer_of
from trainer.proofs import config_of
from trainer.rules import validate
from trainer.workloads.counter import workload


def told(verdict: Verdict) -> dict[str, Any]:
    return {
        "verdict": verdict.verdict,
        "statuses": {each.name: each.status for each in verdict.guarantees},
        "claimed": [each.name for each in verdict.guarantees if each.claimed],
        "evidence": {each.name: each.evidence for each in verdict.guarantees},
        "anomalies": {each.kind: [each.count, each.of] for each in verdict.anomalies},
        "witnesses": {each.kind: each.witness for each in verdict.anomalies},
        "where": {each.kind: each.where for each in verdict.anomalies},
        "metrics": verdict.metrics,
    }


def searched(config: Config) -> tuple[Explored, dict[str, Any]]:
    """Every order of a configuration."""
    explorer = explorer_of(config, threading.Event())
    record = explorer.run()
    explored = explorer.explored
    found: dict[str, Any] = {"kind": explored.kind, "orders": explored.orders, "outcomes": explored.outcomes}
    found["broken"] = {name: explored.counts[name] for name in GUARANTEES if explored.counts[name]}
    return explored, {**told(judge(config, record, None, {}, (), explored)), **found}


def run(config: Config) -> tuple[RunRecord, dict[str, Any]]:
    """One free run."""
    record = empty_record(config)
    record.findings = workload.run(config, record, UNWATCHED, threading.Event())
    return record, told(judge(config, record, None, {}))


def checked(overrides: tuple[str, ...]) -> Config:
    config = config_of(("workload=counter", *overrides))
    validate(config)
    return config


def main(strategy: str, num_replicas: str, cases: str, output: str) -> None:
    importlib.import_module(f"trainer.strategies.{strategy}").prepare(int(num_replicas), 1)
    found = {}
    for name, overrides in json.loads(Path(cases).read_text()).items():
        config = checked((f"strategy={strategy}", *overrides))
        found[name] = (searched if config.controlled else run)(config)[1]
    found["imported"] = {"frameworks": sorted({"torch", "tensorflow"} & set(sys.modules))}
    Path(output).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:5])

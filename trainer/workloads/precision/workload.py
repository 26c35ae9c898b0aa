"""`workload=precision`, run freely and as the case of a schedule."""

from __future__ import annotations

import importlib
from typing import Any

from trainer.audit.findings import Finding
from trainer.audit.records import RunRecord
from trainer.config import Config
from trainer.schedule.case import Case
from trainer.strategies.hosting import StopFlag, Watcher
from trainer.workloads.precision.findings import found

# Strategy -> the module that hosts replicas, and its class for schedules.
HOSTS = {"threads": ("plain", "PlainCase"), "mirrored": ("mirrored", "MirroredCase")}


def run(config: Config, record: RunRecord, watcher: Watcher, stop: StopFlag) -> dict[str, Finding]:
    record.engine = "eager"
    rounds = _host(config).run(config, record, watcher, stop)
    return {} if stop.is_set() else found(config, rounds)


def case(config: Config) -> Case:
    made: Case = getattr(_host(config), HOSTS[config.strategy.name][1])(config)
    return made


def _host(config: Config) -> Any:
    return importlib.import_module(f"trainer.workloads.precision.{HOSTS[config.strategy.name][0]}")

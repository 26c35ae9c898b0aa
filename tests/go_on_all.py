"""Train many cases of one strategy whole, and again from a checkpoint on, for `test_going_on.py` to compare.

    KERAS_BACKEND=torch python tests/go_on_all.py threads FOLDER OUTPUT.json [CACHE]

With CACHE, a folder of compiled steps, the cases are those of `train.engine=native`, for `test_native.py`.

Writes by case what the whole run came to, what one that went on from a checkpoint did, and what others did that went on
from the same checkpoint with something of it left out.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from hold_all import config_of
from train_all import Nobody

from trainer.audit import copies
from trainer.audit.judge import judge
from trainer.audit.records import RunRecord
from trainer.checkpoint.checkpoints import Checkpoints, TellAll, alone, digests
from trainer.config import Checkpoint, Config
from trainer.one_run import empty_record
from trainer.state.settings import ASKED_BY, snapshot

EVERY, STOPPED, STEPS = 5, 10, 14
SCALED = ["mixed_float16", {"growth_steps": 4}]
NAIVE = dict.fromkeys(
    ("precision", "first_call", "loss_scale", "gradients", "random_numbers", "batch_statistics", "cursor"), "naive"
)
# Everything that a step reads or writes: slots, statistics, masks, a loss scale that grows twice before it is saved.
CNN = {"model": ["cnn", {"filters": [4]}], "optimizer": ["momentum", {}], "precision": SCALED}
MLP = {**CNN, "model": ["mlp", {"hidden": [8], "dropout": 0.3}]}
# Nothing is captured, neither for the run nor for the audit: that takes most of the time of runs as short as these.
EAGER = {"train": {"capture": "never"}, "audit": ["none", {}]}
ENABLED = ["mixed_float16", {"growth_steps": 4, "enabled_in": "replica", "enabled_by": "enable"}]
COUNTED = ["counters", {"reference_every": 50}]
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "threads": {
        "whole": {**CNN, "audit": ["full", {"reference_every": 6, "trace_steps": 0}]},
        "eager": {**CNN, **EAGER},
        "adam": {"model": ["mlp", {}], "optimizer": ["adam", {}], "train": {"evaluate_every": 5, "evaluators": 1}},
        # One replica: what several do with these has no order that would come again.
        "naive": {**CNN, **EAGER, "num_replicas": 1, "state": NAIVE},
        "naive, by enable": {**CNN, "num_replicas": 1, "state": NAIVE, "precision": ENABLED, "audit": COUNTED},
        "locked": {"model": ["linear", {}], "update_mode": ["locked", {}]},
        "overwrite": {"model": ["linear", {}], "update_mode": ["overwrite", {}], "num_replicas": 1},
    },
    "mirrored": {
        "whole": {**MLP, "audit": ["full", {"reference_every": 6, "trace_steps": 0}]},
        "adam": {"model": ["linear", {}], "optimizer": ["adam", {}], "train": {"evaluate_every": 5}},
        # There is one order only, so that races come again.
        "naive": {**CNN, "update_mode": ["unreduced", {}], "state": NAIVE, "audit": ["none", {}]},
        "naive, by enable": {
            **MLP,
            "state": NAIVE,
            "precision": ENABLED,
            "train": {"capture": "never"},
            "audit": COUNTED,
        },
    },
}


def native(cache: str) -> dict[str, dict[str, Any]]:
    """Cases that run in the native loop, with the steps that `test_native.py` compiles."""
    train = {"engine": "native", "evaluate_every": 5, "compile_cache": cache}
    modes = ("all_reduce", "locked")
    return {mode: {"model": ["linear", {}], "update_mode": [mode, {}], "train": train} for mode in modes}


class Warned(Nobody):
    def __init__(self) -> None:
        self.messages: list[str] = []

    def warned(self, message: str) -> None:
        self.messages.append(message)


Defect = Callable[[Checkpoints, Any], None]


def _region(name: str) -> Defect:
    def forget(checkpoints: Checkpoints, training: Any) -> None:
        span = training.layout.regions[name]
        checkpoints.arrays["copies"][:, span] = training.initial[span]

    return forget


def _cursor(checkpoints: Checkpoints, training: Any) -> None:
    if "position" in checkpoints.arrays:
        checkpoints.arrays["position"][:] = 0
    checkpoints.facts["position"] = 0


def _generator(checkpoints: Checkpoints, training: Any) -> None:
    if checkpoints.arrays["generator"].dtype == np.uint8:
        del checkpoints.arrays["generator"]  # torch's: it starts from the seed again
    else:
        checkpoints.arrays["generator"][:, 1] = 0  # the count of draws


# What is left out of a checkpoint or put back -> in which case, how.
DEFECTS: dict[str, tuple[str, Defect]] = {
    "slots": ("eager", _region("velocity")),
    "statistics": ("eager", _region("statistics")),
    "loss scale": ("eager", _region("loss_scale")),
    "counter": ("adam", _region("counter")),
    "cursor": ("naive", _cursor),
    "random numbers": ("naive", _generator),
}


class Case:
    def __init__(self, strategy: Any, config: Config, folder: Path, tell_all: TellAll = alone) -> None:
        self.strategy, self.config, self.folder, self.tell_all = strategy, config, folder, tell_all

    def run(self, *, steps: int = STEPS, defect: Defect | None = None, **fields: Any) -> dict[str, Any]:
        from trainer.workloads.train import Training

        train = dataclasses.replace(self.config.train, steps=steps)
        config = dataclasses.replace(self.config, train=train, **fields)
        training, record = Training(config), empty_record(config)
        record.layout, record.initial = training.layout, training.initial
        record.settings_asked = {**self.asked(), **ASKED_BY[config.strategy.name], **training.settings_of_replicas}
        watcher, checkpoints = Warned(), None
        if config.resume or config.checkpoint.every:
            made_of = digests(training.layout, training.initial, training.dataset)
            checkpoints = Checkpoints(config, self.folder, made_of, record, watcher.warned, self.tell_all)
        if defect is not None:
            defect(checkpoints, training)
        self.strategy.train(config, training, record, watcher, threading.Event(), checkpoints)
        return self.found(config, record, checkpoints, watcher)

    def asked(self) -> dict[str, str]:
        """The settings that a run's process has before its replicas."""
        return snapshot()

    def found(
        self, config: Config, record: RunRecord, checkpoints: Checkpoints | None, watcher: Warned
    ) -> dict[str, Any]:
        verdict = judge(config, record, None, {})
        measured = {name: value for name, value in verdict.metrics.items() if "per_second" not in name}
        rows = {
            f"{own}.{name}": hashlib.sha256(value.tobytes()).hexdigest()
            for own, replica in enumerate(record.replicas)
            for name, value in vars(replica).items()
            if isinstance(value, np.ndarray)
        }
        return {
            "outcome": copies.outcome(record),
            "engine": record.engine,
            "final": copies.final_digest(record),
            "verdict": verdict.verdict,
            "guarantees": [[each.name, each.status, each.evidence] for each in verdict.guarantees],
            "anomalies": [[each.kind, each.count, each.of, each.witness] for each in verdict.anomalies],
            "metrics": {name: repr(value) for name, value in measured.items()},
            "rows": rows,
            "evaluations": [[each.step, each.accuracy, each.loss] for each in record.evaluations],
            "references": [[each.replica_id, each.step, each.batch, each.asked] for each in record.references],
            "mode_left": record.mode_left,
            "first_calls": record.first_calls,
            "checkpoints": None if checkpoints is None else checkpoints.told,
            "resumed": None if checkpoints is None else checkpoints.resumed,
            "warned": watcher.messages,
        }


def main(strategy_name: str, folder: str, output: str, cache: str = "") -> None:
    strategy = importlib.import_module(f"trainer.strategies.{strategy_name}")
    strategy.prepare(2, 1)
    found = {}
    for name, fields in (native(cache) if cache else CASES[strategy_name]).items():
        own = Path(folder) / name.replace(" ", "_").replace(",", "")
        for each in ("before", "after"):
            (own / each).mkdir(parents=True)
        config = config_of(strategy_name, fields)
        before = {"checkpoint": Checkpoint(every=EVERY), "steps": STOPPED}
        after = {"checkpoint": Checkpoint(every=EVERY), "resume": str(own / "before")}
        found[name] = {
            "whole": Case(strategy, config, own).run(),
            "before": Case(strategy, config, own / "before").run(**before),
            "after": Case(strategy, config, own / "after").run(**after),
            "again": Case(strategy, config, own / "after").run(resume=str(own / "after")) if name == "adam" else None,
            "defects": {
                what: Case(strategy, config, own).run(resume=str(own / "before"), defect=defect)["outcome"]
                for what, (case, defect) in DEFECTS.items()
                if case == name
            },
        }
    Path(output).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])

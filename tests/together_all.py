"""One of two processes that train cases whole, and again from a checkpoint on, for `test_going_on_together.py`.

    RANK=0 WORLD_SIZE=2 TRAINER_MEETING=FILE KERAS_BACKEND=torch python tests/together_all.py ddp FOLDER

Each writes what it came to, by case, into `found.json` of its own folder, FOLDER or FOLDER/process_1.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from go_on_all import CNN, EVERY, MLP, NAIVE, STOPPED, Case
from hold_all import config_of

from trainer.checkpoint import files
from trainer.checkpoint.store import name_of, steps_in
from trainer.config import Checkpoint, Config, ConfigError
from trainer.processes import folder_of
from trainer.rules import validate
from trainer.state.settings import snapshot
from trainer.strategies.hosting import RunBroken

RANK = int(os.environ["RANK"])
SEEN = ["full", {"reference_every": 6, "trace_steps": 0, "digest_every": 3}]
LINEAR: dict[str, Any] = {"model": ["linear", {}], "optimizer": ["adam", {}], "audit": SEEN}
LOCAL = {**LINEAR, "update_mode": ["local_steps", {"average_every": 5}]}
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "ddp": {
        "all_reduce": {**CNN, "audit": SEEN, "train": {"evaluate_every": 5}},
        "local_steps": LOCAL,
        # Process 1 hosts replicas 2 and 3: one fault on either side of the checkpoint.
        "skip": {
            **LINEAR,
            "faults": ["corrupt:2:3:inf", "corrupt:3:11:nan"],
            "train": {"on_nonfinite": "skip", "capture": "never"},
        },
    },
    "multi_worker": {
        "all_reduce": {**MLP, "audit": SEEN, "train": {"evaluate_every": 5}},
        "naive": {**MLP, "update_mode": ["unreduced", {}], "state": NAIVE, "audit": ["none", {}]},
    },
}
SLOW = {**LINEAR, "audit": ["none", {}]}
SLOW_STEPS, WAIT_SECONDS = 40, 60.0


class Together(Case):
    """Of the process that judges, all that a run came to; of another, what it did about checkpoints."""

    def asked(self) -> dict[str, str]:
        # Each run has a process of its own elsewhere; here TensorFlow has been left set by the run before.
        return _settings()

    def found(self, config: Config, record: Any, checkpoints: Any, watcher: Any) -> dict[str, Any]:
        if not RANK:
            return super().found(config, record, checkpoints, watcher)
        return {"resumed": None if checkpoints is None else checkpoints.resumed, "warned": watcher.messages}


@functools.cache
def _settings() -> dict[str, str]:
    return snapshot()


def main(strategy_name: str, folder: str) -> None:
    strategy = importlib.import_module(f"trainer.strategies.{strategy_name}")
    strategy.prepare(2, 1)
    run = Path(folder)
    found: dict[str, Any] = {}
    for name, fields in CASES[strategy_name].items():
        config = _config(strategy_name, fields)
        found[name] = {
            "whole": _case(strategy, config, run).run(),
            "before": _case(strategy, config, run / name).run(checkpoint=Checkpoint(every=EVERY), steps=STOPPED),
            "after": _case(strategy, config, run).run(resume=str(run / name)),
        }
    config = _config(strategy_name, CASES[strategy_name]["all_reduce"])
    found["uneven"] = _uneven(strategy, config, run)
    if strategy_name == "ddp":
        found["forgetful"] = _forgetful(strategy, run)
        found["slow"] = _slow(strategy, run)
    (folder_of(run, RANK) / "found.json").write_text(json.dumps(found))
    # As a run's own process ends: what is left of processes that have lost each other must not keep it.
    os._exit(0)


def _config(strategy_name: str, fields: dict[str, Any]) -> Config:
    config = config_of(strategy_name, {name: value for name, value in fields.items() if name != "faults"})
    config = dataclasses.replace(config, faults=fields.get("faults", []))
    validate(config)
    return config


def _case(strategy: Any, config: Config, run: Path) -> Together:
    own = folder_of(run, RANK)
    own.mkdir(parents=True, exist_ok=True)
    return Together(strategy, config, own, functools.partial(strategy.tell_all, config))


def _uneven(strategy: Any, config: Config, run: Path) -> dict[str, Any]:
    """Go on where process 1 lacks its newest checkpoint, where it lacks all, and where it has those of process 0."""
    found = {}
    for name, lacking, of in (("newest", [STOPPED], RANK), ("all", [EVERY, STOPPED], RANK), ("others", [], 0)):
        own = folder_of(run / name, RANK)
        shutil.copytree(folder_of(run / "all_reduce", of) / "checkpoints", own / "checkpoints")
        for step in lacking if RANK else []:
            (own / "checkpoints" / name_of(step)).unlink()
        try:
            found[name] = _case(strategy, config, run).run(resume=str(run / name))
        except ConfigError as error:
            found[name] = {"refused": str(error)}
    return found


def _forgetful(strategy: Any, run: Path) -> dict[str, Any]:
    """Unsafe: of what a process knows beside its values something begins anew."""
    config, found = _config("ddp", LOCAL), {}
    mode, exchange = strategy.between_processes.LocalSteps, strategy.Exchange
    steps, position = mode.go_on, exchange.go_on
    mode.go_on = lambda *_: None
    found["steps"] = _case(strategy, config, run).run(resume=str(run / "local_steps"))
    mode.go_on = steps
    # A digest that was to be sent with the next average.
    exchange.go_on = lambda self, found, vector: position(self, {**found, "shown": -1}, vector)
    found["digest"] = _case(strategy, config, run).run(resume=str(run / "local_steps"))
    exchange.go_on = position
    return found


def _slow(strategy: Any, run: Path) -> dict[str, Any]:
    """Process 1 is still writing its second checkpoint when process 0 has got as far ahead as it can, and breaks."""
    save = files.save

    def saved(arrays: Any, facts: Any, step: int, folder: Path, *, keep: int) -> int:
        if RANK and step == 2 * EVERY:
            deadline = time.monotonic() + WAIT_SECONDS
            while 4 * EVERY not in steps_in(run / "slow"):
                assert time.monotonic() < deadline, "process 0 has not got there"
                time.sleep(0.02)
            raise RuntimeError("out of memory, say")
        return save(arrays, facts, step, folder, keep=keep)

    files.save = saved
    config = dataclasses.replace(_config("ddp", SLOW), checkpoint=Checkpoint(every=EVERY, keep=1))
    try:
        _case(strategy, config, run / "slow").run(steps=SLOW_STEPS)
    except (RunBroken, RuntimeError) as error:
        return {"broken": str(error), "kept": steps_in(folder_of(run / "slow", RANK))}
    return {"broken": ""}


if __name__ == "__main__":
    main(*sys.argv[1:])

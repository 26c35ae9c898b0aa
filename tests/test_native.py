"""`train.engine=native`: the compiled loop trains as the loop in Python does, and says where it cannot."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command import ROOT, verdict

from trainer.engines.native.loop import MODES
from trainer.updates.mechanisms import MODES as MECHANISMS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(480),  # whichever test comes first compiles two steps and the loop
    pytest.mark.skipif(
        shutil.which(os.environ.get("CXX") or "g++") is None, reason="libraries need a C++ compiler, and there is none"
    ),
]
HERE = Path(__file__).resolve().parent
RULES = ["sgd", "momentum", "adam"]
JOINT = ["all_reduce", "unscaled_sum"]
EACH = [*MODES, "unscaled_sum"]
# A configuration whose loop has to run in Python: what it asks for, and what the log says of it.
IN_PYTHON: dict[str, dict[str, Any]] = {
    "full": {"audit": ["full", {"trace_steps": 0}]},
    "shared iterator": {"state": {"cursor": "shared_iterator"}},
    "first call": {"state": {"first_call": "flag"}},
}


def cases() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for engine in ("inductor", "native"):
        for rule in RULES:
            for mode in EACH if engine == "native" else JOINT:
                found[f"{engine} {mode} {rule}"] = {
                    "update_mode": [mode, {}],
                    "optimizer": [rule, {}],
                    "train": {"engine": engine, "evaluate_every": 5},
                }
    for name, fields in IN_PYTHON.items():
        found[name] = {**fields, "train": {"engine": "native"}}
    return {name: {"model": ["linear", {}], "num_replicas": 2, **fields} for name, fields in found.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("native")


@pytest.fixture(scope="module")
def held(folder: Path) -> dict[str, Any]:
    given = cases()
    for fields in given.values():
        fields["train"]["compile_cache"] = str(folder / "cache")
    asked, output = folder / "cases.json", folder / "found.json"
    asked.write_text(json.dumps(given))
    environment = os.environ | {"KERAS_BACKEND": "torch", "PYTHONPATH": os.pathsep.join([str(HERE), str(ROOT)])}
    subprocess.run([sys.executable, HERE / "hold_all.py", "threads", asked, output], env=environment, check=True)
    found: dict[str, Any] = json.loads(output.read_text())
    return found


def test_the_native_loop_goes_on_from_a_checkpoint_as_if_it_had_not_ended(held: dict[str, Any], folder: Path) -> None:
    output = folder / "went_on.json"
    environment = os.environ | {"KERAS_BACKEND": "torch", "PYTHONPATH": os.pathsep.join([str(HERE), str(ROOT)])}
    command = [sys.executable, HERE / "go_on_all.py", "threads", folder / "went_on", output, folder / "cache"]
    subprocess.run(command, env=environment, check=True)
    found = json.loads(output.read_text())
    for case in found.values():
        assert case["after"]["engine"] == "native"
        assert case["after"]["verdict"] == "upheld"
        assert case["after"]["metrics"]["updates_kept"] == case["whole"]["metrics"]["updates_expected"]
    whole, after = found["all_reduce"]["whole"], found["all_reduce"]["after"]
    for each in (whole, after):
        # Whoever comes first compiles.
        each["guarantees"] = [told for told in each["guarantees"] if told[0] != "own_compiled_step"]
    for what in whole:
        if what not in ("checkpoints", "resumed"):
            assert after[what] == whole[what], what
    assert after["outcome"] != found["all_reduce"]["before"]["outcome"]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("mode", EACH)
def test_every_mode_runs_in_the_loop_and_upholds_what_it_claims(held: dict[str, Any], mode: str, rule: str) -> None:
    found = held[f"native {mode} {rule}"]
    assert found["engine"] == "native"
    for name in MECHANISMS[mode].claims - {"same_bits", "replicas_identical"}:
        # Not checked: where updates were overwritten, counts cannot tell their order.
        assert found["statuses"][name] in ("upheld", "not_checked"), (name, found["evidence"][name])
        assert found["statuses"][name] == "upheld" or mode == "write_locked", name
    for name in ("gradients_unmixed", "precision_as_asked", "samples_once", "own_compiled_step"):
        assert found["statuses"][name] == "upheld", (name, found["evidence"][name])
    assert found["verdict"] in ("upheld", "anomaly", "inconclusive")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("mode", JOINT)
def test_the_loop_gives_what_python_gives(held: dict[str, Any], mode: str, rule: str) -> None:
    native, python = held[f"native {mode} {rule}"], held[f"inductor {mode} {rule}"]
    assert (native["engine"], python["engine"]) == ("native", "inductor")
    assert native["statuses"] == python["statuses"]
    assert native["anomalies"] == python["anomalies"]
    if rule == "adam":  # whose roots are rounded another way
        for ours, theirs in zip(native["losses"], python["losses"], strict=True):
            assert ours == pytest.approx(theirs, abs=1e-5)
    else:
        assert native["losses"] == python["losses"]
        assert native["digest"] == python["digest"]


@pytest.mark.parametrize("name", IN_PYTHON)
def test_what_the_loop_cannot_do_is_done_in_python_and_the_engine_says_so(held: dict[str, Any], name: str) -> None:
    assert held[name]["engine"] == "inductor"


def run(folder: Path, *arguments: str, **environment: str) -> tuple[int, str]:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "trainer", f"hydra.run.dir={folder}", "train.engine=native", "model=linear"),
            *("train.steps=6", "train.batch_size=4", "fail_on=never", *arguments),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        cwd=folder.parent,
        timeout=240,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_without_a_compiler_everything_runs_without_one_and_the_log_says_so(tmp_path: Path) -> None:
    cache = f"train.compile_cache={tmp_path / 'cache'}"
    status, told = run(tmp_path / "run", cache, CXX="no_such_compiler")
    assert status == 0, told
    assert verdict(tmp_path / "run")["run"]["engine"] == "torchscript"
    log = (tmp_path / "run" / "console.log").read_text()
    assert "The replicas' loop runs in Python, not compiled: the captured step is no compiled library." in log

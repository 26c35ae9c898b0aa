"""Faults that are injected, and what comes of them: who is told, how soon, and that all replicas decide alike."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command import Command, verdict

from trainer.config import Config, ConfigError, Custom, Search, Strategy, Train, UpdateMode
from trainer.faults import BadFault, parse
from trainer.rules import validate
from trainer.updates.mechanisms import MODES

# A module's first test waits for all cases of a strategy: half a minute of computing, shared with whatever else runs.
pytestmark = pytest.mark.timeout(300)
ROOT = Path(__file__).resolve().parent.parent
STEPS = 6
FIRST_MIDDLE_LAST = (0, 3, STEPS - 1)
SECONDS = 5.0  # of a busy machine; measured where it is idle: at most 0.3
OF_THREADS = [name for name, row in MODES.items() if "threads" in row.strategies and name != "custom"]
OF_MIRRORED = [name for name, row in MODES.items() if "mirrored" in row.strategies and name != "custom"]
EACH = [("threads", mode) for mode in OF_THREADS] + [("mirrored", mode) for mode in OF_MIRRORED]
# Under mirrored the host raises between two steps, whatever the mode.
RAISES = [pair for pair in EACH if pair[0] == "threads" or pair[1] == "all_reduce"]
TWINS = ("all_reduce", "locked", "unreduced")  # modes that are also shown to apply what is not finite
RULES = ("momentum", "adam")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("boom:1:5", "must be KIND:REPLICA:STEP or KIND:REPLICA:STEP:VALUE with a kind of raise, hang, kill, delay"),
        ("raise:1", "must be KIND:REPLICA:STEP or KIND:REPLICA:STEP:VALUE"),
        ("raise:1:5:2", "must be raise:REPLICA:STEP: raise takes no value"),
        ("hang:one:5", "must have whole numbers for REPLICA and STEP"),
        ("delay:1:5:soon", "must have whole numbers for REPLICA and STEP, and a number, inf or nan for VALUE"),
        ("delay:1:5:0", "must have a delay above 0 and of at most 3600 seconds"),
        ("delay:1:5:nan", "must have a delay above 0"),
        ("corrupt:1:5:0", "must add something else than 0, which corrupts nothing"),
        ("kill:2:5", "must name a replica that there is: replicas are 0 to 1."),
        ("kill:-1:5", "must name a replica that there is"),
        ("kill:1:200", "must name a step that there is: steps are 0 to 199."),
    ],
)
def test_what_is_no_fault_is_refused_in_one_line(entry: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        validate(Config(faults=["raise:0:0", entry]))
    assert str(refused.value).startswith(f"faults=[{entry}] {message}")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": Search()}, "faults needs schedule=free; got schedule=search"),
        ({"workload": Custom(_target_="json.loads"), "update_mode": Custom()}, "faults needs workload=train"),
        ({"train": Train(evaluators=1), "faults": ["corrupt:1:0"]}, "faults=[corrupt:1:0] must name a replica"),
        ({"train": Train(on_nonfinite="ignore")}, "train.on_nonfinite must be one of continue, skip, stop"),
    ],
)
def test_faults_are_refused_where_nobody_can_host_them(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        validate(Config(**{"faults": ["raise:0:0"], **changes}))
    assert str(refused.value).startswith(message)


def test_values_have_defaults_and_may_be_infinite() -> None:
    assert parse("delay:0:1").value == 1.0
    assert parse("delay:0:1:0.25").value == 0.25
    assert math.isnan(parse("corrupt:0:1").value)
    assert parse("corrupt:0:1:-inf").value == -math.inf
    with pytest.raises(BadFault):
        parse("corrupt")


# Runs in one process a strategy.


def _cases(strategy: str) -> dict[str, dict[str, Any]]:
    modes = [mode for of, mode in EACH if of == strategy]
    raised = {
        f"raise {mode} {step}": {"mode": mode, "faults": [f"raise:1:{step}"], "capture": "never"}
        for mode in modes
        for step in FIRST_MIDDLE_LAST
        if (strategy, mode) in RAISES
    }
    last = STEPS - 1
    corrupted = {
        f"{what} {mode}": {
            "mode": mode,
            "faults": [f"corrupt:1:{last}:inf"],
            "on_nonfinite": what,
            "capture": "auto" if mode == "all_reduce" else "never",
        }
        for mode in modes
        for what in ("continue", "skip", "stop")
        if what != "continue" or mode in TWINS
    }
    rules = {
        f"{what} all_reduce {rule}": {"mode": "all_reduce", "optimizer": rule, "capture": "never", **given}
        for rule in RULES
        for what, given in {
            "skip": {"faults": [f"corrupt:1:{last}"], "on_nonfinite": "skip"},
            "short": {"faults": [], "steps": last},
            "continue": {"faults": [f"corrupt:1:{last}"]},
        }.items()
    }
    others = {
        "clean": {"mode": "all_reduce", "faults": []},
        "delay": {"mode": "all_reduce", "faults": ["delay:0:2:0.05"]},
        "off": {"mode": "all_reduce", "faults": ["corrupt:1:2:1000"]},
        "float16": {"mode": "all_reduce", "faults": ["corrupt:1:2"], "precision": "mixed_float16"},
        "float16 stop": {
            "mode": "all_reduce",
            "faults": ["corrupt:1:2"],
            "precision": "mixed_float16",
            "on_nonfinite": "stop",
        },
    }
    return {**raised, **corrupted, **rules, **others}


def _found(folder: Path, strategy: str, cases: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What came of each case, all in one process."""
    given, output = folder / f"{strategy}.json", folder / f"{strategy}_found.json"
    given.write_text(json.dumps(cases))
    backend = {"threads": "torch", "mirrored": "tensorflow"}[strategy]
    subprocess.run(
        [sys.executable, str(ROOT / "tests/faults_all.py"), strategy, str(given), str(output)],
        env={**os.environ, "KERAS_BACKEND": backend, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        check=True,
        capture_output=True,
        timeout=280,
    )
    found: dict[str, dict[str, Any]] = json.loads(output.read_text())
    return found


@pytest.fixture(scope="module")
def threads(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    keeps = {"mode": "", "target": "faults_all.KeepsItsLock", "faults": ["raise:1:2"]}
    return _found(tmp_path_factory.mktemp("faults"), "threads", {**_cases("threads"), "keeps its lock": keeps})


@pytest.fixture(scope="module")
def mirrored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return _found(tmp_path_factory.mktemp("faults"), "mirrored", _cases("mirrored"))


@pytest.fixture
def found(request: pytest.FixtureRequest, strategy: str) -> dict[str, dict[str, Any]]:
    results: dict[str, dict[str, Any]] = request.getfixturevalue(strategy)
    return results


@pytest.mark.slow
@pytest.mark.parametrize("step", FIRST_MIDDLE_LAST)
@pytest.mark.parametrize(("strategy", "mode"), RAISES)
def test_a_replica_that_raises_ends_all_and_is_named(found: dict[str, Any], mode: str, step: int) -> None:
    broken = found[f"raise {mode} {step}"]
    message = f"replica 1 raised InjectedFault: faults=[raise:1:{step}]"
    assert broken["error"] == {"kind": "crash", "message": message, "replica": 1, "step": step}
    assert broken["seconds"] < SECONDS


@pytest.mark.slow
def test_a_replica_that_raises_under_a_bare_lock_keeps_nobody(threads: dict[str, Any]) -> None:
    broken = threads["keeps its lock"]
    assert (broken["error"]["kind"], broken["error"]["replica"], broken["error"]["step"]) == ("crash", 1, 2)
    assert broken["seconds"] < SECONDS
    assert max(broken["began"]) <= 3  # nobody came by the lock, or past the barrier before it


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "mode"), EACH)
def test_a_gradient_that_is_not_finite_stops_the_run_and_is_named(found: dict[str, Any], mode: str) -> None:
    broken = found[f"stop {mode}"]["error"]
    assert (broken["kind"], broken["replica"], broken["step"]) == ("nonfinite", 1, STEPS - 1)
    assert broken["message"].startswith("the gradient of linear/logits/kernel is not finite: replica 1, step 5, 1 of")


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "mode"), EACH)
def test_a_skipped_update_is_counted_and_leaves_every_variable_finite(found: dict[str, Any], mode: str) -> None:
    skipped = found[f"skip {mode}"]
    assert all(skipped["finite"])
    assert skipped["metrics"]["updates_skipped"] == 1
    assert skipped["statuses"]["finite_values"] == "not_seen"
    if "no_lost_updates" in MODES[mode].claims:
        assert skipped["kept"] == 3 * STEPS  # its canaries say that it was made


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "mode"), [pair for pair in EACH if pair[1] in TWINS])
def test_what_is_not_skipped_ends_in_the_variables_and_is_told(found: dict[str, Any], mode: str) -> None:
    went_on = found[f"continue {mode}"]
    assert not all(went_on["finite"])
    assert went_on["statuses"]["finite_values"] == "anomaly"
    assert went_on["anomalies"]["nonfinite_variable"].endswith("of linear/logits/kernel are not finite at the end")


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("strategy", ["threads", "mirrored"])
def test_a_skipped_joint_update_leaves_the_bits_of_the_step_before(found: dict[str, Any], rule: str) -> None:
    skipped, short, went_on = (found[f"{what} all_reduce {rule}"] for what in ("skip", "short", "continue"))
    assert skipped["digests"] == short["digests"]
    assert set(went_on["digests"]).isdisjoint(short["digests"])


@pytest.mark.slow
def test_an_unreduced_replica_skips_for_its_own_copy_alone(mirrored: dict[str, Any]) -> None:
    assert mirrored["skip unreduced"]["finite"] == [True, True, True]
    assert mirrored["continue unreduced"]["finite"] == [True, False, True]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["threads", "mirrored"])
def test_a_late_replica_changes_no_bit(found: dict[str, Any]) -> None:
    assert found["delay"]["digests"] == found["clean"]["digests"]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["threads", "mirrored"])
def test_the_audit_finds_a_gradient_that_was_changed(found: dict[str, Any]) -> None:
    assert found["off"]["anomalies"]["mixed_gradient"].startswith("replica 1, step 2: differs by up to 1e+03")
    assert found["off"]["statuses"]["joint_gradient"] == "violated"
    assert found["clean"]["statuses"]["gradients_unmixed"] == "upheld"


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["threads", "mirrored"])
@pytest.mark.parametrize("name", ["float16", "float16 stop"])
def test_a_loss_scale_skips_what_is_not_finite_by_itself(found: dict[str, Any], name: str) -> None:
    assert found[name]["error"] is None
    assert found[name]["metrics"]["updates_skipped"] == 1
    assert found[name]["statuses"]["loss_scale_kept"] == "upheld"
    assert all(found[name]["finite"])


# Whole runs.


@pytest.mark.slow
def test_a_sweep_goes_on_after_a_killed_run(command: Command) -> None:
    ended = command("-m", "faults=[],[kill:1:4],[delay:0:1:0.01]", "train.steps=8", "model=linear", "hydra.sweep.dir=s")
    assert ended.returncode == 3, ended.stdout + ended.stderr
    found = [verdict(folder) for folder in sorted((command.folder / "s").glob("?_*"))]
    assert [each["verdict"] for each in found] == ["upheld", "broken", "upheld"]
    assert [each["run"]["faults"] for each in found] == [[], ["kill:1:4"], ["delay:0:1:0.01"]]
    assert found[1]["error"]["kind"] == "killed"
    assert found[1]["error"]["message"].startswith("killed by SIGKILL")
    assert "fault injected: kill:1:4" in found[1]["error"]["message"]
    assert found[0]["final_parameters_sha256"] == found[2]["final_parameters_sha256"]


def test_modes_of_both_strategies_are_tried() -> None:
    assert len(OF_THREADS) > 9
    assert len(OF_MIRRORED) > 3
    validate(Config(strategy=Strategy("mirrored"), update_mode=UpdateMode("unreduced"), faults=["kill:1:199"]))

"""A run that goes on from a checkpoint is the run that was never ended: same bits, same records, same verdict."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command import ROOT, Command, verdict
from go_on_all import CASES, DEFECTS, EVERY, STEPS, STOPPED

from trainer.checkpoint.identity import FREE, difference, identity
from trainer.checkpoint.store import name_of, steps_in
from trainer.config import OPTIONS, Checkpoint, Config, ConfigError, Counter, Custom, Strategy, Train
from trainer.keys import keys
from trainer.rules import validate

HERE = Path(__file__).resolve().parent
BACKENDS = {"threads": "torch", "mirrored": "tensorflow"}
# What replicas come to here depends on who comes first.
FREE_ORDER = ["locked"]
Found = dict[str, dict[str, Any]]
FoundOf = Callable[[str], Found]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> FoundOf:
    """All cases of a strategy, by name; whoever asks first for a strategy waits for them."""

    @functools.cache
    def found_of(strategy: str) -> Found:
        folder = tmp_path_factory.mktemp(strategy)
        environment = os.environ | {
            "KERAS_BACKEND": BACKENDS[strategy],
            "PYTHONPATH": os.pathsep.join([str(HERE), str(ROOT)]),
            "TF_CPP_MIN_LOG_LEVEL": "3",
        }
        command = [sys.executable, HERE / "go_on_all.py", strategy, folder, output := folder / "found.json"]
        subprocess.run(command, env=environment, check=True, timeout=280)
        told: Found = json.loads(output.read_text())
        return told

    return found_of


def of(strategy: str, *, free: bool) -> list[Any]:
    names = [name for name in CASES[strategy] if (name in FREE_ORDER) == free]
    return [pytest.param(strategy, name, id=f"{strategy}, {name}") for name in names]


ALL_IN_ONE_ORDER = [*of("threads", free=False), *of("mirrored", free=False)]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("strategy", "name"), ALL_IN_ONE_ORDER)
def test_a_resumed_run_is_the_run_that_was_never_ended(found: FoundOf, strategy: str, name: str) -> None:
    whole, after = found(strategy)[name]["whole"], found(strategy)[name]["after"]
    for what in whole:
        if what not in ("checkpoints", "resumed"):
            assert after[what] == whole[what], what
    assert found(strategy)[name]["before"]["outcome"] != whole["outcome"]
    assert found(strategy)[name]["before"]["checkpoints"] == {"written": 2, "failed": [], "last_step": STOPPED}
    assert after["resumed"]["step"] == STOPPED
    assert after["resumed"]["checkpoint"] == name_of(STOPPED)
    # Its own, in its own folder: at the next multiple there is none before the last step.
    assert after["checkpoints"] == {"written": 1, "failed": [], "last_step": STEPS}


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("strategy", ["threads", "mirrored"])
def test_a_run_that_was_saved_after_its_last_step_has_its_verdict_again(found: FoundOf, strategy: str) -> None:
    whole, again = found(strategy)["adam"]["whole"], found(strategy)["adam"]["again"]
    for what in whole:
        if what not in ("checkpoints", "resumed"):
            assert again[what] == whole[what], what
    assert again["resumed"]["step"] == STEPS
    assert again["resumed"]["before"]["step"] == STOPPED


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("strategy", ["threads", "mirrored"])
def test_whatever_is_left_out_of_a_checkpoint_changes_the_outcome(found: FoundOf, strategy: str) -> None:
    """The twin: each thing that is saved is one that the comparison above can miss."""
    tried = 0
    for what, (name, _) in DEFECTS.items():
        case = found(strategy).get(name, {"defects": {}})
        if what in case["defects"]:
            tried += 1
            assert case["defects"][what] != case["after"]["outcome"], what
    assert tried >= 3


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("strategy", "name"), of("threads", free=True))
def test_a_resumed_run_in_another_order_is_judged_by_all_its_steps(found: FoundOf, strategy: str, name: str) -> None:
    after = found(strategy)[name]["after"]
    assert after["verdict"] == "upheld"
    assert after["metrics"]["updates_kept"] == after["metrics"]["updates_expected"] == str(2 * STEPS)
    evidence = {each[0]: each[2] for each in after["guarantees"]}
    assert evidence["no_lost_updates"].startswith(f"{2 * STEPS} of {2 * STEPS} updates kept")
    assert evidence["samples_once"].startswith(f"{2 * STEPS * 8} of {2 * STEPS * 8} samples")


# Runs that are killed.

# Slots, masks, batch statistics and a loss scale that grows; long enough to be killed in its midst.
RUN = (
    *("model=cnn", "model.filters=[4]", "optimizer=momentum", "precision=mixed_float16", "precision.growth_steps=20"),
    *("train.batch_size=8", "train.threads_per_replica=1", "checkpoint.every=20"),
)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("strategy", ["threads", "mirrored"])
def test_a_run_that_is_killed_twice_ends_in_the_bits_of_one_that_was_not(command: Command, strategy: str) -> None:
    # Too long to end by itself; how long a run is makes no difference to its steps.
    least = 0
    for run, wanted, given in (("first", 2, []), ("second", 3, ["resume=first"])):
        running = command.start(f"strategy={strategy}", *RUN, "train.steps=20000", *given, f"hydra.run.dir={run}")
        folder = command.folder / run
        least += 20 * wanted
        running.wait_for(lambda folder=folder, least=least: any(step >= least for step in steps_in(folder)))
        (process,) = running.runs()
        process.kill()
        _, errors = running.process.communicate(timeout=20)
        assert running.process.returncode == 3
        assert verdict(folder)["error"]["kind"] == "killed"
        least = steps_in(folder)[0]
        assert f"trainer: resume={run} goes on after step {least}, with the same command otherwise." in errors
    saved = steps_in(command.folder / "second")
    steps = saved[0] + 30
    outcomes = []
    for run, given in (("third", ["resume=second"]), ("whole", [])):
        ended = command(f"strategy={strategy}", *RUN, f"train.steps={steps}", *given, f"hydra.run.dir={run}")
        assert ended.returncode == 0, ended.stdout + ended.stderr
        outcomes.append(verdict(command.folder / run))
    third, whole = outcomes
    assert third["final_parameters_sha256"] == whole["final_parameters_sha256"]
    assert third["verdict"] == whole["verdict"] == "upheld"
    assert third["metrics"]["updates_kept"] == third["metrics"]["updates_expected"] == 2 * steps
    assert [each["evidence"] for each in third["guarantees"]] == [each["evidence"] for each in whole["guarantees"]]
    resumed = third["run"]["resumed"]
    assert (resumed["folder"], resumed["step"], resumed["skipped"]) == ("second", saved[0], [])
    assert (resumed["before"]["folder"], "resumed" in whole["run"]) == ("first", True)
    assert whole["run"]["resumed"] is None
    # What was resumed is as it was.
    assert steps_in(command.folder / "second") == saved


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_an_unsafe_run_goes_on_and_its_counts_are_of_all_steps(command: Command) -> None:
    given = ("update_mode=overwrite", "train.batch_size=8", "checkpoint.every=100", "audit=full")
    assert command(*given, "train.steps=100", "hydra.run.dir=first").returncode == 0
    shutil.copy(*(command.folder / "first" / "checkpoints" / name_of(step) for step in (100, 200)))
    with (command.folder / "first" / "checkpoints" / name_of(200)).open("r+b") as damaged:
        damaged.truncate(30000)
    ended = command(*given, "train.steps=300", "resume=first", "hydra.run.dir=second")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    first, second = verdict(command.folder / "first"), verdict(command.folder / "second")
    assert second["metrics"]["updates_expected"] == 600
    lost = {each["kind"]: each["count"] for each in second["anomalies"]}["overwritten_update"]
    assert second["metrics"]["updates_kept"] == 600 - lost
    before = {each["kind"]: each["count"] for each in first["anomalies"]}.get("overwritten_update", 0)
    assert lost >= before
    (skipped,) = second["run"]["resumed"]["skipped"]
    assert skipped.startswith("step_00000200.safetensors is truncated: ")
    assert second["run"]["resumed"]["not_carried"] == ["trace"]
    told = f"warning: resume=first: {skipped}; the one before is taken."
    assert told in ended.stdout
    assert told.removeprefix("warning: ") in (command.folder / "second" / "console.log").read_text()
    assert "resumed from first after 100 steps" in " ".join(ended.stdout.split())


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_full_disk_stops_nothing_but_the_checkpoint(command: Command) -> None:
    # Larger than any other file of the run, and too small for a checkpoint of this model.
    limited = (
        "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6)); "
        "sys.argv[0] = 'trainer'; runpy.run_module('trainer', run_name='__main__')"
    )
    given = ["model.hidden=[512,512]", "train.steps=20", "checkpoint.every=10", "hydra.run.dir=run"]
    ended = subprocess.run(
        [sys.executable, "-c", limited, *given],
        cwd=command.folder, env=command.environment(), capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    run = verdict(command.folder / "run")
    assert run["verdict"] == "upheld"
    failed = ["step 10: File too large", "step 20: File too large"]
    assert run["run"]["checkpoints"] == {"written": 0, "failed": failed, "last_step": None}
    warning = "the checkpoint of step 10: File too large; there is none before it, and the run goes on."
    assert f"warning: {warning}" in ended.stdout
    assert warning in (command.folder / "run" / "console.log").read_text()
    assert os.listdir(command.folder / "run" / "checkpoints") == []


# What is refused, before any process is started.


def config(**fields: Any) -> Config:
    return dataclasses.replace(Config(), **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"checkpoint": Checkpoint(every=-1)}, "checkpoint.every must be at least 0; got -1."),
        ({"checkpoint": Checkpoint(keep=0)}, "checkpoint.keep must be at least 1; got 0."),
        (
            {"checkpoint": Checkpoint(every=5), "schedule": OPTIONS["schedule"]["search"]},
            "checkpoint.every=5 needs schedule=free: schedule=search makes short runs, many times.",
        ),
        (
            {"checkpoint": Checkpoint(every=5), "audit": dataclasses.replace(Config().audit, repeat=2)},
            "checkpoint.every=5 does not go with audit.repeat=2, which makes the whole run again. Leave audit.repeat "
            "out.",
        ),
        (
            {"resume": "x", "update_mode": Custom(_target_="brought.Mode")},
            "resume=x does not go with update_mode._target_=brought.Mode: what an update mode of your own keeps would "
            "not be in a checkpoint.",
        ),
        (
            {"checkpoint": Checkpoint(every=5), "workload": Counter()},
            "checkpoint.every=5 does not go with workload=counter, which does not heed it. Leave it out.",
        ),
        (
            {"resume": "nowhere"},
            "resume=nowhere does not exist. Give the folder of a run that was made with checkpoint.every=STEPS.",
        ),
    ],
    ids=["every", "keep", "schedule", "repeat", "update mode", "workload", "no folder"],
)
def test_what_cannot_be_saved_or_resumed_is_refused(
    fields: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.rules.check", lambda *given: None)  # of what is brought: there is none
    with pytest.raises(ConfigError) as error:
        validate(config(**fields))
    assert str(error.value) == message


def test_every_key_is_either_free_or_told_when_it_differs() -> None:
    """So that a new key cannot be forgotten: it has to be the same until somebody says that it need not."""
    now = identity(Config())
    for key in keys():
        group = key.partition(".")[0]
        assert (key in now) != bool({key, group} & {*FREE}) or key not in dict(_defaults()), key
    for name in FREE:
        assert name in keys() or any(key.startswith(f"{name}.") for key in keys()), name


def _defaults() -> list[tuple[str, Any]]:
    """The keys of the default options."""
    found: list[tuple[str, Any]] = []
    for group, option in dataclasses.asdict(Config()).items():
        found += [(f"{group}.{key}", value) for key, value in option.items()] if isinstance(option, dict) else []
    return [(key, value) for key, value in found if not key.endswith(".name")]


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"strategy": Strategy("mirrored")}, "strategy was threads and is mirrored"),
        ({"num_replicas": 3}, "num_replicas was 2 and is 3"),
        ({"model": OPTIONS["model"]["linear"]}, "model was mlp and is linear"),
        ({"model": dataclasses.replace(OPTIONS["model"]["mlp"], hidden=[8])}, "model.hidden was [64] and is [8]"),
        ({"optimizer": OPTIONS["optimizer"]["momentum"]}, "optimizer was sgd and is momentum"),
        ({"train": Train(seed=1, threads_per_replica=1)}, "train.seed was 0 and is 1"),
        ({"train": Train(threads_per_replica=2)}, "train.threads_per_replica was 1 and is 2"),
        ({"audit": OPTIONS["audit"]["none"]}, "audit was counters and is none"),
        ({"state": OPTIONS["state"]["naive"]}, "state.precision was safe and is naive"),
        ({"train": Train(steps=900, threads_per_replica=1, timeout_seconds=5)}, ""),
        ({"fail_on": "never", "resume": "x", "checkpoint": Checkpoint(every=7, keep=1)}, ""),
    ],
)
def test_what_differs_is_named(fields: dict[str, Any], told: str) -> None:
    plain = config(train=Train(threads_per_replica=1))
    before = json.loads(json.dumps(identity(plain)))
    assert difference(before, identity(dataclasses.replace(plain, **fields))) == told


def test_another_version_of_a_framework_is_named() -> None:
    before = identity(Config()) | {"version of torch": "1.0"}
    assert difference(before, identity(Config())).startswith("version of torch was 1.0 and is 2.")


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_another_runs_checkpoint_is_refused_before_anything_starts(command: Command) -> None:
    given = ("train.batch_size=8", "train.steps=20", "checkpoint.every=20")
    assert command(*given, "hydra.run.dir=first").returncode == 0
    before = command.left()
    for more, message in (
        (
            "train.seed=1",
            "resume=first was another run: train.seed was 0 and is 1. Repeat its command, which its verdict.json and "
            ".hydra have, and add resume=first.",
        ),
        (
            "train.steps=10",
            "train.steps=10 is less than the 20 steps of resume=first. Try train.steps=20 or more.",
        ),
        (
            "hydra.run.dir=first",
            "hydra.run.dir=first already holds a run (verdict.json). Choose another folder with hydra.run.dir=FOLDER.",
        ),
    ):
        ended = command(*given, "resume=first", "hydra.run.dir=second", more)
        assert (ended.returncode, ended.stderr, ended.stdout) == (2, f"trainer: {message}\n", "")
        assert command.left() == before


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_other_data_under_the_same_name_are_refused(command: Command) -> None:
    import numpy as np

    given = ("data=npz", "data.path=mine.npz", "model=linear", "train.batch_size=4", "train.steps=4")
    x, y = np.linspace(0, 1, 200, dtype=np.float32).reshape(50, 4), np.arange(50) % 2
    np.savez(command.folder / "mine.npz", x=x, y=y)
    assert command(*given, "checkpoint.every=2", "hydra.run.dir=first").returncode == 0
    np.savez(command.folder / "mine.npz", x=x + 1, y=y)
    ended = command(*given, "resume=first", "hydra.run.dir=second")
    assert ended.returncode == 2
    error = verdict(command.folder / "second")["error"]
    assert error["kind"] == "refused"
    assert error["message"].startswith("resume=first was another run: the SHA-256 of the data was ")


def test_every_checkpoint_between_is_made() -> None:
    assert EVERY * 2 == STOPPED < STEPS

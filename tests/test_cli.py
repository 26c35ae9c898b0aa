"""The command line: mistakes, help, tables, single runs and sweeps, all as real commands."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from command import Command, verdict

from trainer.audit.guarantees import GUARANTEES
from trainer.config import OPTIONS
from trainer.experiments import experiments
from trainer.keys import keys
from trainer.updates.mechanisms import COLUMNS, MODES

FRAMEWORKS = {"tensorflow", "torch", "keras", "tensorboard", "sklearn"}
LINE_SECONDS = 1.5
NOT_A_KEY = "is not a key of the configuration."

MISTAKES = [
    (["num_replica=2"], f"num_replica {NOT_A_KEY} Did you mean 'num_replicas'? --help lists the keys."),
    (["train.step=3"], f"train.step {NOT_A_KEY} Did you mean 'train.steps'? --help lists the keys."),
    (["+train.stepz=3"], f"train.stepz {NOT_A_KEY} Did you mean 'train.steps'? --help lists the keys."),
    (["stratgy=threads"], f"stratgy {NOT_A_KEY} Did you mean 'strategy'? --help lists the keys."),
    (["hydra.run.dri=x"], "hydra.run.dri is not a key of Hydra's own configuration. `--cfg hydra` shows it."),
    (["model.filters=[3]"], "model.filters is a key of model=cnn only. Add model=cnn, or leave the key out."),
    (["model.name=cnn"], "model.name=cnn does not choose an option. Write model=cnn."),
    (
        ["strategy=thread"],
        "strategy must be one of ddp, mirrored, multi_worker, threads; got 'thread'. Did you mean 'threads'?",
    ),
    (["model=null"], "a group takes the name of one of its options, as in model=mlp; got null. --help lists them."),
    (["model=[mlp,cnn]"], "model takes one option; got several. To run each, add -m and write model=A,B."),
    (["~model"], f"model must be one of {', '.join(OPTIONS['model'])}; got nothing."),
    (["num_replicas=two"], "num_replicas takes a whole number; got 'two'."),
    (["num_replicas="], "num_replicas takes a whole number; got ''."),
    (["train.steps=1.5"], "train.steps takes a whole number; got '1.5'."),
    (["model.hidden=[a]"], "model.hidden takes a list of whole numbers in brackets, as in [64,32]; got '[a]'."),
    (["model.hidden=[[3]]"], "model.hidden takes a list of whole numbers in brackets, as in [64,32]; got '[[3]]'."),
    (["faults=[{a:1}]"], "faults takes a list of words in brackets, as in [no_lost_updates]; got '[{'a': 1}]'."),
    (
        ["require=no_torn_reads"],
        "require takes a list of words in brackets, as in [no_lost_updates]; got 'no_torn_reads'.",
    ),
    (["train=3"], "train is a group of keys; got '3'. Set one of them, as in train.steps=VALUE."),
    (["train.seed=${nothing}"], "train.seed: Interpolation key 'nothing' not found."),
    (
        ["num_replicas=1,2"],
        "num_replicas=1,2 is a sweep: add -m to run every value, or write num_replicas=[1,2] for a list.",
    ),
    (
        ["steps"],
        "steps cannot be read: there is no '=' in it. Write KEY=VALUE, with quotes round special characters.",
    ),
    (["--bogus"], "unrecognized arguments: --bogus. --help lists the flags."),
    (["--run", "--multirun"], "--run and --multirun exclude each other. Give one of them."),
    (
        ["--experimental-rerun=config.pickle"],
        "--experimental-rerun is not supported. A verdict's run.command has what does its run again.",
    ),
    (["num_replicas=0"], "num_replicas must be between 1 and 64; got 0."),
    # What is wrong with every run of a sweep ends it before the first.
    (
        ["-m", "num_replicas=1,2", "train.stps=1"],
        f"train.stps {NOT_A_KEY} Did you mean 'train.steps'? --help lists the keys.",
    ),
    (["-m", "num_replicas=1,two"], "num_replicas takes a whole number; got 'two'."),
    (["-m", "strategy=threads,bogus"], "strategy must be one of ddp, mirrored, multi_worker, threads; got 'bogus'."),
    (["-m", "num_replicas=1,2", "train.steps=0"], "train.steps must be at least 1; got 0."),
    (["-m", "experiment=glob(nothing_*)"], "the sweep has no runs: a glob fits no option. --help lists them."),
    (
        ["-m", "num_replicas=1,2", "hydra.sweep.subdir=x"],
        "hydra.sweep.subdir=x is one folder for several runs. Leave it out, or name it by ${hydra.job.num}.",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[" ".join(arguments) for arguments, _ in MISTAKES])
def test_a_mistake_is_one_line_and_leaves_nothing(command: Command, arguments: list[str], message: str) -> None:
    done = command(*arguments)
    assert done.stderr == f"trainer: {message}\n"
    assert done.stdout == ""
    assert done.returncode == 2
    assert command.left() == []


@pytest.mark.parametrize(
    "arguments",
    [["num_replica=2"], ["num_replicas=0"], ["strategy=mirrored", "update_mode=locked"], ["--help"], ["show", "modes"]],
)
def test_an_answer_without_a_run_is_quick_and_loads_no_framework(command: Command, arguments: list[str]) -> None:
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "trainer", *arguments],
        cwd=command.folder,
        env=command.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    imported = process.stderr.read()
    process.stderr.close()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert imported_packages(imported) & (FRAMEWORKS | {"numpy"}) == set()
    # Not by the clock, which other tests' processes share: what it computes is what takes the time.
    assert used.ru_utime + used.ru_stime < LINE_SECONDS


def imported_packages(importtime: str) -> set[str]:
    """Top-level packages in what `-X importtime` has written."""
    return {name.partition(".")[0] for name in re.findall(r"^import time:.*\| +([\w.]+)$", importtime, re.MULTILINE)}


def test_help_names_every_group_option_and_key(command: Command) -> None:
    done = command("--help")
    assert done.returncode == 0
    assert done.stderr == ""
    words = set(re.findall(r"[\w.]+", done.stdout))
    options = {name for group in OPTIONS.values() for name in group}
    assert {*OPTIONS, *options, *keys()} <= words
    assert all(len(line) <= 120 for line in done.stdout.splitlines())


def test_show_modes_has_the_claims_of_every_mode(command: Command) -> None:
    lines = command("show", "modes").stdout.splitlines()
    rule = next(number for number, line in enumerate(lines) if line.startswith("─"))
    assert {word for name in COLUMNS for word in name.split("_")} <= set(" ".join(lines[:rule]).split())
    *rest, caption = lines[rule + 1 :]
    assert caption.startswith("update_mode._target_=MODULE.NAME brings one of your own")
    # A cell that is too wide goes on in the next line.
    rows = {line.split()[0]: line.split()[-len(COLUMNS) :] for line in rest if not line.startswith(" ")}
    assert rows == {
        mode.name: [
            "n/a" if name in mode.not_applicable else "yes" if name in mode.claims else "no" for name in COLUMNS
        ]
        for mode in MODES.values()
        if mode.name != "custom"
    }


def test_show_modes_breaks_no_name_in_two_on_a_narrow_terminal(command: Command) -> None:
    shown = command("show", "modes", COLUMNS="80").stdout
    assert set(MODES) - {"custom"} <= set(shown.split())
    assert "ONLY_FIRST_REPLICA" in shown.split()


def test_show_state_says_what_each_kind_of_state_is_held_by(command: Command) -> None:
    lines = command("show", "state").stdout.splitlines()
    rows = {line[:24].strip(): line for line in lines}
    assert "state.compile_ids" in rows["compiled-step identity"]
    assert "state.gradients" in rows["gradients"]
    assert "every update_mode" in rows["weights, optimizer slots"]


def test_show_guarantees_and_experiments_list_all_there_are(command: Command) -> None:
    assert {line.split()[0] for line in command("show", "guarantees").stdout.splitlines()[2:]} == set(GUARANTEES)
    shown = command("show", "experiments").stdout
    for name, text in experiments().items():
        assert text, f"{name} says nothing of itself"
        assert re.search(rf"^{name} +{re.escape(text)}", shown, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "came"), [([], "nothing."), (["mode"], "mode. Did you mean 'modes'?"), (["modes", "x"], "modes x.")]
)
def test_show_of_anything_else_is_one_line(command: Command, arguments: list[str], came: str) -> None:
    done = command("show", *arguments)
    tables = "modes, state, guarantees, experiments, bytecode"
    assert done.stderr.startswith(f"trainer: show takes one of {tables}; got {came}")
    assert done.stderr.count("\n") == 1
    assert done.returncode == 2


def test_cfg_shows_the_configuration_and_runs_nothing(command: Command) -> None:
    done = command("num_replicas=3", "--cfg", "job", "model=cnn")
    assert "num_replicas: 3" in done.stdout
    assert "normalization: batch" in done.stdout
    assert done.returncode == 0
    assert command.left() == []


@pytest.mark.slow
def test_a_threads_run_leaves_its_folder_and_never_imports_tensorflow(command: Command) -> None:
    done = command("hydra.run.dir=run", "train.steps=5", PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0, done.stderr
    run = command.folder / "run"
    assert {"verdict.json", "console.log", ".hydra"} <= {path.name for path in run.iterdir()}
    assert len(list(run.glob("events.out.tfevents.*"))) == 1
    assert verdict(run)["run"]["command"] == "python -m trainer train.steps=5"
    assert "upheld" in done.stdout.splitlines()[-1]
    # The run's process writes to its log what it imports.
    imported = imported_packages((run / "console.log").read_text(encoding="utf-8"))
    assert "torch" in imported
    assert "tensorflow" not in imported

    again = command("hydra.run.dir=run", "train.steps=5")
    assert again.stderr == (
        "trainer: hydra.run.dir=run already holds a run (verdict.json). "
        "Choose another folder with hydra.run.dir=FOLDER.\n"
    )
    assert again.returncode == 2


@pytest.mark.slow
def test_a_mirrored_run_fails_as_fail_on_says_and_never_imports_torch(command: Command) -> None:
    overrides = ["strategy=mirrored", "update_mode=unreduced", "train.steps=5", "fail_on=anomaly"]
    done = command(*overrides, PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 1, done.stderr
    (run,) = (command.folder / "outputs").glob("*/*")
    assert re.fullmatch(r"\d\d-\d\d-\d\d_mirrored_unreduced_2", run.name)
    assert verdict(run)["verdict"] == "anomaly"
    imported = imported_packages((run / "console.log").read_text(encoding="utf-8"))
    assert "tensorflow" in imported
    assert "torch" not in imported


@pytest.mark.slow
def test_a_folder_of_the_user_named_like_ours_hides_nothing(command: Command) -> None:
    for name in ("models.py", "data/__init__.py", "trainer.py", "random.py"):
        path = command.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("raise RuntimeError('not ours')")
    # From the installed entry point, as `python -m` itself looks in the working directory first.
    entry = "import sys; sys.path.pop(0); from trainer.__main__ import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", entry, "train.steps=2", "hydra.run.dir=run"],
        cwd=command.folder,
        env=command.environment(),
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 0, done.stderr + (command.folder / "run" / "console.log").read_text()


@pytest.mark.parametrize("folder", ["file/run", "file"])
def test_a_folder_that_cannot_be_made_is_one_line(command: Command, folder: str) -> None:
    (command.folder / "file").touch()
    done = command(f"hydra.run.dir={folder}")
    assert done.stderr.startswith(f"trainer: hydra.run.dir={folder} cannot be written: ")
    assert done.stderr.count("\n") == 1
    assert done.returncode == 2
    assert command.left() == ["file"]


def test_a_folder_that_holds_a_run_is_refused_whoever_made_it(command: Command) -> None:
    for trace in ("old/verdict.json", "board/events.out.tfevents.1.host", "sweep/0_threads_locked_2/verdict.json"):
        path = command.folder / trace
        path.parent.mkdir(parents=True)
        path.touch()
    before = command.left()
    assert "old already holds a run (verdict.json)" in command("hydra.run.dir=old").stderr
    assert "board already holds a run (events.out.tfevents.1.host)" in command("hydra.run.dir=board").stderr
    done = command("-m", "num_replicas=1,2", "hydra.sweep.dir=sweep")
    assert "sweep already holds a run (0_threads_locked_2/verdict.json)" in done.stderr
    assert done.returncode == 2
    assert command.left() == before


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "sweep.csv").open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.slow
def test_a_refused_combination_is_a_row_of_the_sweep(command: Command) -> None:
    # Flags may stand anywhere.
    done = command("train.steps=5", "-m", "strategy=mirrored,threads", "update_mode=locked", "hydra.sweep.dir=sweep")
    assert done.returncode == 0, done.stderr
    refused, ran = rows(command.folder / "sweep")
    assert refused["folder"] == "0_mirrored_locked_2"
    assert refused["error.kind"] == "refused"
    assert refused["error.message"].startswith("update_mode=locked needs strategy=threads")
    assert (ran["folder"], ran["verdict"], ran["updates_kept"]) == ("1_threads_locked_2", "upheld", "10")
    assert done.stdout.splitlines()[-1] == "tensorboard --logdir sweep"


def test_a_sweep_of_which_every_run_is_refused_has_status_2(command: Command) -> None:
    done = command("-m", "strategy=mirrored", "update_mode=locked,overwrite", "hydra.sweep.dir=sweep")
    assert done.returncode == 2
    assert [row["error.kind"] for row in rows(command.folder / "sweep")] == ["refused", "refused"]


@pytest.mark.slow
def test_a_sweep_under_joblib_has_the_same_rows_and_the_worst_status(command: Command) -> None:
    done = command(
        "-m",
        "strategy=mirrored",
        "update_mode=all_reduce,first_replica,locked",
        "train.steps=5",
        "fail_on=anomaly",
        "hydra/launcher=joblib",
        "hydra.launcher.n_jobs=2",
        "hydra.sweep.dir=sweep",
    )
    assert done.returncode == 1, done.stderr
    verdicts = [(row["folder"], row["verdict"]) for row in rows(command.folder / "sweep")]
    assert verdicts == [
        ("0_mirrored_all_reduce_2", "upheld"),
        ("1_mirrored_first_replica_2", "anomaly"),
        ("2_mirrored_locked_2", "broken"),
    ]


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_no_arguments_are_the_tour(command: Command) -> None:
    process = subprocess.run(
        [sys.executable, "-m", "trainer"],
        cwd=command.folder,
        env=command.environment(),
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    (sweep,) = (command.folder / "multirun").glob("*/*")
    found = [(row["strategy"], row["update_mode"], row["verdict"]) for row in rows(sweep)]
    assert found == [
        ("threads", "all_reduce", "upheld"),
        ("threads", "locked", "upheld"),
        ("threads", "overwrite", "anomaly"),
        ("mirrored", "all_reduce", "upheld"),
        ("mirrored", "unreduced", "anomaly"),
    ]
    assert process.stdout.splitlines()[-1] == f"tensorboard --logdir {sweep.relative_to(command.folder)}"

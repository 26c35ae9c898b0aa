"""Two runs beside each other: what differs, the first step at which they part, and the exit status."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from command import ROOT
from report_factory import SAFE, UNSAFE, complete, make_config, make_record, make_verdict

from trainer.audit import history, verdict
from trainer.report.compare import HISTORY, Parting, compare
from trainer.report.tensorboard import RunEvents

SCRIPT = ROOT / "scripts" / "compare_runs.py"


def add(
    folder: Path, mode: str = SAFE, *, seed: int = 0, part: int | None = None, kept: int = 90, full: bool = False
) -> Path:
    """A run of 45 steps; `part` is the step at which replica 1's losses become other ones."""
    config = make_config(mode)
    record = make_record(config, seed=seed)
    complete(record, 45)
    if part is not None:
        record.replicas[1].losses[part:] += np.float32(0.5)
    folder.mkdir(parents=True)
    events = RunEvents(config, folder)
    told = make_verdict(config, record, kept=kept)
    told.final_parameters_sha256 = f"{seed}{part}{mode}".ljust(64, "0")
    events.finished(record, told)
    events.close()
    verdict.save(told, folder)
    if full:
        history.save(record, folder)
    return folder


def losses(found: tuple[Parting, ...]) -> dict[str, tuple[int | None, int | None]]:
    return {each.name: (each.before, each.first) for each in found if each.name.startswith("train/loss")}


def test_the_same_run_twice_is_the_same(tmp_path: Path) -> None:
    found = compare(add(tmp_path / "a"), add(tmp_path / "b"))
    assert found.same
    assert (found.config, found.guarantees, found.results) == ({}, {}, {})


def test_where_only_some_steps_have_points_it_says_between_which_they_part(tmp_path: Path) -> None:
    found = compare(add(tmp_path / "a"), add(tmp_path / "b", part=17))
    assert not found.same
    assert losses(found.partings) == {
        "train/loss/replica_0": (None, None),
        "train/loss/replica_1": (10, 20),
        "train/loss": (10, 20),
    }
    (parting,) = (each for each in found.partings if each.name == "train/loss/replica_1")
    assert parting.largest[0] == pytest.approx(0.5, abs=1e-6)


def test_with_both_histories_it_names_the_very_step(tmp_path: Path) -> None:
    found = compare(add(tmp_path / "a", full=True), add(tmp_path / "b", part=17, full=True))
    (first,) = (each for each in found.partings if each.name == "train/loss/replica_1")
    assert (first.source, first.before, first.first, first.points) == (HISTORY, 16, 17, 45)


def test_one_history_is_not_enough(tmp_path: Path) -> None:
    found = compare(add(tmp_path / "a", full=True), add(tmp_path / "b", part=17))
    assert losses(found.partings)["train/loss/replica_1"] == (10, 20)


def test_another_mode_differs_in_configuration_guarantees_and_updates_kept(tmp_path: Path) -> None:
    found = compare(add(tmp_path / "a"), add(tmp_path / "b", UNSAFE, kept=45))
    assert found.config["run.update_mode"] == (SAFE, UNSAFE)
    assert found.guarantees["no_lost_updates"] == ("upheld", "anomaly")
    assert found.results["updates_kept"] == ("90", "45")
    assert found.results["verdict"] == ("upheld", "anomaly")


def test_two_runs_that_diverged_alike_are_the_same(tmp_path: Path) -> None:
    for name in "ab":
        add(tmp_path / name, full=True)
        with np.load(tmp_path / name / history.FILE_NAME) as arrays:
            changed = {key: arrays[key].copy() for key in arrays}
        changed["losses"][:, 9:] = np.nan
        np.savez(tmp_path / name / history.FILE_NAME, **changed)
    assert compare(tmp_path / "a", tmp_path / "b").same


def test_a_run_that_broke_is_compared_as_far_as_it_came(tmp_path: Path) -> None:
    add(tmp_path / "a")
    broken = add(tmp_path / "b", part=17)
    found = json.loads((broken / verdict.FILE_NAME).read_text())
    error = {"kind": "crash", "message": "no", "replica": 1, "step": 40}
    found |= {"verdict": "broken", "error": error, "guarantees": [], "anomalies": [], "final_parameters_sha256": None}
    (broken / verdict.FILE_NAME).write_text(json.dumps(found))
    (events,) = broken.glob("events.*")
    # What is left of a record that was being written.
    events.write_bytes(events.read_bytes()[:-9])
    came = compare(tmp_path / "a", broken)
    assert came.results["error"] == ("-", "crash in replica 1 at step 40: no")
    assert losses(came.partings)["train/loss/replica_1"] == (10, 20)
    assert came.guarantees == {}


def test_runs_with_nothing_in_common_are_not_called_the_same(tmp_path: Path) -> None:
    for name in "ab":
        folder = add(tmp_path / name)
        next(folder.glob("events.*")).unlink()
        path = folder / verdict.FILE_NAME
        path.write_text(json.dumps({**json.loads(path.read_text()), "final_parameters_sha256": None}))
    found = compare(tmp_path / "a", tmp_path / "b")
    assert not found.compared
    assert not found.same


def script(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    plain = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "FORCE_COLOR")}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        cwd=folder,
        env=plain,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )


def test_the_script_says_where_they_part_and_draws_it_beside_the_first(tmp_path: Path) -> None:
    add(tmp_path / "a")
    add(tmp_path / "b", part=17)
    done = script(tmp_path, "a", "b")
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.splitlines()[-2:] == [
        "different: they part after step 10, by step 20, first in train/loss/replica_1.",
        "a_beside_b.png",
    ]
    assert "audit=full keeps every step's" in done.stdout
    assert (tmp_path / "a_beside_b.png").read_bytes().startswith(b"\x89PNG")


def test_the_script_ends_with_0_where_nothing_differs(tmp_path: Path) -> None:
    add(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    done = script(tmp_path, "a", "b", "--output", "plot.png")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2].startswith("the same: the final parameters have the same bits and ")
    assert (tmp_path / "plot.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "nowhere"], "nowhere/verdict.json is not there: nowhere is no folder."),
        (["empty", "a"], "empty/verdict.json is not there; give a run's folder."),
        (["a", "odd"], "odd/verdict.json cannot be read: its schema is 7; this version reads 1."),
        (["a"], "the following arguments are required: B. --help says what it takes."),
        (["a", "a", "--output", "no/x.png"], "no/x.png cannot be written: No such file or directory. --output says"),
    ],
    ids=" ".join,
)
def test_bad_input_is_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    add(tmp_path / "a")
    (tmp_path / "empty").mkdir()
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / verdict.FILE_NAME).write_text('{"schema": 7}')
    done = script(tmp_path, *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"compare_runs: {message}")
    assert done.stderr.count("\n") == 1

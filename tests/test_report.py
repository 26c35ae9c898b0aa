"""`python -m trainer report FOLDER...` as a process of its own."""

from __future__ import annotations

import csv
import io
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from command import ROOT, Command
from report_factory import SAFE, UNSAFE, add_broken, add_run
from rich.console import Console

from trainer.report import table
from trainer.report.rows import Row

# What a line may take of the processor's time, interpreter and all.
LINE_SECONDS = 1.5


def folders(path: Path) -> list[str]:
    """The runs that a CSV file has, in its order."""
    with path.open(encoding="utf-8", newline="") as stream:
        return [row["folder"] for row in csv.DictReader(stream)]


@pytest.fixture
def here(command: Command) -> Path:
    """A working directory with two sweeps below one folder."""
    add_run(command.folder / "all" / "one", 0, SAFE)
    add_run(command.folder / "all" / "one", 1, UNSAFE, kept=45)
    add_run(command.folder / "all" / "two", 0, SAFE, replicas=4)
    return command.folder


def test_a_sweeps_files_are_made_again_in_its_folder(command: Command, here: Path) -> None:
    done = command("report", "all/one")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-4:] == [
        "all/one/sweep.csv",
        "all/one/sweep.png",
        "all/one/report.html",
        "tensorboard --logdir all/one",
    ]
    assert folders(here / "all/one/sweep.csv") == ["0_threads_locked_2", "1_threads_overwrite_2"]
    assert (here / "all/one/sweep.png").read_bytes().startswith(b"\x89PNG")
    assert "anomaly" in done.stdout
    assert "1    overwritten_update 45 of 90" in [line.rstrip() for line in done.stdout.splitlines()]
    # Once more over its own files, to the same end.
    before = (here / "all/one/sweep.csv").read_bytes()
    assert command("report", "all/one").stdout == done.stdout
    assert (here / "all/one/sweep.csv").read_bytes() == before
    # What TensorBoard shows first.
    (page,) = (here / "all/one").glob("events.out.tfevents.*")
    assert b"1 of 2 runs were hurt" in page.read_bytes()


def test_runs_are_found_however_deep_they_lie(command: Command, here: Path) -> None:
    done = command("report", "all")
    assert done.returncode == 0
    assert folders(here / "all/sweep.csv") == [
        "one/0_threads_locked_2",
        "one/1_threads_overwrite_2",
        "two/0_threads_locked_4",
    ]
    assert {"a: one", "b: two"} <= set(done.stdout.splitlines())


def test_one_run_is_a_table_of_one(command: Command, here: Path) -> None:
    assert command("report", "all/two/0_threads_locked_4").returncode == 0
    assert folders(here / "all/two/0_threads_locked_4/sweep.csv") == ["."]
    assert not list((here / "all/two/0_threads_locked_4").glob("events.out.tfevents.*"))


def test_the_files_of_several_folders_go_to_the_working_directory(command: Command, here: Path) -> None:
    done = command("report", "all/two", "all/one", "all/two/")
    assert done.returncode == 0
    assert done.stdout.splitlines()[-4:] == [
        "sweep.csv",
        "sweep.png",
        "report.html",
        "tensorboard --logdir_spec two:all/two,one:all/one",
    ]
    assert folders(here / "sweep.csv") == [
        "all/two/0_threads_locked_4",
        "all/one/0_threads_locked_2",
        "all/one/1_threads_overwrite_2",
    ]
    assert not list((here / "all").rglob("sweep.*"))
    assert not list(here.rglob("events.out.tfevents.*"))


def test_a_folder_and_one_below_it_are_one(command: Command, here: Path) -> None:
    done = command("report", "all/one", "all")
    assert done.stdout.splitlines()[-1] == "tensorboard --logdir all"
    assert len(folders(here / "all/sweep.csv")) == 3


def test_output_says_where_the_files_go(command: Command, here: Path) -> None:
    done = command("report", "all/one", "--output", "new/place")
    assert done.returncode == 0
    names = ["report.html", "sweep.csv", "sweep.png"]
    assert sorted(done.stdout.splitlines()[-4:-1]) == [f"new/place/{name}" for name in names]
    assert sorted(path.name for path in (here / "new/place").iterdir()) == names
    assert not list((here / "all").rglob("sweep.*"))
    assert not list(here.rglob("events.out.tfevents.*"))


def test_test_results_are_written_where_they_are_asked_for(command: Command, here: Path) -> None:
    done = command("report", "all/one", "--junit", "new/results.xml")
    assert (done.returncode, done.stderr) == (0, "")
    assert "new/results.xml" in done.stdout.splitlines()
    suites = ElementTree.parse(here / "new/results.xml").getroot()
    assert [suite.get("name") for suite in suites] == ["0_threads_locked_2", "1_threads_overwrite_2"]


def test_test_results_that_cannot_be_written_are_one_line(command: Command, here: Path) -> None:
    done = command("report", "all/one", "--junit", "all")
    assert done.returncode == 2
    assert done.stderr == "trainer: all cannot be written: Is a directory.\n"


def test_runs_that_broke_are_rows_and_no_failure_of_the_report(command: Command) -> None:
    add_broken(command.folder / "sweep", 0, "crash", "replica 1 raised ValueError: no")
    done = command("report", "sweep")
    assert done.returncode == 0
    assert "0: crash: replica 1 raised ValueError: no" in done.stdout
    assert "no sweep.png: no run that ended by itself has numbers to draw." in done.stdout
    assert not (command.folder / "sweep" / "sweep.png").exists()


MISTAKES: list[tuple[list[str], str]] = [
    ([], "report takes folders of runs or sweeps, as in `python -m trainer report multirun`; got none."),
    (["nowhere"], "report: nowhere does not exist."),
    (["all", "nowhere"], "report: nowhere does not exist."),
    (["empty"], "report: empty holds no run: no verdict.json in or below it."),
    (["all", "empty"], "report: empty holds no run: no verdict.json in or below it."),
    (["file"], "report: file is a file; give the folder that holds it."),
    (["all", "--output=file"], "report: file is a file; give a folder as --output."),
    (["all", "--output=file/below"], "file/below cannot be written: Not a directory. --output says where else."),
    (["all", "--output"], "report: argument --output: expected one argument."),
    (["all", "--outptu=x"], "report: unrecognized arguments: --outptu=x."),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[" ".join(arguments) for arguments, _ in MISTAKES])
def test_a_mistake_is_one_quick_line_and_leaves_nothing(
    command: Command, here: Path, arguments: list[str], message: str
) -> None:
    (here / "empty").mkdir()
    (here / "file").touch()
    before = command.left()
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer", "report", *arguments],
        cwd=here,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    with process.stdout, process.stderr:
        errors, output = process.stderr.read(), process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert errors.startswith(f"trainer: {message}")
    assert errors.count("\n") == 1
    assert output == ""
    assert process.returncode == 2
    assert command.left() == before
    # Not by the clock, which other tests' processes share.
    assert used.ru_utime + used.ru_stime < LINE_SECONDS


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_must_not_be_written_to_is_one_line(command: Command, here: Path) -> None:
    (here / "all").chmod(0o555)
    done = command("report", "all")
    assert done.stderr == "trainer: all cannot be written: Permission denied. --output says where else.\n"
    assert done.returncode == 2


def test_help_says_where_the_files_go(command: Command) -> None:
    done = command("report", "--help")
    said = " ".join(done.stdout.split())
    assert done.returncode == 0
    assert "python -m trainer report FOLDER... [--output FOLDER] [--junit FILE]" in said
    assert "Default: FOLDER itself; with several, the working directory" in said


def test_small_workloads_are_told_apart_by_name_mode_and_where_that_is_not_enough_by_experiment() -> None:
    def row(job: str, experiment: str, workload: str, mode: str | None = None) -> Row:
        command = f"python -m trainer experiment={experiment}"
        run = {"strategy": "threads", "workload": workload, "update_mode": mode, "num_replicas": 2, "command": command}
        return Row(job, experiment, "upheld", run=run)

    def shown(*rows: Row) -> list[str]:
        output = io.StringIO()
        table.show(list(rows), Console(file=output, width=200))
        return output.getvalue().splitlines()

    apart = shown(row("0", "counter_rebind", "counter", "overwrite"), row("1", "tour_3", "train", "overwrite"))
    assert "experiment" not in apart[0]
    assert [line.split()[2:4] for line in apart[2:4]] == [["counter", "overwrite"], ["overwrite", "2"]]
    alike = shown(row("0", "bank_bare_lock", "bank"), row("1", "bank_synchronized", "bank"))
    assert "experiment" in alike[0]
    assert "bank_bare_lock" in alike[2]
    assert "bank_synchronized" in alike[3]

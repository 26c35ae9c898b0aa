"""Sweeps whose runs other programs start: submitit's processes on this machine, and its jobs under Slurm."""

from __future__ import annotations

import csv
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import slurm_stand_in
from command import Command, Running, verdict

from trainer.follower import Follower

ENDLESS = "train.steps=10000000"
# A worker looks for its command every half second, and its run then has as long as after a signal.
STOP_SECONDS = 3.0
submitit = pytest.mark.skipif(
    importlib.util.find_spec("submitit") is None, reason="the extra 'slurm' is not installed: no submitit"
)


def rows(folder: Path) -> list[tuple[str, str]]:
    with (folder / "sweep.csv").open(encoding="utf-8", newline="") as stream:
        return [(row["folder"], row["error.kind"] or row["verdict"]) for row in csv.DictReader(stream)]


@submitit
@pytest.mark.slow
def test_a_sweep_under_submitit_has_its_rows_its_progress_and_its_status(command: Command) -> None:
    done = command(
        "-m",
        "strategy=threads,mirrored",
        "update_mode=locked",
        "train.steps=5",
        "require=[fresh_gradients]",
        "num_replicas=1",
        "hydra/launcher=submitit_local",
        "hydra.sweep.dir=sweep",
    )
    assert done.returncode == 0, done.stderr
    assert rows(command.folder / "sweep") == [("0_threads_locked_1", "upheld"), ("1_mirrored_locked_1", "refused")]
    # The refused one is through first: it starts nothing.
    assert done.stdout.splitlines()[:2] == ["[1/2] 1_mirrored_locked_1: refused", "[2/2] 0_threads_locked_1: upheld"]
    assert done.stderr.startswith("trainer: sweep/1_mirrored_locked_1 is refused: update_mode=locked needs strategy=")
    assert done.stderr.count("\n") == 1
    assert done.stdout.splitlines()[-1] == "tensorboard --logdir sweep"


def endless(command: Command) -> Running:
    """Two endless runs that have begun to train."""
    launcher = ["hydra/launcher=submitit_local", "hydra.sweep.dir=sweep"]
    running = command.start("-m", "num_replicas=1,2", ENDLESS, *launcher)
    running.wait_for(lambda: len(running.training()) == 2)
    return running


@submitit
@pytest.mark.slow
@pytest.mark.parametrize(("number", "group"), [(signal.SIGINT, True), (signal.SIGTERM, False)])
def test_a_signal_ends_a_sweep_under_submitit(command: Command, number: signal.Signals, group: bool) -> None:
    running = endless(command)
    began = running.training()
    ended = running.end_by(number, group=group)
    assert ended.status == 128 + number
    assert ended.left == []
    assert ended.seconds < STOP_SECONDS
    for run in began:
        assert verdict(run)["error"]["kind"] == "interrupted"
        assert number.name in verdict(run)["error"]["message"]
    assert "Traceback" not in ended.errors
    assert "tensorboard --logdir sweep" in ended.output


@submitit
@pytest.mark.slow
def test_nothing_is_left_of_a_sweep_under_submitit_that_is_killed(command: Command) -> None:
    running = endless(command)
    began = running.training()
    ended = running.end_by(signal.SIGKILL)
    assert ended.left == []
    assert ended.seconds < STOP_SECONDS
    for run in began:
        assert verdict(run)["error"]["message"] == "parent process ended"


@submitit
@pytest.mark.slow
def test_a_sweep_under_submitit_goes_on_when_a_worker_is_killed(command: Command) -> None:
    launcher = ["hydra/launcher=submitit_local", "hydra.sweep.dir=sweep"]
    running = command.start("-m", "train.steps=10000000,5", "num_replicas=1", *launcher)
    endless_run, short = command.folder / "sweep" / "0_threads_all_reduce_1", "1_threads_all_reduce_1"
    running.wait_for(lambda: endless_run in running.training())
    below = psutil.Process(running.process.pid).children(recursive=True)
    (run,) = (each for each in running.runs() if str(endless_run.name) in " ".join(each.cmdline()))
    run.parent().kill()
    output, errors = running.process.communicate(timeout=50)
    assert running.process.returncode == 3
    assert "trainer: a sweep's worker process was killed. Other runs go on.\n" in errors
    assert "Traceback" not in errors
    assert dict(rows(command.folder / "sweep")) == {endless_run.name: "interrupted", short: "upheld"}
    assert "tensorboard --logdir sweep" in output
    assert psutil.wait_procs(below, 5)[1] == []


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of commands that find Slurm's; whatever a failed test leaves running is ended."""
    environment = slurm_stand_in.install(tmp_path / "slurm")
    yield environment
    for path in Path(environment["STAND_IN"]).iterdir():
        pid = int(path.read_text())
        if slurm_stand_in.running(pid):
            os.killpg(pid, signal.SIGKILL)


@submitit
@pytest.mark.slow
def test_a_sweep_under_slurm_is_an_array_of_jobs_that_ask_for_what_the_option_says(
    command: Command, slurm: dict[str, str]
) -> None:
    done = command(
        *("-m", "update_mode=locked", "strategy=threads,mirrored", "train.steps=5", "hydra.sweep.dir=sweep"),
        *("hydra/launcher=submitit_slurm", "hydra.launcher.partition=short", "hydra.launcher.mem_gb=4"),
        **slurm,
    )
    assert done.returncode == 0, done.stderr
    assert rows(command.folder / "sweep") == [("0_threads_locked_2", "upheld"), ("1_mirrored_locked_2", "refused")]
    assert "[2/2] 0_threads_locked_2: upheld" in done.stdout.splitlines()
    script, *_ = (command.folder / "sweep" / ".submitit").rglob("*submission*.sh")
    asked = set(re.findall(r"^#SBATCH (\S+)$", script.read_text(), re.MULTILINE))
    assert {
        *("--array=0-1%2", "--cpus-per-task=2", "--nodes=1", "--ntasks-per-node=1", "--time=240", "--signal=USR2@120"),
        *("--partition=short", "--mem=4GB", "--job-name=trainer", "--no-requeue"),
    } <= asked


@submitit
@pytest.mark.slow
def test_jobs_go_on_without_their_command_and_end_well_when_slurm_asks_them_to(
    command: Command, slurm: dict[str, str]
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer", "-m", ENDLESS, "hydra/launcher=submitit_slurm", "hydra.sweep.dir=sweep"],
        cwd=command.folder,
        env=command.environment(**slurm),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    running = Running(process, command.folder)
    (run,) = running.wait_for(running.training)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "trainer: 0 runs have ended; jobs of the others may go on. `scancel 1000` ends them; " in errors
    assert "the run is still going on, or was killed with its parent" in " ".join(output.split())
    # Nobody has said how a run ended that has not.
    assert not (run / "verdict.json").exists()
    job = psutil.Process(int((Path(slurm["STAND_IN"]) / "1000").read_text()))
    below = [job, *job.children(recursive=True)]
    (worker,) = (each for each in below if "submitit.core._submit" in each.cmdline())
    worker.send_signal(signal.SIGUSR2)
    assert psutil.wait_procs(below, 10)[1] == []
    found = verdict(run)
    assert (found["error"]["kind"], found["error"]["message"]) == ("interrupted", "terminated (SIGTERM)")
    assert found["error"]["step"] > 0


@pytest.mark.skipif(
    importlib.util.find_spec("ray") is None,
    reason="the extra 'ray' is not installed; it needs an environment of its own",
)
def test_rays_option_composes_on_the_plugins_schema(command: Command) -> None:
    done = command(
        "hydra/launcher=ray", "hydra.launcher.ray.init.address=auto", "--cfg", "hydra", "-p", "hydra.launcher"
    )
    assert done.returncode == 0, done.stderr
    assert "_target_: hydra_plugins.hydra_ray_launcher.ray_launcher.RayLauncher" in done.stdout
    assert {"address: auto", "num_cpus: 2", "max_retries: 0"} <= {line.strip() for line in done.stdout.splitlines()}


def without(*packages: str) -> str:
    """A program that is `trainer` where these packages are not installed."""
    return (
        "import sys, pkgutil, hydra_plugins\n"
        f"gone = {packages!r}\n"
        "found = pkgutil.walk_packages\n"
        "pkgutil.walk_packages = lambda *given, **named: (\n"
        "    each for each in found(*given, **named) if not each.name.startswith(gone))\n"
        "from trainer.__main__ import main\n"
        "sys.exit(main())\n"
    )


@pytest.mark.parametrize(
    ("launcher", "install"),
    [
        ("submitit_local", "pip install -c constraints.txt -e '.[slurm]' in the checkout."),
        ("submitit_slurm", "pip install -c constraints.txt -e '.[slurm]' in the checkout."),
        ("ray", "pip install -e '.[ray]' in the checkout in an environment of its own."),
    ],
)
def test_a_launcher_that_is_not_installed_is_one_line_with_the_command(
    command: Command, launcher: str, install: str
) -> None:
    program = without("hydra_plugins.hydra_submitit_launcher", "hydra_plugins.hydra_ray_launcher")
    done = subprocess.run(
        [sys.executable, "-c", program, "-m", f"hydra/launcher={launcher}"],
        cwd=command.folder,
        env=command.environment(),
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.stderr == f"trainer: hydra/launcher={launcher} is not installed: {install}\n"
    assert done.returncode == 2
    assert command.left() == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(
            ["hydra/launcher=submitit_local"],
            "hydra/launcher=submitit_local starts the runs of a sweep: add -m, also for one run.",
            marks=submitit,
        ),
        (
            ["hydra/launcher=joblib"],
            "hydra/launcher=joblib starts the runs of a sweep: add -m, also for one run.",
        ),
        pytest.param(
            ["-m", "hydra/launcher=submitit_slurm", "train.steps=5"],
            "hydra/launcher=submitit_slurm needs Slurm's commands, and sbatch and srun cannot be found on the PATH. "
            "Start it on a machine that submits jobs, or take hydra/launcher=submitit_local.",
            marks=submitit,
        ),
    ],
)
def test_a_launcher_that_cannot_start_this_is_one_line(command: Command, arguments: list[str], message: str) -> None:
    done = command(*arguments, PATH="/usr/bin:/bin")
    assert done.stderr == f"trainer: {message}\n"
    assert done.returncode == 2
    assert command.left() == []


def test_a_follower_tells_each_verdict_once_and_the_last_ones_when_it_ends(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def end(name: str, text: str) -> None:
        (tmp_path / name).mkdir()
        (tmp_path / name / "verdict.json").write_text(text)

    follower = Follower(tmp_path, 3)
    end("0_a", '{"verdict": "upheld", "error": null}')
    assert_soon(lambda: "[1/3] 0_a: upheld\n" in capsys.readouterr().out)
    end("1_b", '{"verdict": "broken", "error": {"kind": "crash", "message": "it fell"}}')
    follower.end()
    told = capsys.readouterr()
    assert told.out == "[2/3] 1_b: broken\n"
    assert told.err == f"trainer: {tmp_path / '1_b'} is broken: crash: it fell\n"


def assert_soon(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)

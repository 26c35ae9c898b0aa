"""Several processes of one run: who starts them, who is told what, and how they end together."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from command import Command, verdict

from trainer import children, processes
from trainer.audit.verdict import Error
from trainer.children import Child
from trainer.config import OPTIONS, Audit, Config, ConfigError, LocalSteps, MixedFloat16, Processes, Strategy, Train
from trainer.folders import claim, settle, take_over
from trainer.processes import MEETING, Place, as_launched, environment, folder_of, here, launched, to_start
from trainer.pulse import pulse_of
from trainer.rules import validate

HERE = Path(__file__).resolve().parent
DDP = Config(strategy=Processes())
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
# Everything has stopped within this.
STOP_SECONDS = 2.5


def test_a_launcher_says_who_this_is_and_how_many_there_are() -> None:
    place = launched(DDP, {**TORCHRUN, "TORCHELASTIC_RESTART_COUNT": "2"})
    assert place == Place(3, 4, 1, 2, launched=True, restarts=2)
    assert launched(DDP, {}) is None
    assert launched(Config(), TORCHRUN) is None
    with pytest.raises(ConfigError, match=r"^the environment says RANK=x, WORLD_SIZE=4, which launchers set to whole"):
        launched(DDP, {"RANK": "x", "WORLD_SIZE": "4"})


def test_as_many_processes_are_taken_as_were_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    assert as_launched(DDP) is DDP
    assert [place.rank for place in to_start(DDP)] == [0, 1]
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    taken = as_launched(DDP)
    assert (taken.num_processes, taken.replicas_in_all, processes.local_size(taken)) == (4, 8, 2)
    assert [place.rank for place in to_start(taken)] == [3]
    with pytest.raises(ConfigError, match=r"^strategy\.num_processes=3 differs from WORLD_SIZE=4, the processes that"):
        as_launched(Config(strategy=Processes(num_processes=3)))


def test_a_process_knows_its_place_by_what_it_was_started_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (*TORCHRUN, MEETING):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment(DDP, to_start(DDP)[1], tmp_path).items():
        monkeypatch.setenv(name, value)
    assert (here(DDP).rank, here(DDP).size, here(DDP).launched) == (1, 2, False)
    assert processes.hosted(DDP) == range(2, 4)
    # It starts nobody itself.
    assert launched(DDP) is None
    assert here(Config()) == Place()
    assert environment(Config(), Place(), tmp_path) == {}


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"strategy": Processes(num_processes=0)}, "strategy.num_processes must be between 1 and 64; got 0."),
        ({"strategy": Processes(num_processes=65)}, "strategy.num_processes must be between 1 and 64; got 65."),
        (
            {"update_mode": OPTIONS["update_mode"]["overwrite"]},
            "update_mode=overwrite needs strategy=threads: processes share no copy. strategy=ddp takes all_reduce, "
            "local_steps.",
        ),
        (
            {"strategy": Strategy("threads"), "update_mode": LocalSteps()},
            "update_mode=local_steps needs strategy=ddp: it averages the copies of processes. strategy=threads takes",
        ),
        ({"update_mode": LocalSteps(average_every=0)}, "update_mode.average_every must be at least 1; got 0."),
        ({"audit": Audit(digest_every=0)}, "audit.digest_every must be at least 1; got 0."),
        (
            {"update_mode": LocalSteps(), "precision": MixedFloat16()},
            "precision=mixed_float16 does not go with update_mode=local_steps: processes would have loss scales of",
        ),
        ({"schedule": OPTIONS["schedule"]["search"]}, "schedule=search does not go with strategy=ddp: no schedule"),
        ({"train": Train(evaluators=1)}, "train.evaluators=1 does not go with strategy=ddp, whose replicas all train."),
        ({"train": Train(engine="native")}, "train.engine=native needs strategy=threads and workload=train"),
        ({"audit": OPTIONS["audit"]["full"]}, "audit.trace_steps=20 does not go with strategy=ddp, whose processes"),
        ({"audit": OPTIONS["audit"]["profile"]}, "audit.trace_steps=200 does not go with strategy=ddp, whose"),
        ({"workload": OPTIONS["workload"]["bank"]}, "workload=bank needs strategy=threads: "),
        (
            {"state": OPTIONS["state"]["safe"].__class__(cursor="shared_iterator")},
            "state.cursor=shared_iterator needs strategy=threads or mirrored or multi_worker: strategy=ddp takes what",
        ),
        (
            {"train": Train(batch_size=400)},
            "train.batch_size=400 x num_replicas=2 x strategy.num_processes=2 is a joint batch of 1600 samples, but",
        ),
    ],
)
def test_what_several_processes_cannot_have_is_told_in_one_line(broken: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as told:
        validate(Config(**{"strategy": Processes(), **broken}))
    assert str(told.value).startswith(message)
    assert "\n" not in str(told.value)


def test_what_naive_stands_for_is_safe_in_several_processes() -> None:
    for preset in ("safe", "naive"):
        for mode in ("all_reduce", "local_steps"):
            validate(
                Config(strategy=Processes(), state=OPTIONS["state"][preset], update_mode=OPTIONS["update_mode"][mode])
            )


def _child(folder: Path, rank: int, body: str, size: int = 2) -> Child:
    own = folder_of(folder, rank)
    own.mkdir(parents=True, exist_ok=True)
    (own / children.LOG_NAME).write_text("it said something\n")
    process = subprocess.Popen([sys.executable, "-c", body], stdin=subprocess.PIPE, start_new_session=True)
    pulse = pulse_of(60.0)
    pulse.watch(process)  # which finds at once that nobody holds the other end
    return Child(process, Place(rank, size), own, pulse)


ENDLESS = "import time; time.sleep(60)"


def test_a_process_that_is_killed_is_told_of_and_ends_the_others(tmp_path: Path) -> None:
    started = [_child(tmp_path, rank, ENDLESS) for rank in range(2)]
    started[1].process.kill()
    began = time.monotonic()
    error = children.watch(started, 0.0)
    children.end(started)
    assert time.monotonic() - began < 1
    assert error is not None
    assert (error.kind, error.message) == (
        "killed",
        "process 1: killed by SIGKILL, which is what the system does when memory runs out; the last line of "
        "console.log: it said something",
    )
    assert [child.process.returncode for child in started] == [-signal.SIGKILL] * 2


def test_of_several_that_fail_the_one_that_was_killed_is_to_blame(tmp_path: Path) -> None:
    started = [_child(tmp_path, 0, "raise SystemExit(3)"), _child(tmp_path, 1, ENDLESS)]
    started[1].process.kill()
    for child in started:
        child.process.wait(20)
    error = children.watch(started, 0.0)
    children.end(started)
    assert error is not None
    assert error.message.startswith("process 1: killed by SIGKILL")


def test_a_process_that_fails_is_told_of_by_its_own_verdict(tmp_path: Path) -> None:
    started = [_child(tmp_path, 0, "import time; time.sleep(0.5)"), _child(tmp_path, 1, "raise SystemExit(3)")]
    settle(DDP, folder_of(tmp_path, 1), "python -m trainer", Error("crash", "process 1: a bad batch", 2, 7))
    error = children.watch(started, 0.0)
    children.end(started)
    assert error == Error("crash", "process 1: a bad batch", 2, 7)


@pytest.mark.parametrize("seconds", [0.0, 0.3])
def test_processes_end_well_or_when_their_time_is_up(tmp_path: Path, seconds: float) -> None:
    body = ENDLESS if seconds else "pass"
    started = [_child(tmp_path, rank, body) for rank in range(2)]
    error = children.watch(started, seconds)
    children.end(started)
    assert error == (Error("timeout", "not done after train.timeout_seconds=0.3") if seconds else None)


def test_a_folder_is_taken_over_where_a_launcher_starts_a_run_again(tmp_path: Path) -> None:
    settle(DDP, tmp_path, "python -m trainer", Error("killed", "the first time"))
    with pytest.raises(ConfigError, match="already holds a run"):
        claim(tmp_path, "hydra.run.dir", shared=True)
    take_over(tmp_path, 1, goes_on=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["verdict_before_restart_1.json"]


def _bring(command: Command) -> list[str]:
    """The model that fails, and what lets it: its Python code has to run in every step."""
    shutil.copy(HERE / "failing_model.py", command.folder)
    return ["model._target_=failing_model.build", "train.capture=never", "strategy=ddp", "hydra.run.dir=run"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fails", "kind", "message"),
    [
        ("raise", "crash", r"process 1: replica [23] raised ValueError: a bad batch"),
        ("kill", "killed", r"process 1: killed by SIGKILL, which is what the system does when memory runs out.*"),
        ("hang", "deadlock", r"process 1: no replica finished a step for 2 s \(watchdog\.seconds\): .*"),
    ],
)
def test_a_process_that_fails_ends_the_others_with_the_reason(
    command: Command, fails: str, kind: str, message: str
) -> None:
    brought = [*_bring(command), "train.steps=1000000", "watchdog.seconds=2"]
    done = command(*brought, FAILS=fails, FAILING_RANK="1")
    took = time.time() - float((command.folder / "failed_at").read_text())
    error = verdict(command.folder / "run")["error"]
    assert error["kind"] == kind
    assert re.fullmatch(message, error["message"])
    assert done.returncode == 3
    assert done.stderr == f"trainer: run is broken: {kind}: {error['message']}\n"
    # Beside the time in which nothing may move, all is told and everybody ended within seconds on a busy machine.
    assert took < 5 + 2 * (fails == "hang")
    if fails == "raise":
        assert error["replica"] in (2, 3)
        assert error["step"] > 0


@pytest.mark.slow
def test_a_signal_ends_all_processes_of_a_run(command: Command) -> None:
    running = command.start("strategy=ddp", "train.steps=1000000", "hydra.run.dir=run")
    (run,) = running.wait_for(running.training)
    assert len(running.runs()) == 2
    ended = running.end_by(signal.SIGINT)
    assert (ended.status, ended.left) == (130, [])
    assert ended.seconds < STOP_SECONDS
    error = verdict(run)["error"]
    assert (error["kind"], error["message"]) == ("interrupted", "interrupted by Ctrl-C (SIGINT)")
    assert not (run / processes.MEETING_NAME).exists()


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_torchrun_starts_the_processes_and_starts_them_again(command: Command) -> None:
    arguments = [*_bring(command), "num_replicas=1", "train.steps=60", "audit.digest_every=10"]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1"),
            *("--monitor-interval=0.1", "-m", "trainer", *arguments),
        ],
        cwd=command.folder,
        env=command.environment(FAILS="raise", FAILING_RANK="1"),
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    run = command.folder / "run"
    assert done.returncode == 0, done.stderr
    found = verdict(run)
    assert (found["verdict"], found["run"]["num_processes"], found["run"]["num_replicas"]) == ("upheld", 2, 2)
    before = (run / "verdict_before_restart_1.json").read_text()
    assert "process 1: replica 1 raised ValueError: a bad batch" in before
    assert "restart 1: the run starts anew; what broke the last time is in verdict_before_restart_1.json" in done.stderr
    assert not (folder_of(run, 1) / "verdict.json").exists()
    assert (folder_of(run, 1) / "console.log").exists()
    assert os.listdir(command.folder).count("run") == 1

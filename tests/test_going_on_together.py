"""Runs of several processes that go on from checkpoints: all from one step, to the bits of a run that was not ended."""

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
from go_on_all import EVERY, STOPPED

from trainer import tf_config
from trainer.checkpoint.checkpoints import MOST_AHEAD
from trainer.checkpoint.identity import difference, identity
from trainer.checkpoint.resume import Candidate, agreed
from trainer.checkpoint.store import name_of, remove_after, steps_in
from trainer.config import Checkpoint, Config, ConfigError, LocalSteps, Processes
from trainer.faults import Faults, InjectedFault
from trainer.processes import MEETING, folder_of
from trainer.rules import validate

HERE = Path(__file__).resolve().parent
BACKENDS = {"ddp": "torch", "multi_worker": "tensorflow"}
CASES = [
    ("ddp", "all_reduce"),
    ("ddp", "local_steps"),
    ("ddp", "skip"),
    ("multi_worker", "all_reduce"),
    ("multi_worker", "naive"),
]
Found = list[dict[str, Any]]
FoundOf = Callable[[str], Found]


# The step that all go on from.


def of(*kept: list[int]) -> Callable[[int | None], list[Candidate]]:
    """What processes have that keep checkpoints of these steps."""

    def look(most: int | None) -> list[Candidate]:
        fits = [[step for step in steps if most is None or step <= most] for steps in kept]
        return [Candidate(max(steps)) if steps else Candidate(-1, "process has none") for steps in fits]

    return look


@pytest.mark.parametrize(
    ("kept", "step"),
    [
        ([[30, 20, 10]], 30),
        ([[30, 20, 10], [30, 20, 10]], 30),
        ([[40, 30, 20], [20, 10], [30, 20]], 20),
        # Two of the newest were damaged: what each has is not a range.
        ([[40, 20, 10], [40, 30, 10], [30, 20, 10]], 10),
    ],
)
def test_the_newest_step_of_which_all_have_a_checkpoint_is_agreed_on(kept: list[list[int]], step: int) -> None:
    assert agreed(of(*kept)) == step


@pytest.mark.parametrize("kept", [[[30, 20], []], [[30], [20]], [[40, 20], [30, 10]]])
def test_without_a_common_step_nobody_goes_on(kept: list[list[int]]) -> None:
    with pytest.raises(ConfigError, match="process has none"):
        agreed(of(*kept))


@pytest.mark.parametrize(
    ("every", "resumed", "message"),
    [
        (10, "", ""),
        (
            12,
            "",
            "checkpoint.every=12 must be a multiple of update_mode.average_every=5: between averages processes have "
            "copies of their own. Try checkpoint.every=15.",
        ),
    ],
)
def test_local_steps_are_saved_where_copies_are_averaged(every: int, resumed: str, message: str) -> None:
    config = Config(strategy=Processes(), update_mode=LocalSteps(average_every=5), checkpoint=Checkpoint(every=every))
    if not message:
        validate(config)
        return
    with pytest.raises(ConfigError) as error:
        validate(config)
    assert str(error.value) == message


def test_faults_that_change_no_bits_may_be_left_out_of_a_resumed_run() -> None:
    plain = identity(Config())
    assert difference(plain, identity(Config(faults=["kill:1:9", "raise:0:1", "hang:0:1", "delay:0:1"]))) == ""
    assert difference(plain, identity(Config(faults=["corrupt:1:9"]))) == "faults was [] and is ['corrupt:1:9']"


def test_what_ends_a_run_strikes_in_its_first_life_only() -> None:
    entries = ["raise:0:1", "corrupt:0:2"]
    with pytest.raises(InjectedFault):
        Faults(entries).strike(1, [0])
    again = Faults(entries, restarts=1)
    again.strike(1, [0])
    assert len(again.corruptions(0)) == 1
    # Another replica's is another process's.
    Faults(entries).strike(1, [1])


def test_later_steps_are_removed_where_they_are_taken_again(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for step in (5, 10, 15):
        (folder / name_of(step)).touch()
    remove_after(10, tmp_path)
    assert steps_in(tmp_path) == [10, 5]


# Two processes that train cases whole and again.


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> FoundOf:
    """What both processes of a strategy came to, by rank; whoever asks first for a strategy waits for it."""

    @functools.cache
    def found_of(strategy: str) -> Found:
        folder = tmp_path_factory.mktemp(strategy)
        program = [sys.executable, str(HERE / "together_all.py"), strategy, str(folder / "run")]
        environment = os.environ | {
            "KERAS_BACKEND": BACKENDS[strategy],
            "PYTHONPATH": os.pathsep.join([str(HERE), str(ROOT)]),
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            MEETING: str(folder / "meeting"),
            "WORLD_SIZE": "2",
        }
        own = [{"RANK": str(rank), "TF_CONFIG": tf_config.on_loopback(rank, 2, folder)} for rank in range(2)]
        started = [subprocess.Popen(program, env=environment | each) for each in own]
        try:
            assert [process.wait(280) for process in started] == [0, 0]
        finally:
            for process in started:
                process.kill()
        return [json.loads((folder_of(folder / "run", rank) / "found.json").read_text()) for rank in range(2)]

    return found_of


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("strategy", "name"), CASES)
def test_processes_that_go_on_are_the_run_that_was_never_ended(found: FoundOf, strategy: str, name: str) -> None:
    first, second = (each[name] for each in found(strategy))
    whole, after = first["whole"], first["after"]
    for what in whole:
        if what not in ("checkpoints", "resumed"):
            assert after[what] == whole[what], what
    assert first["before"]["outcome"] != whole["outcome"]
    assert first["before"]["checkpoints"] == {"written": 2, "failed": [], "last_step": STOPPED}
    assert [each["after"]["resumed"]["step"] for each in (first, second)] == [STOPPED, STOPPED]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("strategy", BACKENDS)
def test_a_step_that_one_process_lacks_is_nobodys(found: FoundOf, strategy: str) -> None:
    first, second = found(strategy)
    newest = [each["uneven"]["newest"] for each in (first, second)]
    assert [each["resumed"]["step"] for each in newest] == [EVERY, EVERY]
    assert newest[0]["final"] == first["all_reduce"]["whole"]["final"]
    skipped = f"{name_of(STOPPED)} is of a step of which not every process has a good one"
    assert [each["resumed"]["skipped"] for each in newest] == [[skipped], []]
    told = first["uneven"]["all"]["refused"]
    assert "/all/process_1 has no checkpoints/step_STEP.safetensors." in told
    assert "\n" not in told
    assert second["uneven"]["all"]["refused"] == told
    told = first["uneven"]["others"]["refused"]
    assert "/others/process_1 was another run: the process was 0 and is 1." in told
    assert second["uneven"]["others"]["refused"] == told


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_what_a_process_forgets_beside_its_values_is_found(found: FoundOf) -> None:
    """The twins: the comparison above can miss neither."""
    local, forgetful = (found("ddp")[0][name] for name in ("local_steps", "forgetful"))
    assert forgetful["steps"]["outcome"] != local["whole"]["outcome"]
    assert forgetful["steps"]["verdict"] == "violated"
    assert forgetful["digest"]["final"] == local["whole"]["final"]
    assert forgetful["digest"]["guarantees"] != local["whole"]["guarantees"]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_process_that_is_furthest_ahead_still_has_a_step_of_the_others(found: FoundOf) -> None:
    first, second = (each["slow"] for each in found("ddp"))
    assert second["broken"] == "out of memory, say"
    assert first["broken"] == "process 1: RuntimeError: out of memory, say"
    ahead, behind = first["kept"], second["kept"]
    assert (ahead[0] - behind[0]) // EVERY == MOST_AHEAD
    assert {*ahead} & {*behind} == {EVERY}


# Runs that are killed.


RUN = ("model=mlp", "model.hidden=[8]", "optimizer=momentum", "train.batch_size=8", "train.threads_per_replica=1")
WHOLE = (*RUN, "train.steps=40", "num_replicas=1", "audit.digest_every=7")


def assert_as_never_killed(found: dict[str, Any], whole: dict[str, Any]) -> None:
    assert found["final_parameters_sha256"] == whole["final_parameters_sha256"] is not None
    assert found["verdict"] == whole["verdict"] == "upheld"
    assert found["metrics"]["updates_kept"] == found["metrics"]["updates_expected"] == 80
    assert found["guarantees"] == whole["guarantees"]


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_torchrun_starts_a_killed_run_again_where_it_was(command: Command) -> None:
    given = ("strategy=ddp", *WHOLE, "checkpoint.every=5", "checkpoint.keep=8")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1"),
            *("--monitor-interval=0.1", "-m", "trainer", *given, "faults=[kill:1:23]", "hydra.run.dir=run"),
        ],
        cwd=command.folder,
        env=command.environment(),
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    run = command.folder / "run"
    assert done.returncode == 0, done.stderr
    found = verdict(run)
    assert "killed by SIGKILL" in verdict(_before(run / "process_1"))["error"]["message"]
    assert verdict(_before(run))["error"] is not None
    resumed = found["run"]["resumed"]
    assert resumed["folder"] == "run"
    # Process 1 was killed at step 23; what it had taken last may not have been on the disk.
    assert resumed["step"] in (10, 15, 20)
    assert "restart 1: the run goes on from its last checkpoint, if all processes have one; what" in done.stderr
    assert command("strategy=ddp", *WHOLE, "hydra.run.dir=whole").returncode == 0
    whole = verdict(command.folder / "whole")
    assert_as_never_killed(found, whole)

    # Processes that are started here go on from the same folder, from what they have in common, without the fault.
    for step in (40, 35):
        (run / "process_1/checkpoints" / name_of(step)).unlink()
    assert command(*given, "resume=run", "hydra.run.dir=again").returncode == 0
    again = verdict(command.folder / "again")
    assert_as_never_killed(again, whole)
    assert (again["run"]["resumed"]["step"], again["run"]["faults"]) == (30, [])

    # And where one of them has nothing, nothing is started.
    shutil.rmtree(run / "process_1/checkpoints")
    ended = command(*given, "resume=run", "hydra.run.dir=never")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == (
        "trainer: resume=run/process_1 has no checkpoints/step_STEP.safetensors. Give the folder of a run that was "
        "made with checkpoint.every=STEPS and came so far.\n"
    )


def _before(folder: Path) -> Path:
    """A folder with the verdict of the first life under its usual name."""
    kept = folder / "before"
    kept.mkdir()
    shutil.copy(folder / "verdict_before_restart_1.json", kept / "verdict.json")
    return kept


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_local_steps_go_on_at_averages_only(command: Command) -> None:
    given = ("strategy=ddp", *RUN, "num_replicas=1", "update_mode=local_steps", "update_mode.average_every=5")
    assert command(*given, "train.steps=12", "checkpoint.every=5", "hydra.run.dir=first").returncode == 0
    ended = command(*given, "train.steps=20", "resume=first", "hydra.run.dir=second")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == (
        "trainer: resume=first ended with an average after step 12, which is none of every "
        "update_mode.average_every=5: a longer run would not have made it. Leave train.steps=12, or remove "
        f"{name_of(12)} to go on from the one before.\n"
    )
    config = dataclasses.replace(Config(), strategy=Processes(), resume=str(command.folder / "first"))
    with pytest.raises(ConfigError, match="was another run: update_mode was local_steps and is all_reduce"):
        validate(config)


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_worker_that_is_killed_goes_on_with_the_others(command: Command) -> None:
    given = ("strategy=multi_worker", *WHOLE)
    killed = command(*given, "checkpoint.every=5", "faults=[kill:1:23]", "hydra.run.dir=first")
    assert killed.returncode == 3
    error = verdict(command.folder / "first")["error"]
    assert (error["kind"], error["message"].partition(";")[0]) == (
        "killed",
        "process 1: killed by SIGKILL, which is what the system does when memory runs out",
    )
    # A worker saves before it goes on, so that the fault came after.
    assert "trainer: resume=first goes on after step 20, with the same command otherwise." in killed.stderr
    assert command(*given, "resume=first", "hydra.run.dir=second").returncode == 0
    assert command(*given, "hydra.run.dir=whole").returncode == 0
    assert_as_never_killed(verdict(command.folder / "second"), verdict(command.folder / "whole"))


# Faults.


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("strategy", BACKENDS)
def test_a_fault_strikes_the_process_that_hosts_its_replica(command: Command, strategy: str) -> None:
    given = (f"strategy={strategy}", *RUN, "num_replicas=1", "train.steps=1000000", "watchdog.seconds=30")
    ended = command(*given, "faults=[raise:1:9]", "hydra.run.dir=raised")
    assert ended.returncode == 3
    assert verdict(command.folder / "raised")["error"] == {
        "kind": "crash",
        "message": "process 1: replica 1 raised InjectedFault: faults=[raise:1:9]",
        "replica": 1,
        "step": 9,
    }
    ended = command(*given, "faults=[corrupt:1:9]", "train.on_nonfinite=stop", "hydra.run.dir=stopped")
    error = verdict(command.folder / "stopped")["error"]
    assert (error["kind"], error["replica"], error["step"]) == ("nonfinite", 1, 9)
    ended = command(*given, "faults=[raise:2:9]", "hydra.run.dir=never")
    assert ended.stderr == ("trainer: faults=[raise:2:9] must name a replica that there is: replicas are 0 to 1.\n")

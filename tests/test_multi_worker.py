"""Several workers of MultiWorkerMirroredStrategy: the same as one process, and told when they are not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import Command, Running, verdict
from multi_worker_all import ALTERED_AFTER, PARITY, STEPS

from trainer import tf_config
from trainer.config import Config, ConfigError, Processes
from trainer.processes import as_launched, launched
from trainer.tf_config import Task

# Sums are taken in another order: first in each worker, then between them. In float16 every rounding follows.
TOLERANCE = dict.fromkeys(PARITY, 5e-6) | {"float16": 2e-3}
AVERAGED = [case for case in PARITY if "update_mode" not in PARITY[case]]
# A worker that is killed, to the end of all; measured at half a second, on a machine that does something else as well.
END_SECONDS = 5.0
# After which TensorFlow gives a worker up that it was not waiting for when it fell silent.
HEARTBEAT_SECONDS = 10.0
ENDLESS = ("strategy=multi_worker", "num_replicas=1", "train.steps=1000000", "hydra.run.dir=run")
CLUSTER = {"chief": ["a:1"], "worker": ["a:2", "b:1"]}
Found = dict[str, Any]


@pytest.fixture(scope="session")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What two workers of two replicas each have come to in every case, and four replicas of one process."""
    folder = tmp_path_factory.mktemp("multi_worker")
    program = [sys.executable, str(Path(__file__).with_name("multi_worker_all.py"))]
    environment = os.environ | {"KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3"}
    outputs = {name: str(folder / f"{name}.npz") for name in ("workers", "mirrored")}
    started = [subprocess.Popen([*program, outputs["mirrored"], "mirrored"], env=environment)]
    for rank in range(2):
        own = {"RANK": str(rank), "WORLD_SIZE": "2", "TF_CONFIG": tf_config.on_loopback(rank, 2, folder)}
        started.append(subprocess.Popen([*program, outputs["workers"]], env=environment | own))
    try:
        assert [process.wait(280) for process in started] == [0, 0, 0]
    finally:
        for process in started:
            process.kill()
    workers, mirrored = (dict(np.load(output, allow_pickle=True)) for output in outputs.values())
    return workers | {f"{name}.mirrored": value for name, value in mirrored.items()}


def status(found: Found, case: str) -> dict[str, str]:
    return {each["name"]: each["status"] for each in found[f"{case}.verdict"].item()["guarantees"]}


def evidence(found: Found, case: str, name: str) -> str:
    return next(each["evidence"] for each in found[f"{case}.verdict"].item()["guarantees"] if each["name"] == name)


@pytest.mark.slow
@pytest.mark.timeout(300)  # whichever test comes first trains everything
@pytest.mark.parametrize("case", PARITY)
def test_two_workers_of_two_replicas_follow_four_replicas_of_one_process(found: Found, case: str) -> None:
    assert found[case].shape == (4, STEPS)
    assert np.isfinite(found[case]).any(axis=0).all()
    np.testing.assert_allclose(found[case], found[f"{case}.mirrored"], rtol=TOLERANCE[case], atol=TOLERANCE[case])
    np.testing.assert_array_equal(found[f"{case}.scales"], found[f"{case}.scales.mirrored"])


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("case", AVERAGED)
def test_all_reduce_over_workers_keeps_what_it_claims(found: Found, case: str) -> None:
    judged = found[f"{case}.verdict"].item()
    assert {"violated", "anomaly"}.isdisjoint(status(found, case).values()), judged["anomalies"]
    kept = ("no_lost_updates", "replicas_identical", "gradients_unmixed", "samples_once", "settings_as_asked")
    assert [status(found, case)[name] for name in kept] == ["upheld"] * len(kept)
    assert judged["metrics"]["updates_kept"] == judged["metrics"]["updates_expected"] == 4 * STEPS
    assert len(judged["precision"]) == len(found[f"{case}.digests"]) == 4
    assert f"alike {STEPS - 1} of {STEPS - 1} times before" in evidence(found, case, "replicas_identical")
    assert "29 settings compared in 4 replicas" in evidence(found, case, "settings_as_asked")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_replicas_of_all_workers_skip_an_update_alike_when_one_overflows(found: Found) -> None:
    scales, overflows = found["float16.scales"][..., 0], found["float16.scales"][..., 1]
    assert overflows.any()
    assert (scales == scales[0]).all()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_same_run_ends_in_the_same_bits(found: Found) -> None:
    assert found["mlp.digest"] == found["again.digest"] != "None"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_operator_by_operator_workers_come_to_the_same(found: Found) -> None:
    np.testing.assert_allclose(found["eager"], found["mlp"], rtol=0, atol=5e-6)
    assert {"violated", "anomaly"}.isdisjoint(status(found, "eager").values())


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_unreduced_replicas_drift_apart_in_every_worker(found: Found) -> None:
    assert status(found, "unreduced")["replicas_identical"] == "anomaly"
    assert len(set(found["unreduced.digests"].tolist())) == 4
    assert f"alike 0 of {STEPS - 1} times before" in evidence(found, "unreduced", "replicas_identical")
    assert status(found, "unreduced")["no_lost_updates"] == "anomaly"


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("case", "kind"), [("reassigned_sum", "multiplied_update"), ("unscaled_sum", "not_joint")])
def test_what_a_mode_breaks_in_one_process_it_breaks_between_workers(found: Found, case: str, kind: str) -> None:
    for suffix in ("", ".mirrored"):
        assert kind in {each["kind"] for each in found[f"{case}.verdict{suffix}"].item()["anomalies"]}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_copy_that_is_altered_is_found_at_that_step(found: Found) -> None:
    assert status(found, "altered")["replicas_identical"] == "violated"
    first = next(each for each in found["altered.verdict"].item()["anomalies"] if each["kind"] == "digest_off")
    assert first["where"] == f"process 1 first, before step {ALTERED_AFTER}"
    assert (first["count"], first["of"]) == (STEPS - ALTERED_AFTER, STEPS - 1)


def workers(running: Running, rank: int) -> list[Any]:
    """The processes that host the replicas of a rank."""
    ends = f"process_{rank}" if rank else "run"
    return [run for run in running.runs() if run.cmdline()[-2].endswith(ends)]


@pytest.mark.slow
def test_a_worker_that_is_killed_ends_the_others_with_its_reason(command: Command) -> None:
    running = command.start(*ENDLESS)
    running.wait_for(running.training)
    (worker,) = workers(running, 1)
    start = time.monotonic()
    worker.kill()
    assert running.process.wait(30) == 3
    assert time.monotonic() - start < END_SECONDS
    error = verdict(command.folder / "run")["error"]
    assert error["kind"] == "killed"
    assert error["message"].startswith("process 1: killed by SIGKILL")
    running.process.communicate(timeout=10)


@pytest.mark.slow
def test_a_worker_that_is_told_to_stop_ends_all(command: Command) -> None:
    """TensorFlow's server takes SIGTERM for itself, so that a worker would go on."""
    running = command.start(*ENDLESS)
    running.wait_for(running.training)
    (worker,) = workers(running, 1)
    start = time.monotonic()
    worker.send_signal(signal.SIGTERM)
    assert running.process.wait(30) == 3
    assert time.monotonic() - start < 2 * END_SECONDS
    assert verdict(command.folder / "run")["error"]["kind"] == "interrupted"
    running.process.communicate(timeout=10)


FAILING = """
import os, keras

class Failing(keras.layers.Layer):
    calls = 0

    def call(self, x):
        Failing.calls += 1
        if os.environ["RANK"] == "1" and Failing.calls > 20:
            raise ValueError("no more of this")
        return x

def model(input_shape, num_classes, **_):
    return keras.Sequential(
        [keras.Input(input_shape), keras.layers.Flatten(), Failing(), keras.layers.Dense(num_classes)]
    )
"""


@pytest.mark.slow
def test_a_worker_that_raises_ends_the_others_with_its_reason(command: Command) -> None:
    (command.folder / "failing.py").write_text(FAILING)
    ran = command(*ENDLESS, "train.capture=never", "model._target_=failing.model")
    assert ran.returncode == 3
    error = verdict(command.folder / "run")["error"]
    assert error["kind"] == "crash"
    assert error["message"].startswith("process 1: replica 1 raised ValueError")
    assert "no more of this" in error["message"]
    assert error["step"] > 0


def started_by_a_cluster(command: Command, folder: Path, *arguments: str) -> list[subprocess.Popen[str]]:
    """A chief and a worker, each by a command of its own."""
    cluster = {
        job: json.loads(tf_config.on_loopback(0, 2, folder))["cluster"]["worker"][at : at + 1]
        for at, job in enumerate(("chief", "worker"))
    }
    return [
        subprocess.Popen(
            [sys.executable, "-m", "trainer", "strategy=multi_worker", "num_replicas=1", *arguments],
            cwd=command.folder,
            env=command.environment(TF_CONFIG=json.dumps({"cluster": cluster, "task": {"type": job, "index": 0}})),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for job in cluster
    ]


@pytest.mark.slow
def test_a_worker_may_be_the_only_one(command: Command) -> None:
    done = command("strategy=multi_worker", "strategy.num_processes=1", "train.steps=20", "hydra.run.dir=run")
    assert done.returncode == 0, done.stderr
    found = verdict(command.folder / "run")
    assert (found["verdict"], found["run"]["num_processes"], found["run"]["num_replicas"]) == ("upheld", 1, 2)


@pytest.mark.slow
def test_a_model_without_statistics_has_none_to_reduce(command: Command) -> None:
    done = command(
        "strategy=multi_worker",
        "num_replicas=1",
        "model=linear",
        "state.batch_statistics=reduced",
        "train.steps=2",
        "hydra.run.dir=run",
    )
    assert done.returncode == 0, done.stderr
    assert verdict(command.folder / "run")["verdict"] == "upheld"


@pytest.mark.slow
def test_a_users_cluster_is_one_run_of_the_chiefs(command: Command, tmp_path: Path) -> None:
    chief, worker = started_by_a_cluster(command, tmp_path, "train.steps=20", "hydra.run.dir=run")
    outputs = [process.communicate(timeout=50) for process in (chief, worker)]
    assert [chief.returncode, worker.returncode] == [0, 0], outputs
    found = verdict(command.folder / "run")
    assert (found["verdict"], found["run"]["num_processes"], found["run"]["num_replicas"]) == ("upheld", 2, 2)
    assert found["metrics"]["updates_kept"] == 2 * 20
    assert not (command.folder / "run/process_1/verdict.json").exists()


@pytest.mark.slow
def test_a_chief_tells_that_it_has_lost_a_worker(command: Command, tmp_path: Path) -> None:
    chief, worker = started_by_a_cluster(command, tmp_path, "train.steps=1000000", "hydra.run.dir=run")
    running = Running(worker, command.folder)
    running.wait_for(running.training)
    (child,) = running.runs()
    start = time.monotonic()
    child.kill()
    assert [process.wait(30) for process in (chief, worker)] == [3, 3]
    seconds = time.monotonic() - start
    for process in (chief, worker):
        process.communicate(timeout=10)
    assert seconds < HEARTBEAT_SECONDS + END_SECONDS
    error = verdict(command.folder / "run")["error"]
    assert error["message"].startswith("process 0: another worker is gone, and its own verdict or log says why")
    assert error["step"] > 0
    assert "killed by SIGKILL" in verdict(command.folder / "run/process_1")["error"]["message"]


def told(task: dict[str, Any] | None, cluster: Any = CLUSTER) -> dict[str, str]:
    return {"TF_CONFIG": json.dumps({"cluster": cluster, "task": task})}


@pytest.mark.parametrize(
    ("own", "task"),
    [
        ({"type": "chief", "index": 0}, Task(0, 3, 0, 2)),
        ({"type": "worker", "index": 0}, Task(1, 3, 1, 2)),
        ({"type": "worker", "index": "1"}, Task(2, 3, 0, 1)),
    ],
)
def test_the_chief_is_first_and_workers_follow(own: dict[str, Any], task: Task) -> None:
    assert tf_config.task(told(own)) == task


WORKER = {"type": "worker", "index": 0}


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"TF_CONFIG": '{"cluster"'}, "is no JSON (Expecting ':' delimiter at character 10)."),
        ({"TF_CONFIG": "[]"}, "has no cluster."),
        (told(WORKER, {}), "has no cluster."),
        (told(WORKER, {"worker": ["a:1"], "ps": ["b:1"]}), "has a job 'ps', and every task is to host replicas"),
        (told(WORKER, {"worker": ["a:1", "b"]}), "lists no HOST:PORT for each task of job 'worker'."),
        (told(WORKER, {"chief": ["a:1", "b:1"]}), "has more than one chief."),
        (told({"type": "evaluator", "index": 0}), "a task of job 'evaluator', which its cluster has not."),
        (told({"type": "worker", "index": 2}), "is task 2 of job 'worker', which has 0 to 1."),
        (told({"type": "worker", "index": True}), "is task True of job 'worker', which has 0 to 1."),
        (told(None), "a task of job 'None', which its cluster has not."),
    ],
)
def test_a_tf_config_that_names_no_worker_is_told_in_one_line(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as found:
        launched(Config(strategy=Processes("multi_worker")), environment)
    assert str(found.value).startswith("TF_CONFIG ")
    assert message in str(found.value)
    assert "\n" not in str(found.value)


def test_another_number_of_processes_than_the_clusters_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TF_CONFIG", told(WORKER)["TF_CONFIG"])
    assert as_launched(Config(strategy=Processes("multi_worker"))).num_processes == 3
    with pytest.raises(ConfigError, match=r"^strategy.num_processes=4 differs from the 3 workers of TF_CONFIG\."):
        as_launched(Config(strategy=Processes("multi_worker", num_processes=4)))


def test_workers_that_are_started_here_have_ports_of_their_own(tmp_path: Path) -> None:
    first, second = (json.loads(tf_config.on_loopback(rank, 2, tmp_path)) for rank in range(2))
    assert first["cluster"] == second["cluster"]
    assert len(set(first["cluster"]["worker"])) == 2
    assert [each["task"]["index"] for each in (first, second)] == [0, 1]

"""Cases from the field: each experiment shows what it is named for, and its cure shows nothing."""

from __future__ import annotations

from typing import Any

import pytest
from command import Command, verdict

# Small enough for every order.
SMALL = ["schedule=search", "model=linear", "train.steps=1", "train.batch_size=2"]

pytestmark = pytest.mark.slow


def run(command: Command, experiment: str, *arguments: str) -> dict[str, Any]:
    ended = command(f"experiment={experiment}", "hydra.run.dir=run", *arguments)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return verdict(command.folder / "run")


def kinds(found: dict[str, Any]) -> dict[str, tuple[int, int]]:
    return {each["kind"]: (each["count"], each["of"]) for each in found["anomalies"]}


def status(found: dict[str, Any], guarantee: str) -> str:
    (told,) = [str(each["status"]) for each in found["guarantees"] if each["name"] == guarantee]
    return told


@pytest.mark.parametrize(("cure", "lost"), [((), True), (("update_mode=locked",), False)])
def test_slots_race_under_a_lock_on_the_weights_alone(command: Command, cure: tuple[str, ...], lost: bool) -> None:
    found = run(command, "field_slots_unlocked", "optimizer=momentum", *SMALL, *cure)
    assert ("lost_update" in kinds(found)) == lost
    assert status(found, "no_lost_updates") == ("anomaly" if lost else "upheld")
    if lost:
        # Only slots: every witness names one.
        witnesses = [each["witness"] for each in found["anomalies"] if each["kind"] == "lost_update"]
        assert all(".velocity" in each.partition("\n")[0] for each in witnesses)


@pytest.mark.parametrize(("cure", "repeated"), [((), True), (("state.cursor=sharded",), False)])
def test_one_iterator_gives_a_batch_to_two_consumers(command: Command, cure: tuple[str, ...], repeated: bool) -> None:
    found = run(command, "field_shared_iterator", *SMALL, *cure)
    assert ("repeated_samples" in kinds(found) or "duplicate_sample" in kinds(found)) == repeated
    assert status(found, "samples_once") == ("anomaly" if repeated else "upheld")


@pytest.mark.parametrize("num_replicas", [2, 3])
def test_a_sum_of_mean_gradients_is_as_many_times_too_large_as_there_are_replicas(
    command: Command, num_replicas: int
) -> None:
    summed = run(command, "field_unscaled_sum", f"num_replicas={num_replicas}", "train.steps=3", "model=linear")
    (off,) = summed["anomalies"]
    assert (off["kind"], off["count"], off["of"]) == ("not_joint", num_replicas, num_replicas)
    assert off["witness"].endswith(f"every one is {num_replicas} times the joint gradient")
    assert summed["metrics"]["gradient_error_max"] == pytest.approx(num_replicas - 1, rel=1e-4)


def test_the_mean_of_gradients_is_the_joint_one(command: Command) -> None:
    found = run(command, "field_unscaled_sum", "update_mode=all_reduce", "train.steps=3", "model=linear")
    assert (found["anomalies"], found["verdict"]) == ([], "upheld")

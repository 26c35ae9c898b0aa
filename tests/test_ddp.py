"""Several processes over torch.distributed: the same as one process, and told when they are not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ddp_all import DEFECT_STEP, PARITY, STEPS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]  # whichever test comes first trains everything

# As in test_parity.py: sums are taken in another order. In float16 every layer's rounding follows the last bits.
TOLERANCE = dict.fromkeys(PARITY, 5e-6) | {"float16": 2e-3}
Found = dict[str, Any]


@pytest.fixture(scope="session")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What two processes of two replicas each have come to in every case, and four replicas of one process."""
    folder = tmp_path_factory.mktemp("ddp")
    program = [sys.executable, str(Path(__file__).with_name("ddp_all.py")), str(folder / "found.npz")]
    meeting = {"WORLD_SIZE": "2", "TRAINER_MEETING": str(folder / "meeting"), "GLOO_SOCKET_IFNAME": "lo"}
    environment = os.environ | meeting | {"KERAS_BACKEND": "torch", "OMP_NUM_THREADS": "1"}
    started = [subprocess.Popen(program, env=environment | {"RANK": str(rank)}) for rank in range(2)]
    try:
        assert [process.wait(280) for process in started] == [0, 0]
    finally:
        for process in started:
            process.kill()
    return dict(np.load(folder / "found.npz", allow_pickle=True))


def status(found: Found, case: str) -> dict[str, str]:
    return {each["name"]: each["status"] for each in found[f"{case}.verdict"].item()["guarantees"]}


def evidence(found: Found, case: str, name: str) -> str:
    return next(each["evidence"] for each in found[f"{case}.verdict"].item()["guarantees"] if each["name"] == name)


@pytest.mark.parametrize("case", PARITY)
def test_two_processes_of_two_replicas_follow_four_replicas_of_one(found: Found, case: str) -> None:
    assert np.isfinite(found[case]).all()
    np.testing.assert_allclose(found[case], found[f"{case}.threads"], rtol=0, atol=TOLERANCE[case])
    np.testing.assert_array_equal(found[f"{case}.scales"], found[f"{case}.threads.scales"])


def test_replicas_of_all_processes_skip_an_update_alike_when_one_overflows(found: Found) -> None:
    scales, overflows = found["float16.scales"][..., 0], found["float16.scales"][..., 1]
    assert overflows.any()
    assert (scales == scales[0]).all()
    assert (np.diff(scales[0]) < 0).sum() == overflows.any(axis=0)[:-1].sum()


@pytest.mark.parametrize("case", PARITY)
def test_all_reduce_over_processes_keeps_what_it_claims(found: Found, case: str) -> None:
    judged = found[f"{case}.verdict"].item()
    assert {"violated", "anomaly"}.isdisjoint(status(found, case).values()), judged["anomalies"]
    assert status(found, case)["replicas_identical"] == "upheld"
    assert judged["metrics"]["updates_kept"] == 4 * STEPS
    assert f"alike {STEPS} of {STEPS} times before" in evidence(found, case, "replicas_identical")


def test_two_runs_of_several_processes_end_in_the_same_bits(found: Found) -> None:
    assert found["mlp.digest"] == found["again.digest"] != "None"
    assert found["local_5.digest"] == found["local_5_again.digest"] != "None"


def test_a_copy_that_is_altered_is_found_at_that_step(found: Found) -> None:
    assert status(found, "altered")["replicas_identical"] == "violated"
    first = next(each for each in found["altered.verdict"].item()["anomalies"] if each["kind"] == "digest_off")
    assert first["where"] == f"process 1 first, before step {DEFECT_STEP}"
    assert (first["count"], first["of"]) == (STEPS - DEFECT_STEP, STEPS)


def test_averaging_after_every_step_is_all_reduce_for_sgd(found: Found) -> None:
    np.testing.assert_allclose(found["local_1"], found["sgd"], rtol=0, atol=5e-6)


def test_averaging_after_every_step_is_not_all_reduce_for_adam(found: Found) -> None:
    """The mean of what a rule makes of two gradients is not what it makes of their mean, where it is not linear."""
    assert np.abs(found["local_1_adam"] - found["adam"]).max() > 1e-3


def test_local_steps_end_with_an_average_and_keep_every_update(found: Found) -> None:
    np.testing.assert_array_equal(found["local_5.averages"], [5, 10, 12])
    assert len(set(found["local_5.digests"].tolist())) == 1
    judged = found["local_5.verdict"].item()
    assert judged["metrics"]["updates_kept"] == judged["metrics"]["updates_expected"] == 4 * STEPS
    assert {"violated", "anomaly"}.isdisjoint(status(found, "local_5").values()), judged["anomalies"]
    assert {status(found, "local_5")[name] for name in ("fresh_gradients", "joint_gradient")} == {"not_applicable"}


def test_local_steps_tell_how_far_processes_were_apart(found: Found) -> None:
    metrics = found["local_5.verdict"].item()["metrics"]
    assert 0 < metrics["divergence_before_averages_max"] < 1
    assert 0 < metrics["divergence_before_averages_relative"] < 1
    assert metrics["replica_divergence_max"] == 0
    assert "claimed at the 3 averages only" in evidence(found, "local_5", "replicas_identical")


def test_canaries_that_are_averaged_show_lost_updates(found: Found) -> None:
    assert status(found, "averaged_counts")["no_lost_updates"] == "violated"

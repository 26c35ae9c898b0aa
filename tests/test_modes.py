"""Every update mode with every optimizer on real frameworks, batch statistics among the shared variables."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from trainer.audit.guarantees import GUARANTEES
from trainer.updates.mechanisms import MODES

pytestmark = pytest.mark.timeout(300)  # whichever test comes first trains everything

HERE = Path(__file__).resolve().parent
RULES = ["sgd", "momentum", "adam"]
REPLICAS, STEPS = 2, 12
THREADS = [name for name, mode in MODES.items() if "threads" in mode.strategies and name != "custom"]
MIRRORED = [name for name, mode in MODES.items() if "mirrored" in mode.strategies]
EACH = [("threads", name) for name in THREADS] + [("mirrored", name) for name in MIRRORED]
Judged = dict[str, Any]


def judge_all(folder: Path, strategy: str, replicas: int, steps: int, model: str, rules: str) -> dict[str, Judged]:
    output = folder / f"{strategy}.json"
    backend = {"threads": "torch", "mirrored": "tensorflow"}[strategy]
    path = os.pathsep.join(str(folder) for folder in (HERE, HERE.parent))
    environment = os.environ | {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": path}
    command = [sys.executable, HERE / "judge_all.py", strategy, str(replicas), str(steps)]
    subprocess.run([*command, model, rules, output], env=environment, check=True, timeout=280)
    found: dict[str, Judged] = json.loads(output.read_text())
    return found


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Judged]:
    folder = tmp_path_factory.mktemp("modes")
    return {
        (strategy, name): found
        for strategy in ("threads", "mirrored")
        for name, found in judge_all(folder, strategy, REPLICAS, STEPS, "cnn", ",".join(RULES)).items()
    }


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("strategy", "mode"), EACH)
def test_a_mode_upholds_what_it_claims_and_is_not_condemned_for_the_rest(
    judged: dict[tuple[str, str], Judged], strategy: str, mode: str, rule: str
) -> None:
    found = judged[strategy, f"{mode} {rule}"]
    claims = MODES[mode].claims - {"same_bits"}
    for name in GUARANTEES:
        status = found["statuses"][name]
        if name in claims:
            assert status in ("upheld", "not_applicable", "not_checked"), name
        elif name in ("gradients_unmixed", "precision_as_asked") and mode != "reassigned_sum":
            assert status == "upheld", name
        else:
            assert status != "violated" or mode == "reassigned_sum", name
    if "no_lost_updates" in claims:
        assert found["metrics"]["updates_kept"] == REPLICAS * STEPS
        assert "unconserved_element" not in found["anomalies"]
        assert found["verdict"] in ("upheld", "anomaly")


@pytest.mark.parametrize("rule", RULES)
def test_unreduced_copies_diverge_and_hold_their_own_replicas_updates_only(
    judged: dict[tuple[str, str], Judged], rule: str
) -> None:
    found = judged["mirrored", f"unreduced {rule}"]
    assert found["anomalies"]["divergence"] == [1, 2]
    assert found["anomalies"]["dropped_update"] == [REPLICAS * STEPS, REPLICAS * STEPS]
    assert found["metrics"]["replica_divergence_max"] > 1e-3
    assert found["statuses"]["replicas_identical"] == "anomaly"


@pytest.mark.parametrize("rule", RULES)
def test_first_replica_keeps_one_replicas_updates(judged: dict[tuple[str, str], Judged], rule: str) -> None:
    found = judged["mirrored", f"first_replica {rule}"]
    assert found["metrics"]["updates_kept"] == STEPS
    assert found["anomalies"]["dropped_update"] == [STEPS, REPLICAS * STEPS]
    assert found["statuses"]["replicas_identical"] == "upheld"


@pytest.mark.parametrize("rule", RULES)
def test_reassigned_sum_multiplies(judged: dict[tuple[str, str], Judged], rule: str) -> None:
    found = judged["mirrored", f"reassigned_sum {rule}"]
    assert found["anomalies"]["multiplied_update"] == [REPLICAS * STEPS, REPLICAS * STEPS]
    assert found["metrics"]["updates_kept"] == 0


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("strategy", ["threads", "mirrored"])
def test_what_is_applied_is_the_gradient_times_the_replicas_under_unscaled_sum_only(
    judged: dict[tuple[str, str], Judged], strategy: str, rule: str
) -> None:
    # Each replica normalizes its own batch, so neither is the joint batch's; but one is twice the other.
    scaled = judged[strategy, f"all_reduce {rule}"]["metrics"]["gradient_error_max"]
    summed = judged[strategy, f"unscaled_sum {rule}"]["metrics"]["gradient_error_max"]
    assert scaled < 0.6 < 0.9 < summed


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["threads", "mirrored"])
def test_sixty_four_replicas_in_every_mode(tmp_path: Path, strategy: str) -> None:
    steps = 4
    found = judge_all(tmp_path, strategy, 64, steps, "linear", "momentum")
    for name, judged in found.items():
        mode = name.split()[0]
        claims = MODES[mode].claims - {"same_bits"}
        statuses = {judged["statuses"][claim] for claim in claims}
        assert statuses <= {"upheld", "not_applicable", "not_checked"}, name
        assert judged["metrics"]["steps_done"] == steps, name
        if "no_lost_updates" in claims:
            assert judged["metrics"]["updates_kept"] == 64 * steps, name

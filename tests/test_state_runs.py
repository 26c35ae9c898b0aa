"""Every state holder in real runs under both strategies: the unsafe one is caught, its safe twin is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command import Command

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]  # whichever test comes first runs everything

STEPS = 12
BFLOAT16 = ["mixed_bfloat16", {}]
IN_REPLICAS = ["mixed_bfloat16", {"enabled_in": "replica"}]
# A scale at which the first steps overflow, and that grows often enough to overflow again.
FLOAT16 = ["mixed_float16", {"initial_scale": 2.0**26, "growth_steps": 2}]
CNN = ["cnn", {"filters": [4]}]
SYNCHRONIZED = ["cnn", {"filters": [4], "normalization": "sync_batch"}]
DROPPING = ["mlp", {"hidden": [16], "dropout": 0.5}]
PRECISIONS = ("explicit", "inherited", "thread_local", "locked_global", "process_global")

# Cases of both strategies, then of each.
BOTH: dict[str, dict[str, Any]] = {
    **{f"main {name}": {"precision": BFLOAT16, "state": {"precision": name}} for name in PRECISIONS[:3]},
    **{f"replica {name}": {"precision": IN_REPLICAS, "state": {"precision": name}} for name in PRECISIONS[:3]},
    "statistics shared": {"model": CNN, "state": {"batch_statistics": "shared"}},
    "statistics reduced": {"model": CNN, "state": {"batch_statistics": "reduced"}},
    "statistics transactional": {"model": CNN},
    "random shared": {"model": DROPPING, "state": {"random_numbers": "shared"}},
    "random derived": {"model": DROPPING},
    "scale transactional": {"precision": FLOAT16},
    "scale shared": {"precision": FLOAT16, "state": {"loss_scale": "shared"}},
    "evaluator": {"precision": BFLOAT16, "num_replicas": 3, "train": {"evaluators": 1}},
    "never captured": {"model": CNN, "train": {"capture": "never"}},
    "captured": {"model": CNN},
    "naive": {"model": CNN, "precision": FLOAT16, "state": dict.fromkeys(("precision", "cursor"), "naive")},
}
MODULE = ["custom", {"_target_": "brought.module"}]
MIXED = {"model": SYNCHRONIZED, "precision": IN_REPLICAS, "num_replicas": 4, "train": {"evaluators": 1}}
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "threads": {
        **BOTH,
        "gradients shared": {"state": {"gradients": "shared"}},
        "gradients shared, captured": {"state": {"gradients": "shared"}, "train": {"capture": "always"}},
        "captured thread_local": {
            "precision": BFLOAT16,
            "state": {"precision": "thread_local"},
            "train": {"capture": "always"},
        },
        "scale transactional locked": {"precision": FLOAT16, "update_mode": ["locked", {}], "optimizer": ["adam", {}]},
        **{
            f"autocast {enabled_in} {name}": {
                "model": MODULE,
                "precision": ["mixed_bfloat16", {"enabled_in": enabled_in}],
                "state": {"precision": name},
            }
            for enabled_in in ("main", "replica")
            for name in ("thread_local", "inherited")
        },
        "first call checked twice": {"state": {"first_call": "double_checked"}, "precision": BFLOAT16},
        "first call computed twice": {
            "update_mode": ["custom", {"_target_": "brought.ComputedTwice"}],
            "state": {"first_call": "flag"},
            "precision": BFLOAT16,
            "num_replicas": 1,
        },
        # Last: what it sets stays set in the process.
        "settings": {"model": ["custom", {"_target_": "brought.meddling_module"}]},
    },
    "mirrored": {
        **BOTH,
        "cursor shared": {"state": {"cursor": "shared_iterator"}},
        **{
            f"synchronized {name}": {"model": SYNCHRONIZED, "precision": IN_REPLICAS, "state": {"precision": name}}
            for name in PRECISIONS
        },
        **{f"mixed {name}": {**MIXED, "state": {"precision": name}} for name in PRECISIONS},
        "eager process_global": {
            "model": SYNCHRONIZED,
            "precision": IN_REPLICAS,
            "state": {"precision": "process_global"},
            "train": {"capture": "never"},
        },
        "alone process_global": {"precision": IN_REPLICAS, "state": {"precision": "process_global"}},
        "first call flag": {"model": SYNCHRONIZED, "precision": BFLOAT16, "state": {"first_call": "flag"}},
        "first call set": {"model": SYNCHRONIZED, "precision": BFLOAT16, "state": {"first_call": "instance_set"}},
        "statistics reduced, weights not": {
            "model": CNN,
            "update_mode": ["unreduced", {}],
            "state": {"batch_statistics": "reduced"},
        },
    },
}
BOTH_STRATEGIES = pytest.mark.parametrize("strategy", ["threads", "mirrored"])
Found = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    folder = tmp_path_factory.mktemp("state")
    outcomes = {}
    for strategy, backend in (("threads", "torch"), ("mirrored", "tensorflow")):
        cases, output = folder / f"{strategy}.json", folder / f"{strategy}_found.json"
        cases.write_text(json.dumps(CASES[strategy]))
        command = [sys.executable, str(Path(__file__).with_name("hold_all.py")), strategy, str(cases), str(output)]
        environment = os.environ | {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
        subprocess.run(command, env=environment, check=True, timeout=380)
        outcomes[strategy] = json.loads(output.read_text())
    return outcomes


def kept(outcome: dict[str, Any], guarantee: str) -> None:
    """A safe holder: claimed, checked, nothing seen anywhere."""
    assert outcome["statuses"][guarantee] == "upheld", outcome["evidence"][guarantee]
    assert outcome["verdict"] == "upheld"
    assert outcome["anomalies"] == {}


def caught(outcome: dict[str, Any], guarantee: str, **anomalies: list[int]) -> None:
    """An unsafe holder: not claimed, seen, counted exactly, with a witness and the holder that cures it."""
    assert guarantee not in outcome["claimed"]
    assert outcome["statuses"][guarantee] == "anomaly"
    assert outcome["verdict"] == "anomaly"
    assert outcome["anomalies"] == anomalies
    assert all(outcome["remedies"].values())
    assert all(outcome["witnesses"].values())


# Precision.


@BOTH_STRATEGIES
@pytest.mark.parametrize("name", ["main explicit", "main inherited", *(f"replica {name}" for name in PRECISIONS[:3])])
def test_a_precision_that_is_passed_inherited_or_the_replicas_own_is_kept(
    found: dict[str, Found], strategy: str, name: str
) -> None:
    kept(found[strategy][name], "precision_as_asked")


@BOTH_STRATEGIES
def test_a_thread_local_mode_that_main_turns_on_is_absent_in_every_step_of_every_replica(
    found: dict[str, Found], strategy: str
) -> None:
    off = [2 * STEPS, 2 * STEPS]
    outcome = found[strategy]["main thread_local"]
    caught(outcome, "precision_as_asked", precision_off=off, gradient_precision_off=off)
    assert "no mode was on" in outcome["witnesses"]["precision_off"]


@pytest.mark.parametrize("name", ["process_global", "locked_global"])
def test_a_process_wide_scope_makes_replica_1_compute_in_float32_and_stays_on(
    found: dict[str, Found], name: str
) -> None:
    """Both wait for each other in synchronized normalization; who leaves first turns the mode off for the other."""
    outcome = found["mirrored"][f"synchronized {name}"]
    off = [STEPS, 2 * STEPS]
    caught(outcome, "precision_as_asked", precision_off=off, gradient_precision_off=off, mode_left_on=[1, 1])
    assert outcome["witnesses"]["precision_off"].startswith(f"replica 0: 0, replica 1: {STEPS} |")
    assert "replica 0 from no mode to no mode" not in outcome["evidence"]["precision_as_asked"]
    assert "the graph keeps what was in force while it was traced" in outcome["evidence"]["precision_as_asked"]


@pytest.mark.parametrize("name", ["explicit", "inherited", "thread_local"])
@pytest.mark.parametrize("case", ["synchronized", "mixed"])
def test_synchronized_normalization_leaves_a_mode_of_the_replicas_own_alone(
    found: dict[str, Found], case: str, name: str
) -> None:
    kept(found["mirrored"][f"{case} {name}"], "precision_as_asked")


def test_run_eagerly_the_leak_shows_in_the_first_step_and_hides_itself_afterwards(found: dict[str, Found]) -> None:
    outcome = found["mirrored"]["eager process_global"]
    assert outcome["engine"] == "eager"
    caught(
        outcome,
        "precision_as_asked",
        precision_off=[1, 2 * STEPS],
        gradient_precision_off=[1, 2 * STEPS],
        mode_left_on=[1, 1],
    )


def test_without_a_switch_inside_the_scope_a_process_wide_mode_shows_nothing_and_proves_nothing(
    found: dict[str, Found],
) -> None:
    outcome = found["mirrored"]["alone process_global"]
    assert (outcome["statuses"]["precision_as_asked"], outcome["verdict"]) == ("not_seen", "inconclusive")


@pytest.mark.parametrize("name", ["process_global", "locked_global"])
def test_an_evaluator_in_float32_and_trainers_in_bfloat16_get_each_others_precision(
    found: dict[str, Found], name: str
) -> None:
    outcome = found["mirrored"][f"mixed {name}"]
    where = f"replica 0: {STEPS}, replica 1: {STEPS}, replica 2: 0, replica 3: {STEPS} |"
    assert outcome["witnesses"]["precision_off"].startswith(where)
    assert outcome["anomalies"]["precision_off"] == [3 * STEPS, 4 * STEPS]
    assert outcome["anomalies"]["mode_left_on"] == [1, 1]


@BOTH_STRATEGIES
def test_an_evaluating_replica_computes_in_float32_and_adds_nothing(found: dict[str, Found], strategy: str) -> None:
    outcome = found[strategy]["evaluator"]
    kept(outcome, "precision_as_asked")
    assert outcome["statuses"]["joint_gradient"] == "upheld"  # of the two that train


@BOTH_STRATEGIES
def test_steps_that_are_not_captured_follow_the_same_losses(found: dict[str, Found], strategy: str) -> None:
    captured, eager = found[strategy]["captured"], found[strategy]["never captured"]
    assert eager["engine"] == "eager" != captured["engine"]
    kept(eager, "gradients_unmixed")  # recomputed by the captured step: the same bits
    for one, other in zip(captured["losses"], eager["losses"], strict=True):
        assert one == pytest.approx(other, abs=5e-6)


def test_a_captured_step_is_chosen_by_the_mode_that_the_replica_finds(found: dict[str, Found]) -> None:
    outcome = found["threads"]["captured thread_local"]
    assert outcome["engine"] == "torchscript"
    assert outcome["anomalies"]["precision_off"] == [2 * STEPS, 2 * STEPS]
    assert "main captured the step for each dtype" in outcome["evidence"]["precision_as_asked"]


@pytest.mark.parametrize("name", ["main inherited", "replica inherited", "replica thread_local"])
def test_autocast_in_the_mode_that_a_replica_holds(found: dict[str, Found], name: str) -> None:
    kept(found["threads"][f"autocast {name}"], "precision_as_asked")


def test_autocast_that_main_turns_on_is_absent_in_replicas(found: dict[str, Found]) -> None:
    outcome = found["threads"]["autocast main thread_local"]
    off = [2 * STEPS, 2 * STEPS]
    caught(outcome, "precision_as_asked", precision_off=off, gradient_precision_off=off)
    assert outcome["engine"] == "eager"


# Settings.


def test_a_setting_that_replicas_do_not_inherit_is_named(found: dict[str, Found]) -> None:
    outcome = found["threads"]["settings"]
    assert (outcome["verdict"], outcome["statuses"]["settings_as_asked"]) == ("violated", "violated")
    assert list(outcome["anomalies"]) == ["setting_off"]
    assert "Keras dtype policy (thread) is " in outcome["witnesses"]["setting_off"]
    assert "asked was mixed_bfloat16" in outcome["witnesses"]["setting_off"]


# First call.


@pytest.mark.parametrize("name", ["flag", "set"])
def test_every_mirrored_replica_makes_the_first_call_when_it_waits_for_the_others(
    found: dict[str, Found], name: str
) -> None:
    outcome = found["mirrored"][f"first call {name}"]
    assert outcome["statuses"]["initialized_once"] == "anomaly"
    assert outcome["anomalies"]["repeated_first_call"] == [1, 2]
    # The graph keeps the full precision that the first call was traced in.
    assert outcome["anomalies"]["precision_off"] == [2 * (STEPS - 1), 2 * STEPS]


def test_a_flag_that_is_checked_twice_lets_one_replica_make_the_first_call(found: dict[str, Found]) -> None:
    outcome = found["threads"]["first call checked twice"]
    assert outcome["statuses"]["initialized_once"] == "upheld"
    assert outcome["anomalies"] == {}
    assert outcome["evidence"]["initialized_once"] == "the first call was made 1 time, by replicas"


def test_a_first_call_whose_gradient_is_thrown_away_was_made_all_the_same(found: dict[str, Found]) -> None:
    outcome = found["threads"]["first call computed twice"]
    assert outcome["evidence"]["initialized_once"] == "the first call was made 1 time, by replicas"
    assert outcome["statuses"]["precision_as_asked"] == "upheld"  # what was committed was computed as asked


# Loss scale.


@pytest.mark.parametrize(
    ("strategy", "name"),
    [
        ("threads", "scale transactional"),
        ("mirrored", "scale transactional"),
        ("threads", "scale transactional locked"),
    ],
)
def test_a_decision_in_the_transaction_is_made_once_for_all(found: dict[str, Found], strategy: str, name: str) -> None:
    outcome = found[strategy][name]
    kept(outcome, "loss_scale_kept")
    assert f"{2 * STEPS} of {2 * STEPS} decisions" in outcome["evidence"]["loss_scale_kept"]


@BOTH_STRATEGIES
def test_the_run_overflowed_so_there_was_something_to_decide(found: dict[str, Found], strategy: str) -> None:
    evidence = found[strategy]["scale transactional"]["evidence"]["loss_scale_kept"]
    assert 2 <= int(evidence.split("; ")[1].split(" of ")[0]) < STEPS


def test_decisions_about_a_shared_scale_undo_each_other(found: dict[str, Found]) -> None:
    threads, mirrored = (found[strategy]["scale shared"] for strategy in ("threads", "mirrored"))
    for outcome in (threads, mirrored):
        assert outcome["statuses"]["loss_scale_kept"] == "anomaly"
        assert outcome["statuses"]["no_lost_updates"] == "upheld"  # the weights' mode has lost nothing
    # Both read the same scale at every step; one of the two decisions is written over.
    count, of = threads["anomalies"]["lost_scale_decision"]
    assert 0 < count < of == 2 * STEPS
    # Each mirrored copy has its own replica's decisions and none of the other's.
    assert mirrored["anomalies"]["lost_scale_decision"] == [2 * STEPS, 2 * STEPS]


# Batch statistics.


@BOTH_STRATEGIES
@pytest.mark.parametrize("name", ["statistics transactional", "statistics reduced"])
def test_statistics_in_the_update_or_reduced_are_kept(found: dict[str, Found], strategy: str, name: str) -> None:
    kept(found[strategy][name], "batch_statistics_kept")


def test_shared_statistics_are_written_over_or_drift_apart(found: dict[str, Found]) -> None:
    threads, mirrored = (found[strategy]["statistics shared"] for strategy in ("threads", "mirrored"))
    for outcome in (threads, mirrored):
        assert outcome["statuses"]["batch_statistics_kept"] == "anomaly"
        assert outcome["statuses"]["no_lost_updates"] == "upheld"
        assert list(outcome["anomalies"]) == ["lost_statistics"]
    count, of = threads["anomalies"]["lost_statistics"]
    assert 0 < count < of == 2 * STEPS
    assert mirrored["anomalies"]["lost_statistics"] == [2 * STEPS, 2 * STEPS]


def test_reduced_statistics_stay_together_while_the_weights_drift_apart(found: dict[str, Found]) -> None:
    outcome = found["mirrored"]["statistics reduced, weights not"]
    assert outcome["statuses"]["batch_statistics_kept"] == "upheld"
    assert outcome["statuses"]["replicas_identical"] == "anomaly"


# Random numbers, samples, gradients.


@BOTH_STRATEGIES
def test_derived_numbers_are_those_of_seed_step_and_sample(found: dict[str, Found], strategy: str) -> None:
    kept(found[strategy]["random derived"], "rng_independent")


def test_every_mirrored_replica_draws_the_same_from_a_seed_that_is_a_variable(found: dict[str, Found]) -> None:
    outcome = found["mirrored"]["random shared"]
    caught(outcome, "rng_independent", repeated_random_numbers=[STEPS, 2 * STEPS])


@pytest.mark.stress
def test_threads_draw_from_the_process_wide_generator_out_of_turn(found: dict[str, Found]) -> None:
    outcome = found["threads"]["random shared"]
    assert list(outcome["anomalies"]) in ([], ["reordered_random_numbers"])  # never repeated: the generator is locked
    assert outcome["statuses"]["gradients_unmixed"] == "not_checked"  # the numbers are gone


def test_every_mirrored_replica_takes_the_batches_at_its_own_copy_of_the_position(found: dict[str, Found]) -> None:
    outcome = found["mirrored"]["cursor shared"]
    samples, of = STEPS * 8, 2 * STEPS * 8
    caught(outcome, "samples_once", repeated_samples=[samples, of], missed_samples=[samples, of])


@pytest.mark.stress
@pytest.mark.parametrize("name", ["gradients shared", "gradients shared, captured"])
def test_threads_mix_their_gradients_in_one_grad(found: dict[str, Found], name: str) -> None:
    outcome = found["threads"][name]
    assert set(outcome["anomalies"]) <= {"mixed_gradient", "not_joint"}
    assert outcome["verdict"] in ("anomaly", "inconclusive")
    assert f"of {2 * STEPS} gradients were read back from .grad" in outcome["evidence"]["gradients_unmixed"]


@BOTH_STRATEGIES
def test_naive_holders_are_named_in_the_verdict_by_what_they_break(found: dict[str, Found], strategy: str) -> None:
    outcome = found[strategy]["naive"]
    assert outcome["statuses"]["precision_as_asked"] == "anomaly"
    assert outcome["statuses"]["loss_scale_kept"] == "upheld"
    assert "precision_as_asked" not in outcome["claimed"]


def test_a_sweep_names_every_anomaly_of_naive_and_none_of_safe(command: Command) -> None:
    arguments = ["-m", "state=naive,safe", "strategy=threads,mirrored", "model=cnn", "precision=mixed_bfloat16"]
    ended = subprocess.run(
        [sys.executable, "-m", "trainer", *arguments, "train.steps=40", "hydra.sweep.dir=sweep"],
        cwd=command.folder,
        env=command.environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    rows = ended.stdout.split("job  anomalies")[1].splitlines()
    text = " ".join(rows[2:])
    mirrored = text.index("precision_off 79 of 80")  # the first of job 1; free threads differ from run to run
    for name in ("precision_off", "gradient_precision_off", "repeated_first_call", "lost_statistics"):
        assert name in text[:mirrored], text
    # Replica 0 was traced in the first call, which is float32 in the first step only.
    expected = (
        *("precision_off 79 of 80", "gradient_precision_off 79 of 80", "lost_statistics 80 of 80"),
        *("repeated_random_numbers 40 of 80", "repeated_samples 1,280 of 2,560", "missed_samples 1,280 of 2,560"),
    )
    assert all(each in " ".join(text[mirrored:].split()) for each in expected), text
    assert [line.split() for line in rows if line.startswith(("2 ", "3 "))] == [["2", "none"], ["3", "none"]]

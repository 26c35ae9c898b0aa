"""The workloads that show frameworks' own defaults: what is counted, what cures it, and what they refuse.

Every run counts the cure beside the defect, by the same body and on the same inputs, and so is its own safe twin.
"""

from __future__ import annotations

import importlib.util
import threading
from typing import Any

import pytest
from command import Command, verdict
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainer.audit.guarantees import GUARANTEES
from trainer.audit.records import ReplicaRecord, RunRecord
from trainer.config import Config, ConfigError, Strategy, Train, Workload
from trainer.experiments import experiments
from trainer.rules import validate
from trainer.state.layout import EMPTY
from trainer.workloads.small import SMALL

WAIT_SECONDS = 30


def run(command: Command, workload: str, *arguments: str, status: int = 0) -> dict[str, Any]:
    """The verdict of the experiment that shows a workload."""
    temporary = command.folder / "tmp"
    temporary.mkdir(exist_ok=True)
    ended = command(f"experiment=defaults_{workload}", "hydra.run.dir=run", *arguments, TMPDIR=str(temporary))
    assert ended.returncode == status, ended.stdout + ended.stderr
    # torch keeps a folder there for each user.
    assert [path.name for path in temporary.iterdir() if not path.name.startswith("torchinductor_")] == []
    found = verdict(command.folder / "run")
    looked_at = {each["name"] for each in found["guarantees"] if each["status"] != "not_checked"}
    assert looked_at == set(SMALL[workload].guarantees)
    assert not any(each["claimed"] for each in found["guarantees"])
    return found


def evidence(found: dict[str, Any], guarantee: str) -> str:
    (text,) = [str(each["evidence"]) for each in found["guarantees"] if each["name"] == guarantee]
    return text


def counts(found: dict[str, Any]) -> list[tuple[str, int, int]]:
    return [(each["kind"], each["count"], each["of"]) for each in found["anomalies"]]


@pytest.mark.slow
def test_moving_statistics_drift_apart_in_every_copy_and_synchronized_ones_in_none(command: Command) -> None:
    found = run(command, "moving_statistics", "num_replicas=3", "train.steps=6", "data=synthetic")
    assert found["verdict"] == "anomaly"
    # Mean and variance of both other copies.
    assert counts(found) == [("drifted_statistics", 4, 4)]
    assert evidence(found, "batch_statistics_kept") == (
        "4 of 4 further copies of moving statistics are not copy 0's at the end, and some were not after 6 of 6 steps; "
        "with BatchNormalization(synchronized=True) 0 of 4, after 0 of 6; copies of 0 weights differ"
    )


@pytest.mark.slow
@pytest.mark.parametrize("num_replicas", [2, 3])
def test_dropout_draws_one_mask_for_all_replicas_and_derived_masks_are_everyones_own(
    command: Command, num_replicas: int
) -> None:
    found = run(command, "dropout_masks", f"num_replicas={num_replicas}", "train.steps=7", "train.batch_size=5")
    masks = 7 * num_replicas
    assert found["verdict"] == "anomaly"
    assert counts(found) == [
        ("repeated_random_numbers", masks, masks),
        # All but the first replica's at the first step, which every number of replicas begins with.
        ("dependent_random_numbers", masks - 1, masks),
    ]
    assert evidence(found, "rng_independent") == (
        f"of {masks} masks, drawn by another replica at the same step too, and other than one replica would draw: "
        f"{masks} and {masks - 7} built in the strategy's scope; 0 and {masks - 1} built outside of it; 0 and 0 derived"
    )


@pytest.mark.slow
def test_threads_share_the_default_dtype_and_generator(command: Command) -> None:
    found = run(command, "process_settings", "num_replicas=3", "train.steps=9")
    assert found["verdict"] == "anomaly"
    dtype, seed, draws = found["anomalies"]
    assert counts(found)[:2] == [("setting_off", 18, 27), ("setting_off", 18, 27)]
    assert dtype["where"] == "torch default dtype, replica 0: 0, replica 1: 9, replica 2: 9"
    assert dtype["witness"] == (
        "replica 1, step 0: torch default dtype (process) is torch.float64, asked was torch.float32"
    )
    assert seed["where"].startswith("torch seed, ")
    # Whose seed was the last is up to the threads; only that replica's first draws can be right.
    assert (draws["kind"], draws["of"]) == ("dependent_random_numbers", 27)
    assert 18 <= draws["count"] <= 27
    assert evidence(found, "settings_as_asked").endswith(
        "18 of 27 tensors made without a dtype and 0 of 27 made with one"
    )
    assert "with a torch.Generator for each replica 0 of 27 in this run" in evidence(found, "rng_independent")


@pytest.mark.slow
@pytest.mark.stress
def test_calls_on_one_module_are_counted_and_calls_on_copies_are_right(command: Command) -> None:
    found = run(command, "functional_call", "num_replicas=4", "train.steps=100")
    assert found["verdict"] in ("anomaly", "inconclusive")
    assert (found["verdict"] == "anomaly") == bool(found["anomalies"])
    for kind, count, of in counts(found):
        assert of == {"wrong_output": 400, "misplaced_parameter": 20}[kind]
        assert 1 <= count <= of
    assert evidence(found, "invariants_kept").endswith(
        "a copy of the module for each thread: 0 wrong; Keras' stateless_call on a shared model: 0"
    )


@pytest.mark.parametrize(("way", "wrong_a_step"), [("on_shared", 2), ("on_copy", 0)])
def test_calls_that_overlap_are_wrong_on_one_module_and_right_on_copies(way: str, wrong_a_step: int) -> None:
    from trainer.workloads.defaults.functional_call import Case, count

    num_replicas, steps = 3, 20
    case, alone = (Case(num_replicas, batch_size=4, seed=0) for _ in range(2))
    meeting = threading.Barrier(num_replicas, timeout=WAIT_SECONDS)

    def meet(*_: Any) -> None:
        meeting.wait()

    for module in (case.module, *case.modules):
        # All have put their parameters in before anybody computes, and have computed before anybody takes them out:
        # on one module all compute with the same, which are one replica's at most.
        module.register_forward_pre_hook(meet)
        module.register_forward_hook(meet)
    record = RunRecord(EMPTY, steps, [ReplicaRecord.empty(own, steps, num_replicas) for own in range(num_replicas)])
    config = Config(num_replicas=num_replicas, workload=Workload("functional_call"))
    found = count(getattr(case, way), alone.on_copy, config, record, threading.Event(), abort=meeting.abort)
    assert [each.calls for each in found] == [steps] * num_replicas
    wrong = sum(each.wrong for each in found)
    assert steps * wrong_a_step <= wrong <= (steps * num_replicas if wrong_a_step else 0)
    if way == "on_copy":
        assert case.misplaced() == []


@pytest.mark.slow
def test_what_is_required_is_violated_and_a_small_workload_says_nothing_of_training(command: Command) -> None:
    found = run(command, "process_settings", "train.steps=5", "require=[settings_as_asked]", status=1)
    assert found["verdict"] == "violated"
    (other,) = {each["evidence"] for each in found["guarantees"] if each["status"] == "not_checked"}
    assert other == "workload=process_settings does not look at it"
    assert found["metrics"].pop("steps_done") == 5
    assert set(found["metrics"].values()) == {None}
    said = found["run"]
    assert (said["workload"], said["engine"], said["state"]) == ("process_settings", "eager", {})
    assert [said[group] for group in ("update_mode", "model", "data", "optimizer", "precision")] == [None] * 5
    events = EventAccumulator(str(command.folder / "run"))
    events.Reload()
    tags = set(events.Tags()["tensors"])
    assert {"replicas/verdict_level", "replicas/verdict"} <= {tag.removesuffix("/text_summary") for tag in tags}
    assert not [tag for tag in tags if tag.startswith(("train/loss", "updates/", "speed/"))]


HEEDS_NOT = "does not go with workload={}, which does not heed it. Leave it out."
REFUSED = [
    (
        ["workload=moving_statistics"],
        "workload=moving_statistics needs strategy=mirrored: under threads no variable has a copy for each replica.",
    ),
    (
        ["workload=dropout_masks"],
        "workload=dropout_masks needs strategy=mirrored: under threads no seed has a copy for each replica.",
    ),
    (
        ["workload=functional_call", "strategy=mirrored"],
        "workload=functional_call needs strategy=threads: under mirrored one replica's Python code runs at a time.",
    ),
    (
        ["workload=process_settings", "strategy=mirrored"],
        "workload=process_settings needs strategy=threads: it is PyTorch's settings that it looks at.",
    ),
    (
        ["workload=process_settings", "num_replicas=1"],
        "workload=process_settings needs num_replicas of at least 2; got 1.",
    ),
    *(
        (["workload=functional_call", given], f"{told or given} {HEEDS_NOT.format('functional_call')}")
        for given, told in (
            ("update_mode=locked", ""),
            ("model=cnn", ""),
            ("model.hidden=[8]", ""),
            ("model._target_=mine.build", ""),
            ("data=synthetic", ""),
            ("data.held_out=0.5", ""),
            ("optimizer.learning_rate=0.2", ""),
            ("precision=mixed_bfloat16", ""),
            ("state.gradients=shared", ""),
            ("state=naive", "state.precision=naive"),
            ("audit=none", ""),
            ("audit.repeat=2", ""),
            ("train.evaluate_every=5", ""),
            ("train.capture=never", ""),
        )
    ),
    (
        ["workload=moving_statistics", "strategy=mirrored", "data._target_=mine.load"],
        f"data._target_=mine.load {HEEDS_NOT.format('moving_statistics')}",
    ),
    (
        ["workload=functional_call", "require=[no_lost_updates]"],
        "require=no_lost_updates cannot be checked by this run, which checks invariants_kept. Leave workload out to "
        "check the others.",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=[" ".join(arguments) for arguments, _ in REFUSED])
def test_what_a_small_workload_cannot_use_is_refused_in_one_line(
    command: Command, arguments: list[str], message: str
) -> None:
    ended = command(*arguments)
    assert (ended.returncode, ended.stderr) == (2, f"trainer: {message}\n")
    assert command.left() == []


def test_only_data_that_are_heeded_bound_the_joint_batch() -> None:
    train = Train(batch_size=5000)
    validate(Config(workload=Workload("functional_call"), train=train))
    with pytest.raises(ConfigError, match="is a joint batch of 10000 samples, but data=digits has 1438 to train on"):
        validate(Config(workload=Workload("moving_statistics"), strategy=Strategy("mirrored"), train=train))


def test_every_small_workload_has_a_module_an_experiment_and_guarantees() -> None:
    for name, own in SMALL.items():
        assert importlib.util.find_spec(f"trainer.workloads.{own.module}") is not None
        if own.module.startswith("defaults."):
            assert experiments().keys() & {f"defaults_{name}", f"field_{name}"}
        assert set(own.guarantees) <= set(GUARANTEES)

"""Whole runs through the command: what the file says, and that TensorBoard reads the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from command import Command, verdict
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainer.audit.guarantees import GUARANTEES
from trainer.audit.records import code

pytestmark = pytest.mark.slow
STEPS = 40


def scalars(command: Command) -> dict[str, dict[int, float]]:
    """Every scalar tag of the run's event file: step -> value."""
    accumulator = EventAccumulator(str(command.folder / "run"), size_guidance={"tensors": 0, "scalars": 0})
    accumulator.Reload()
    found = {}
    for tag in accumulator.Tags()["tensors"]:
        if accumulator.SummaryMetadata(tag).plugin_data.plugin_name == "scalars":
            rows = accumulator.Tensors(tag)
            found[tag] = {row.step: float(row.tensor_proto.float_val[0]) for row in rows}
    return found


def run(command: Command, *arguments: str) -> dict[str, Any]:
    ended = command("hydra.run.dir=run", f"train.steps={STEPS}", *arguments)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return verdict(command.folder / "run")


@pytest.mark.parametrize("strategy", ["threads", "mirrored"])
def test_a_run_is_evaluated_as_asked_and_tensorboard_reads_it(command: Command, strategy: str) -> None:
    found = run(command, f"strategy={strategy}", "train.evaluate_every=15", "train.log_every=4", "num_replicas=3")
    read = scalars(command)
    assert sorted(read["train/accuracy"]) == [15, 30, STEPS]
    assert read["train/accuracy"][STEPS] == pytest.approx(found["metrics"]["accuracy"])
    assert {0, 4, 36, STEPS - 1} <= set(read["train/loss"])
    assert read["train/loss"][STEPS - 1] == pytest.approx(found["metrics"]["loss"], rel=1e-5)
    assert {f"train/loss/replica_{replica}" for replica in range(3)} <= set(read)
    assert read["updates/kept"][STEPS] == found["metrics"]["updates_kept"] == 3 * STEPS


@pytest.mark.parametrize("strategy", ["threads", "mirrored"])
@pytest.mark.parametrize("capture", ["always", "never"])
def test_gradients_that_are_kept_between_other_steps_are_their_steps_own(
    command: Command, strategy: str, capture: str
) -> None:
    found = run(command, f"strategy={strategy}", f"train.capture={capture}", "audit.reference_every=3")
    kept = len(range(0, STEPS, 3)) * 2
    evidence = {each["name"]: (each["status"], each["evidence"]) for each in found["guarantees"]}
    # Computed again in a neighbour's place: another step's snapshot or batch would have other bits.
    assert evidence["gradients_unmixed"] == (
        "upheld",
        f"{kept} of {kept} gradients had the same bits when computed again",
    )
    assert evidence["joint_gradient"][0] == "upheld"


def test_both_strategies_are_evaluated_to_the_same_accuracy(command: Command) -> None:
    accuracies = []
    for strategy in ("threads", "mirrored"):
        ended = command(f"strategy={strategy}", f"hydra.run.dir={strategy}", f"train.steps={STEPS}", "model=cnn")
        assert ended.returncode == 0, ended.stdout + ended.stderr
        accuracies.append(verdict(command.folder / strategy)["metrics"]["accuracy"])
    assert accuracies[0] == accuracies[1]


@pytest.mark.parametrize("strategy", ["threads", "mirrored"])
def test_a_verdict_is_complete_and_precision_is_read_off_every_replica(command: Command, strategy: str) -> None:
    found = run(command, f"strategy={strategy}", "precision=mixed_bfloat16", "audit=full", "audit.repeat=2")
    assert found["schema"] == 1
    assert [each["name"] for each in found["guarantees"]] == list(GUARANTEES)
    assert found["precision"] == [
        {
            "replica": replica,
            "asked": "bfloat16",
            "computed": {"bfloat16": STEPS},
            "steps": STEPS,
            "steps_off": 0,
            "gradients": {"bfloat16": STEPS},
            "mode_at_entry": {"none": STEPS},
            "mode_at_exit": {"none": STEPS},
        }
        for replica in range(2)
    ]
    assert len(found["final_parameters_sha256"]) == 64
    assert found["outcomes_distinct"] == 1
    assert found["run"]["engine"] == {"threads": "torchscript", "mirrored": "tf.function"}[strategy]
    assert found["run"]["threads_per_replica"] >= 1

    with np.load(command.folder / "run" / "history.npz", allow_pickle=False) as history:
        assert history["losses"].shape == (2, STEPS)
        # All-reduce: at step s everybody has read and written version 2 s.
        expected = np.tile(2 * np.arange(STEPS), (2, 1))
        np.testing.assert_array_equal(history["read_version"], expected)
        np.testing.assert_array_equal(history["write_version"], expected)
        assert (history["versions"] == np.arange(STEPS)[:, None]).all()
        np.testing.assert_array_equal(history["batch"], expected + np.arange(2)[:, None])
        for name in ("asked", "computed_in", "gradients_in"):
            assert (history[name] == code("bfloat16")).all()
        assert not history["mode_at_entry"].any()


def test_a_crash_in_a_replica_breaks_the_run_and_says_where(command: Command) -> None:
    (command.folder / "broken.py").write_text(
        "from trainer.updates.transactions import Alone\n"
        "class Broken(Alone):\n"
        "    def step(self, replica, compute):\n"
        "        compute(replica)\n"
        "        if replica.replica_id == 1: raise KeyError('boom')\n"
    )
    ended = command("update_mode._target_=broken.Broken", "hydra.run.dir=run")
    assert ended.returncode == 3
    found = verdict(command.folder / "run")
    assert found["verdict"] == "broken"
    assert found["error"] == {
        "kind": "crash",
        "message": "replica 1 raised KeyError: 'boom'",
        "replica": 1,
        "step": 0,
    }
    assert "Traceback" in (command.folder / "run" / "console.log").read_text()


def test_a_deadlock_is_told_with_the_stacks(command: Command) -> None:
    (command.folder / "stuck.py").write_text(
        "from trainer.updates.transactions import Alone\n"
        "class Stuck(Alone):\n"
        "    def step(self, replica, compute):\n"
        "        self.lock.acquire()\n"
        "        compute(replica)\n"
    )
    ended = command("update_mode._target_=stuck.Stuck", "watchdog.seconds=1", "hydra.run.dir=run")
    assert ended.returncode == 3
    found = verdict(command.folder / "run")
    assert (found["verdict"], found["error"]["kind"]) == ("broken", "deadlock")
    assert "stuck.py" in (command.folder / "run" / "console.log").read_text()

"""The worked examples of bringing one's own parts, run as the README runs them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from command import Command, verdict

EXAMPLES = Path(__file__).resolve().parent.parent / "scripts" / "examples"
QUICK = ["train.steps=60", "hydra.run.dir=run"]
HELD = "require=[no_lost_updates,no_torn_reads,atomic_updates]"


@pytest.fixture
def examples(command: Command) -> Command:
    """A command in a folder of the user's that holds the examples."""
    shutil.copytree(EXAMPLES, command.folder, dirs_exist_ok=True)
    return command


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["model._target_=bring_model.keras_model"],
        ["model._target_=bring_model.keras_model", "strategy=mirrored", "+model.arguments.width=32"],
        ["model._target_=bring_model.torch_module"],
        ["model._target_=bring_model.torch_module", "precision=mixed_bfloat16", "update_mode=locked"],
        ["data._target_=bring_data.two_moons", "model.hidden=[32]", "+data.arguments.samples=500"],
        ["update_mode._target_=bring_update_mode.TicketLocked", HELD],
        ["workload._target_=own_loop.Loop", HELD],
    ],
    ids=" ".join,
)
def test_an_example_is_upheld(examples: Command, arguments: list[str]) -> None:
    ended = examples(*arguments, *QUICK)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = verdict(examples.folder / "run")
    assert found["verdict"] == "upheld"
    assert found["metrics"]["updates_kept"] == 120


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["update_mode._target_=bring_update_mode.TicketLocked", "+update_mode.arguments.careless=true"],
        ["workload._target_=own_loop.Loop", "+workload.arguments.careless=true"],
    ],
    ids=" ".join,
)
def test_a_careless_example_is_caught(examples: Command, arguments: list[str]) -> None:
    # Free-running, but eight replicas that write back what they read long ago lose updates in every run.
    ended = examples(*arguments, HELD, "num_replicas=8", "train.batch_size=16", *QUICK)
    assert ended.returncode == 1, ended.stdout + ended.stderr
    found = verdict(examples.folder / "run")
    assert found["verdict"] == "violated"
    assert found["anomalies"][0]["kind"] == "overwritten_update"


SPARE = """
import keras

class Spare(keras.Model):
    def __init__(self, classes):
        super().__init__()
        self.flat, self.out, self.spare = keras.layers.Flatten(), keras.layers.Dense(classes), keras.layers.Dense(3)
        self.spare.build((None, 5))

    def call(self, x):
        return self.out(self.flat(x))

def build(*, input_shape, num_classes, seed, dtype_policy):
    return Spare(num_classes)
"""


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["threads", "mirrored"])
def test_a_weight_that_the_loss_does_not_depend_on_stays_as_it_was(command: Command, strategy: str) -> None:
    (command.folder / "spare.py").write_text(SPARE)
    ended = command("model._target_=spare.build", f"strategy={strategy}", "audit=full", *QUICK)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert verdict(command.folder / "run")["verdict"] == "upheld"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["model._target_=bring_models.keras_model"],
            "model._target_=bring_models.keras_model cannot be found: no module 'bring_models' in the working "
            "directory or the environment.",
        ),
        (
            ["model._target_=bring_model.keras_modell"],
            "model._target_=bring_model.keras_modell cannot be found: bring_model has no 'keras_modell'. "
            "Did you mean 'keras_model'?",
        ),
        (["model._target_=keras_model"], "model._target_ takes MODULE.NAME, as in my_parts.build; got 'keras_model'."),
        (
            ["model._target_=bring_model.torch_module", "strategy=mirrored"],
            "model._target_=bring_model.torch_module must return a keras.Model under strategy=mirrored; "
            "got Sequential.",
        ),
        (
            ["update_mode=custom"],
            "update_mode=custom needs update_mode._target_=MODULE.NAME, which says what to bring.",
        ),
        (
            ["update_mode._target_=bring_update_mode.TicketLocked", "strategy=mirrored"],
            "update_mode=custom needs strategy=threads: a mode of your own is written over the vector that threads "
            "share. strategy=mirrored takes all_reduce, unreduced, first_replica, reassigned_sum, unscaled_sum.",
        ),
        (
            ["workload._target_=own_loop.Loop", "update_mode=locked"],
            "update_mode=locked does not go with workload=custom: a loop of your own does its own locking. "
            "Leave update_mode out.",
        ),
        (
            ["workload._target_=own_loop.Loop", "strategy=mirrored"],
            "workload=custom needs strategy=threads: it is a loop over threads of one process.",
        ),
        (
            ["data._target_=bring_model.keras_model"],
            None,
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_brought_is_told_in_one_line(
    examples: Command, arguments: list[str], message: str | None
) -> None:
    ended = examples(*arguments, *QUICK)
    assert ended.returncode == (2 if message else 3), ended.stdout + ended.stderr
    if message:
        assert message in " ".join((ended.stdout + ended.stderr).split())
        assert "Traceback" not in ended.stdout + ended.stderr


PAGE = (EXAMPLES.parent.parent / "docs" / "schedules.md").read_text()
RACE = ["model=linear", "train.steps=1", "require=[no_lost_updates]"]


@pytest.mark.slow
def test_the_race_of_the_page_is_found_in_as_many_orders_as_it_says_and_replayed_by_its_line(
    examples: Command,
) -> None:
    ended = examples("update_mode._target_=checked_write.Racy", *RACE, "schedule=search", "hydra.run.dir=run")
    assert ended.returncode == 1, ended.stdout + ended.stderr
    found = verdict(examples.folder / "run")
    lost = next(each for each in found["anomalies"] if each["kind"] == "lost_update")
    assert f"lost_update: {lost['count']:,} of {lost['of']:,}" in PAGE
    # The page has the picture and the line as the console shows them, wrapped.
    assert all(line.strip() in PAGE for line in lost["witness"].splitlines()[1:])
    words = lost["replay"].split()
    assert all(word in PAGE for word in words)
    replayed = examples(*[word.strip("'") for word in words[3:]], "audit.repeat=3", "hydra.run.dir=again")
    assert replayed.returncode == 1, replayed.stdout + replayed.stderr
    again = verdict(examples.folder / "again")
    assert again["final_parameters_sha256"] == found["final_parameters_sha256"] is not None
    assert again["outcomes_distinct"] == 1


@pytest.mark.slow
def test_the_race_of_the_page_is_fixed_in_every_order(examples: Command) -> None:
    ended = examples("update_mode._target_=checked_write.Safe", *RACE, "schedule=search", "hydra.run.dir=run")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    kept = next(each for each in verdict(examples.folder / "run")["guarantees"] if each["name"] == "no_lost_updates")
    assert (kept["status"], kept["covers"]["kind"]) == ("upheld", "all_orders")
    assert f"all {kept['covers']['orders']:,} orders" in PAGE

"""Runs under a schedule, through the real command: what a search covers, finds and keeps, and that replays show it."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from command import ROOT, Command, verdict

pytestmark = pytest.mark.slow

EXAMPLES = ROOT / "scripts" / "examples"
SMALL = ("model=linear", "train.steps=1")
SEARCH = (*SMALL, "schedule=search")
ALL = {"kind": "all_orders", "preemptions": None}

# What users bring.
PARTS = '''
import threading
from pathlib import Path

from trainer.updates.transactions import Alone


class Mine(Alone):
    """Right: one section from reading to writing, counted."""

    def __init__(self, shared, replicas):
        super().__init__(shared, replicas)
        self.guard, self.count = threading.Lock(), 0

    def step(self, replica, compute):
        with self.guard:
            self.shared.copy_to(replica)
            compute(replica)
            self.count += 1
            self.shared.add(replica, self.shared.delta(replica, base=self.shared.vector))


class Late(Mine):
    """Gives up when another came first."""

    def step(self, replica, compute):
        before = self.count
        super().step(replica, compute)
        if self.count != before + 1:
            raise RuntimeError(f"{self.count - before - 1} came first")


class Opposite(Mine):
    """Takes a second lock the other way round."""

    def __init__(self, shared, replicas):
        super().__init__(shared, replicas)
        self.other = threading.Lock()

    def step(self, replica, compute):
        outer, inner = (self.guard, self.other) if replica.replica_id else (self.other, self.guard)
        with outer, inner:
            self.shared.copy_to(replica)
            compute(replica)
            self.shared.add(replica, self.shared.delta(replica, base=self.shared.vector))


class Hides(Mine):
    """Writes where nobody can see it."""

    def step(self, replica, compute):
        self.shared.copy_to(replica)
        compute(replica)
        self.shared.vector.numpy()[:] -= 0.1 * replica.contribution.numpy()


class Told(Alone):
    """Loses updates, and leaves a mark when it has been made 50 times."""

    made = 0
    whole_snapshot = True

    def __init__(self, shared, replicas):
        super().__init__(shared, replicas)
        Told.made += 1
        if Told.made == 50:
            Path("well_under_way").touch()

    def step(self, replica, compute):
        self.shared.copy_to(replica)
        compute(replica)
        self.shared.replace(replica, replica.snapshot + self.shared.delta(replica, base=replica.snapshot))
'''


@dataclass
class Ran:
    status: int
    output: str
    errors: str
    verdict: dict[str, Any]

    @property
    def told(self) -> str:
        """All that was printed, on one line."""
        return " ".join((self.output + self.errors).split())

    def guarantee(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = next(each for each in self.verdict["guarantees"] if each["name"] == name)
        return found

    def anomaly(self, kind: str) -> dict[str, Any]:
        found: dict[str, Any] = next(each for each in self.verdict["anomalies"] if each["kind"] == kind)
        return found


@dataclass
class Runs:
    """Makes each run once, in one folder, for as many tests as ask for it."""

    command: Command
    made: dict[tuple[str, ...], Ran] = field(default_factory=dict)

    def __call__(self, *arguments: str) -> Ran:
        if arguments not in self.made:
            name = f"run_{len(self.made)}"
            ended = self.command(*arguments, f"hydra.run.dir={name}")
            folder = self.command.folder / name
            found = verdict(folder) if (folder / "verdict.json").exists() else {}
            self.made[arguments] = Ran(ended.returncode, ended.stdout, ended.stderr, found)
        return self.made[arguments]

    def again(self, anomaly: dict[str, Any], *more: str) -> Ran:
        """Run an anomaly's own replay line, as it stands."""
        words = shlex.split(anomaly["replay"])
        assert words[:3] == ["python", "-m", "trainer"]
        given = [word for word in words[3:] if not word.startswith("hydra.run.dir=")]
        return self(*given, *more)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("explore")
    shutil.copytree(EXAMPLES, folder, dirs_exist_ok=True)
    (folder / "parts.py").write_text(PARTS)
    return Runs(Command(folder))


# Every order.


def test_a_search_counts_the_orders_that_break_a_mode(runs: Runs) -> None:
    found = runs(*SEARCH, "update_mode=overwrite")
    assert (found.status, found.verdict["verdict"]) == (0, "anomaly"), found.told
    for name, broken in (("no_lost_updates", 66), ("no_torn_reads", 12), ("atomic_updates", 20)):
        guarantee = found.guarantee(name)
        assert guarantee["covers"] == {**ALL, "orders": 70}
        assert guarantee["status"] == "anomaly"
        assert guarantee["evidence"].startswith(f"broken in {broken} of 70 orders")
    lost = found.anomaly("lost_update")
    assert (lost["count"], lost["of"]) == (66, 70)
    assert "which it read before" in lost["witness"]
    assert found.verdict["metrics"]["orders"] == 70


def test_a_search_upholds_a_safe_mode_over_all_orders(runs: Runs) -> None:
    found = runs(*SEARCH, "update_mode=locked")
    assert (found.status, found.verdict["verdict"], found.verdict["anomalies"]) == (0, "upheld", []), found.told
    for name in ("no_lost_updates", "no_torn_reads", "atomic_updates", "no_deadlock"):
        guarantee = found.guarantee(name)
        assert (guarantee["claimed"], guarantee["status"]) == (True, "upheld")
        assert guarantee["covers"] == {**ALL, "orders": 6}


def test_what_is_required_and_broken_in_an_order_fails_the_run(runs: Runs) -> None:
    found = runs(*SEARCH, "update_mode=overwrite", "require=[no_lost_updates]")
    assert (found.status, found.verdict["verdict"]) == (1, "violated"), found.told
    assert found.guarantee("no_lost_updates")["status"] == "violated"
    assert found.guarantee("no_torn_reads")["status"] == "anomaly"


def test_too_many_orders_are_covered_up_to_a_number_of_preemptions(runs: Runs) -> None:
    found = runs(*SMALL[:1], "train.steps=2", "schedule=search", "update_mode=overwrite", "schedule.max_operations=600")
    covers = found.guarantee("no_lost_updates")["covers"]
    assert covers["kind"] == "bounded"
    assert covers["preemptions"] in (0, 1)
    assert 0 < covers["orders"] < 12870  # of the 16 operations
    assert found.anomaly("lost_update")["of"] == covers["orders"]
    assert "preemption" in found.told


# One order.


def test_the_replay_line_of_a_verdict_shows_the_same_again(runs: Runs) -> None:
    lost = runs(*SEARCH, "update_mode=overwrite").anomaly("lost_update")
    first, second = runs.again(lost), runs.again(lost, "fail_on=anomaly")
    assert (first.status, second.status) == (0, 1), first.told
    for replayed in (first, second):
        assert replayed.anomaly("lost_update")["witness"] == lost["witness"]
        covers = replayed.guarantee("no_lost_updates")["covers"]
        assert (covers["kind"], covers["orders"]) == ("this_run", 1)
    digests = [each.verdict["final_parameters_sha256"] for each in (first, second)]
    assert digests[0] == digests[1] is not None


def test_an_order_replayed_100_times_ends_in_the_same_bits_100_times(runs: Runs) -> None:
    found = runs.again(runs(*SEARCH, "update_mode=overwrite").anomaly("lost_update"), "audit.repeat=100")
    assert found.verdict["outcomes_distinct"] == 1
    assert found.guarantee("same_bits")["evidence"]
    once = runs.again(runs(*SEARCH, "update_mode=overwrite").anomaly("lost_update"))
    assert found.verdict["final_parameters_sha256"] == once.verdict["final_parameters_sha256"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train.seed=1"], "schedule.token is of another configuration ("),
        (["num_replicas=3"], "schedule.token is of num_replicas=2; got num_replicas=3."),
        (["schedule.token=nonsense"], "schedule.token=nonsense is no token: those begin with s1."),
        (["schedule.token=s0.2.000000.a1ab"], "is of format 0, and this version reads format 1"),
        (["schedule.granularity=memory"], "schedule.token is of another configuration ("),
        (["audit=none"], "audit=none looks at nothing"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_token_of_another_run_is_refused_in_one_line(runs: Runs, arguments: list[str], message: str) -> None:
    lost = runs(*SEARCH, "update_mode=overwrite").anomaly("lost_update")
    token = next(word for word in shlex.split(lost["replay"]) if word.startswith("schedule.token="))
    given = {word.partition("=")[0]: word for word in ("schedule=replay", token, *arguments)}
    before = runs.command.left()
    ended = runs.command(*SMALL, "update_mode=overwrite", *given.values(), "hydra.run.dir=refused")
    assert ended.returncode == 2
    assert message in " ".join((ended.stdout + ended.stderr).split())
    assert len(ended.stderr.splitlines()) == 1
    assert "Traceback" not in ended.stdout + ended.stderr
    assert runs.command.left() == before


def test_a_replay_of_code_that_was_changed_says_where_it_differs(runs: Runs) -> None:
    given = (*SMALL, "update_mode._target_=changed.Mine")
    changed = runs.command.folder / "changed.py"
    changed.write_text(PARTS.replace("with self.guard:", "if True:"))
    found = runs(*given, "schedule=write_cycle").anomaly("write_cycle")
    changed.write_text(PARTS)
    replayed = runs.again(found)
    assert replayed.status == 2
    assert "should be replica" in replayed.told
    assert "acquire lock of Mine" in replayed.told
    assert "Traceback" not in replayed.told
    assert replayed.verdict["error"]["kind"] == "refused"


# Some orders.


def test_orders_that_are_drawn_depend_on_the_seed_and_on_nothing_else(runs: Runs) -> None:
    given = ("model=linear", "train.steps=4", "update_mode=overwrite", "schedule=seeded", "schedule.orders=30")
    first, second = runs(*given), runs(*given, "fail_on=never")
    other = runs(*given, "schedule.seed=1000")
    told = [
        [(each["kind"], each["count"], each["witness"]) for each in ran.verdict["anomalies"]] for ran in (first, second)
    ]
    assert told[0] == told[1]
    assert first.verdict["final_parameters_sha256"] == second.verdict["final_parameters_sha256"]
    counts = [[each["count"] for each in ran.verdict["anomalies"]] for ran in (first, other)]
    assert counts[0] != counts[1]
    covers = first.guarantee("no_lost_updates")["covers"]
    assert (covers["kind"], covers["orders"]) == ("this_run", 31)
    assert "with 1 preemption" in first.anomaly("lost_update")["where"]  # of the many that were drawn


# Recipes and samplers, many in one process.


def recipe(name: str, *overrides: str, **more: Any) -> dict[str, Any]:
    return {
        "overrides": [f"schedule={name}", *SMALL, "schedule.max_operations=20000", *overrides],
        "require": [],
        **more,
    }


LOCKED = "update_mode=locked"
BFLOAT16 = ("precision=mixed_bfloat16", "precision.enabled_in=replica")
CNN = ("model=cnn", "model.filters=[4]", "model.dropout=0")


def brought(name: str) -> tuple[str, str]:
    return ("update_mode=custom", f"update_mode._target_=defects.{name}")


# Recipe -> what shows it, by one of these kinds, and the safe form of that.
RECIPES: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "lost_update": (("lost_update",), ("update_mode=overwrite",), (LOCKED,)),
    "torn_read": (("fractured_read",), ("update_mode=write_locked",), (LOCKED,)),
    "write_cycle": (("write_cycle",), ("update_mode=lock_free",), (LOCKED,)),
    "stale_gradient": (("stale_gradient",), (LOCKED,), ("update_mode=serialized",)),
    "write_skew": (("write_skew",), brought("EachItsOwnUnlocked"), brought("EachItsOwn")),
    "scope_leak": (("mode_leak",), (LOCKED, "state.precision=process_global", *BFLOAT16), (LOCKED, *BFLOAT16)),
    "wrong_precision": (("precision_off",), (LOCKED, "state.precision=locked_global", *BFLOAT16), (LOCKED, *BFLOAT16)),
    "mixed_gradient": (("mixed_gradient",), (LOCKED, "state.gradients=shared"), (LOCKED,)),
    "repeated_first_call": (
        ("repeated_first_call",),
        (LOCKED, "state.first_call=instance_set", *BFLOAT16[:1]),
        (LOCKED, "state.first_call=double_checked", *BFLOAT16[:1]),
    ),
    "repeated_samples": (("duplicate_sample",), (LOCKED, "state.cursor=shared_iterator"), (LOCKED,)),
    "lost_statistics": (("lost_statistics",), (LOCKED, "state.batch_statistics=shared", *CNN), (LOCKED, *CNN)),
    "deadlock": (("deadlock",), brought("InOppositeOrders"), brought("InOneOrder")),
}
SAMPLED = ("schedule=seeded", "model=linear", "train.steps=2", "schedule.orders=40", "schedule.seed=3")
SAMPLERS = ("random_walk", "priorities", "both")


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    cases = {}
    for name, (_, unsafe, safe) in RECIPES.items():
        cases[name] = recipe(name, *unsafe)
        cases[f"{name}: safe"] = recipe(name, *safe)
    for sampler in SAMPLERS:
        for mode in ("overwrite", "locked"):
            given = [*SAMPLED, f"update_mode={mode}", f"schedule.sampler={sampler}"]
            cases[f"{sampler} {mode}"] = {"overrides": given, "require": []}
    folder = tmp_path_factory.mktemp("recipes")
    given, output = folder / "cases.json", folder / "found.json"
    given.write_text(json.dumps(cases))
    command = [sys.executable, str(Path(__file__).with_name("search_all.py")), str(given), str(output)]
    environment = os.environ | {"KERAS_BACKEND": "torch", "PYTHONPATH": str(ROOT)}
    subprocess.run(command, env=environment, check=True, timeout=170)
    found: dict[str, dict[str, Any]] = json.loads(output.read_text())
    return found


@pytest.mark.timeout(180)  # whichever of those that share it comes first runs everything
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_ends_at_the_first_order_that_shows_what_it_names(
    searched: dict[str, dict[str, Any]], name: str
) -> None:
    found, (kinds, _, _) = searched[name], RECIPES[name]
    assert (found["error"], found["kind"], found["orders"]) == (None, "replayed", 1)
    assert any(label.endswith(f" {kind}") for label in found["counts"] for kind in kinds)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_that_no_order_follows_ends_as_a_search(searched: dict[str, dict[str, Any]], name: str) -> None:
    found, (kinds, _, _) = searched[f"{name}: safe"], RECIPES[name]
    assert (found["error"], found["kind"]) == (None, "all_orders")
    assert not any(label.endswith(f" {kind}") for label in found["counts"] for kind in kinds)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_finds_a_lost_update_and_shrinks_it_to_one_preemption(
    searched: dict[str, dict[str, Any]], sampler: str
) -> None:
    found = searched[f"{sampler} overwrite"]
    assert (found["kind"], found["orders"]) == ("sampled", 41)
    assert found["counts"]["no_lost_updates lost_update"] > 1
    assert found["examples"]["no_lost_updates lost_update"]["preemptions"] == 1
    safe = searched[f"{sampler} locked"]
    assert (safe["kind"], safe["counts"].get("no_lost_updates", 0)) == ("sampled", 0)


# What goes wrong.


def test_an_exception_in_some_orders_only_is_told_with_the_order(runs: Runs) -> None:
    found = runs(*SEARCH, "update_mode._target_=parts.Late")
    assert (found.status, found.verdict["verdict"]) == (3, "broken"), found.told
    error = found.verdict["error"]
    assert (error["kind"], error["step"]) == ("crash", 0)
    assert error["replica"] in (0, 1)
    assert f"replica {error['replica']} raised RuntimeError: 1 came first" in error["message"]
    assert "Traceback" not in found.output.partition("crash in replica")[2]
    token = error["message"].partition("schedule.token=")[2].rstrip(")")
    replayed = runs(*SMALL, "update_mode._target_=parts.Late", "schedule=replay", f"schedule.token={token}")
    assert (replayed.status, replayed.verdict["error"]["message"]) == (3, error["message"]), replayed.told


def test_an_access_that_nobody_can_see_is_told_by_its_name(runs: Runs) -> None:
    found = runs(*SEARCH, "update_mode._target_=parts.Hides")
    assert found.status == 2
    message = found.verdict["error"]["message"]
    assert "a schedule cannot see what is done through .numpy() of the shared vector" in message
    assert "Use torch's operators on it, or a clone()" in message
    assert "\n" not in message
    assert "Traceback" not in found.told


def test_a_deadlock_is_a_finding_with_a_cycle_and_both_stacks_and_is_replayed_as_one(runs: Runs) -> None:
    given = "update_mode._target_=parts.Opposite"
    found = runs(*SEARCH, given)
    assert (found.status, found.verdict["verdict"]) == (0, "anomaly"), found.told
    deadlock = found.anomaly("deadlock")
    assert 0 < deadlock["count"] < deadlock["of"]
    assert deadlock["witness"].count("which replica") == 2
    assert deadlock["witness"].count("in step\n    with outer, inner:") == 2
    # The one order that there is then does not end.
    replayed = runs.again(deadlock, "fail_on=never")
    assert (replayed.status, replayed.verdict["verdict"]) == (3, "broken"), replayed.told
    assert replayed.verdict["error"]["kind"] == "deadlock"
    assert replayed.verdict["error"]["message"] == deadlock["witness"].partition("\n")[0]
    assert replayed.anomaly("deadlock")["witness"] == deadlock["witness"]
    assert replayed.verdict["final_parameters_sha256"] is None


def test_ctrl_c_keeps_what_a_search_has_found(runs: Runs) -> None:
    running = runs.command.start(
        *("model=linear", "train.steps=4", "num_replicas=3", "update_mode._target_=parts.Told"),
        *("schedule=search", "schedule.preemptions=9", "schedule.max_operations=1000000000", "hydra.run.dir=long"),
    )
    running.wait_for((runs.command.folder / "well_under_way").exists)
    ended = running.end_by(signal.SIGINT, group=True)
    assert (ended.status, ended.left) == (130, [])
    found = verdict(runs.command.folder / "long")
    assert (found["verdict"], found["error"]["kind"]) == ("broken", "interrupted")
    kept = {each["kind"]: each for each in found["anomalies"]}
    assert kept["lost_update"]["count"] > 0
    assert "schedule.token=s1.3." in kept["lost_update"]["replay"]
    (lost,) = (each for each in found["guarantees"] if each["name"] == "no_lost_updates")
    assert lost["status"] == "anomaly"
    assert lost["covers"]["kind"] in ("this_run", "bounded")


# A user's own code.


def test_an_own_mode_with_a_lock_and_a_counter_is_upheld_over_all_orders(runs: Runs) -> None:
    found = runs(*SEARCH, "update_mode._target_=parts.Mine", "require=[no_lost_updates,no_torn_reads,fresh_gradients]")
    assert (found.status, found.verdict["verdict"]) == (0, "upheld"), found.told
    assert found.guarantee("no_lost_updates")["covers"] == {**ALL, "orders": 2}


TICKETS = (*SEARCH, "update_mode._target_=bring_update_mode.TicketLocked", "require=[no_lost_updates]")


def test_an_own_mode_with_a_condition_is_upheld_and_its_careless_twin_is_not(runs: Runs) -> None:
    careful, careless = runs(*TICKETS), runs(*TICKETS, "+update_mode.arguments.careless=true")
    assert (careful.status, careful.verdict["verdict"]) == (0, "upheld"), careful.told
    assert careful.guarantee("no_lost_updates")["covers"]["kind"] == "all_orders"
    assert (careless.status, careless.verdict["verdict"]) == (1, "violated"), careless.told


LOOP = (
    "workload._target_=own_loop.Loop",
    "train.steps=1",
    "schedule=search",
    "require=[no_lost_updates,no_torn_reads]",
)


def test_an_own_loop_is_upheld_and_its_careless_twin_is_not(runs: Runs) -> None:
    careful, careless = runs(*LOOP), runs(*LOOP, "+workload.arguments.careless=true")
    assert (careful.status, careful.verdict["verdict"]) == (0, "upheld"), careful.told
    # As of any two that read under a lock and then write under it: what threads copy at first is no decision.
    assert careful.guarantee("no_torn_reads")["covers"] == {**ALL, "orders": 6}
    assert (careless.status, careless.verdict["verdict"]) == (1, "violated"), careless.told
    replayed = runs.again(careless.anomaly("lost_update"))
    assert (replayed.status, replayed.anomaly("lost_update")["of"]) == (1, 1), replayed.told
    assert replayed.anomaly("lost_update")["witness"] == careless.anomaly("lost_update")["witness"]

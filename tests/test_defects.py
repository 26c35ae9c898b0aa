"""Planted defects: whatever one line does wrong in an update mode or a state holder is found, and nothing is found in
its safe form, by the same search over all orders.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from command import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]  # whichever test comes first runs everything

Found = dict[str, dict[str, Any]]
KEEPS = ("no_lost_updates", "no_torn_reads", "atomic_updates", "no_deadlock")
FRESH = (*KEEPS, "fresh_gradients")
IN_PIECES = ("schedule.granularity=memory", "schedule.chunks=1")
TWO_STEPS = ("train.steps=2",)
# Too many orders for all of them: those with at most two preemptions, or as many as there is time for.
SOME = "schedule.max_operations=4000"
STATISTICS = ("model=cnn", "model.filters=[4]", "model.dropout=0")
BFLOAT16 = ("precision=mixed_bfloat16",)
IN_REPLICAS = (*BFLOAT16, "precision.enabled_in=replica", SOME)
DROPPING = ("model=mlp", "model.hidden=[4]", "model.dropout=0.1")


@dataclass(frozen=True)
class Planted:
    """A defect.

    Attributes:
        safe: the same without it: a class of `defects.py`, or a built-in mode or mechanism.
        seen: every `GUARANTEE KIND` that it must be seen to break.
        claims: what the safe form keeps.
    """

    safe: str
    seen: tuple[str, ...]
    claims: tuple[str, ...] = KEEPS
    overrides: tuple[str, ...] = ()

    @property
    def guarantees(self) -> list[str]:
        return list(self.claims)


LOST = "no_lost_updates lost_update"
FRACTURED = "no_torn_reads fractured_read"
CYCLE = "atomic_updates write_cycle"
DEADLOCK = "no_deadlock deadlock"

MODES = {
    "BaseUnlocked": Planted("Replacing", (LOST,)),
    "BaseUnderALockOfItsOwn": Planted("Replacing", (LOST,)),
    "WriteUnlocked": Planted("Replacing", (LOST, FRACTURED, CYCLE)),
    "SnapshotUnlocked": Planted("Replacing", (FRACTURED,)),
    "WriteLockedOnly": Planted("Replacing", (LOST, FRACTURED)),
    "LockPerReplica": Planted("LockOfItsOwn", (LOST, FRACTURED, CYCLE)),
    "AddsTwice": Planted("locked", ("no_lost_updates multiplied_update",)),
    "WritesUnderTheReadLock": Planted("ReadsAndWrites", (LOST, FRACTURED, CYCLE), overrides=(SOME,)),
    "OneVariableUnlocked": Planted("per_variable_lock", (LOST,), ("no_lost_updates", "no_deadlock"), IN_PIECES),
    "StatisticsOutside": Planted(
        "StatisticsInside",
        (LOST, FRACTURED, CYCLE, "batch_statistics_kept lost_statistics"),
        (*KEEPS, "batch_statistics_kept"),
        (*STATISTICS, "schedule.preemptions=1", "schedule.max_operations=400"),
    ),
    "InOppositeOrders": Planted("InOneOrder", (DEADLOCK,), FRESH),
    "TakenTwicePlain": Planted("TakenTwice", (DEADLOCK,), FRESH),
    "WaitsOnce": Planted("Occupied", (LOST, FRACTURED, CYCLE)),
    "WakesNobody": Planted("Occupied", (DEADLOCK,)),
    "WithoutTheFirstBarrier": Planted(
        "Joint", ("no_lost_updates dropped_update", "no_torn_reads circular_information_flow"), FRESH
    ),
    "WithoutTheSecondBarrier": Planted(
        "Joint", (FRACTURED, "no_torn_reads torn_tensor", "fresh_gradients stale_gradient"), FRESH, TWO_STEPS
    ),
    "TooFewParties": Planted(
        "Joint", ("no_lost_updates dropped_update", "no_torn_reads circular_information_flow"), FRESH
    ),
    "TooManyParties": Planted("Joint", (DEADLOCK,), FRESH),
    "ShareTwice": Planted("Joint", ("no_lost_updates multiplied_update",), FRESH),
    "OneShareOfTwo": Planted("Joint", ("no_lost_updates overwritten_update",), FRESH),
    "Unchecked": Planted("optimistic", (FRACTURED, "fresh_gradients stale_gradient"), FRESH),
    "CheckedTooEarly": Planted("optimistic", ("fresh_gradients stale_gradient",), FRESH),
    "CountedOnce": Planted("optimistic", (FRACTURED,), FRESH, (*TWO_STEPS, "schedule.max_operations=20000")),
    "ReadOnce": Planted("Sequenced", (FRACTURED,)),
    # Buffers are nobody's operations: what shows is what comes of them.
    "OneDelta": Planted("OwnDelta", ("no_lost_updates dropped_update", "no_lost_updates multiplied_update"), (*KEEPS,)),
    "OneSnapshot": Planted(
        "locked",
        ("gradients_unmixed mixed_gradient",),
        (*KEEPS, "gradients_unmixed"),
        (*TWO_STEPS, "audit.reference_every=1"),
    ),
}
LEAKS = ("precision_as_asked mode_leak", "precision_as_asked mode_left_on")
HOLDERS = {
    "precision EndsLocked": Planted(
        # A leak takes two preemptions among some hundred operations: looked for until there is one.
        "WholeScope",
        LEAKS,
        ("precision_as_asked",),
        (*IN_REPLICAS, "schedule=scope_leak", "schedule.max_operations=12000"),
    ),
    "precision PutsBackItsOwn": Planted("WholeScope", LEAKS, ("precision_as_asked",), IN_REPLICAS),
    "precision PutsNothingBack": Planted("WholeScope", LEAKS, ("precision_as_asked",), IN_REPLICAS),
    "first_call SetTooLate": Planted(
        "double_checked", ("initialized_once repeated_first_call",), ("initialized_once", *KEEPS), BFLOAT16
    ),
    "first_call CheckedOnce": Planted(
        "double_checked", ("initialized_once repeated_first_call",), ("initialized_once", *KEEPS), BFLOAT16
    ),
    "cursor LookLocked": Planted(
        "LockedIterator",
        ("samples_once duplicate_sample", "samples_once repeated_samples"),
        ("samples_once", *KEEPS),
    ),
    "cursor MovedTwice": Planted("LockedIterator", ("samples_once skipped_sample",), ("samples_once", *KEEPS)),
    "gradients ClearedAfterUse": Planted(
        "LockedGrad", ("gradients_unmixed mixed_gradient",), ("gradients_unmixed", *KEEPS), ("train.capture=always",)
    ),
    "random_numbers LockedGenerator": Planted(
        "derived", ("rng_independent reordered_random_numbers",), ("rng_independent", *KEEPS), DROPPING
    ),
}
# Every order was run, those that are equivalent to another, too: what is counted must be the same.
UNREDUCED = ("BaseUnlocked", "WriteLockedOnly", "SnapshotUnlocked", "Unchecked")
# The built-in mechanism whose place a holder takes.
INSTEAD_OF = {
    "precision": "process_global",
    "first_call": "double_checked",
    "cursor": "shared_iterator",
    "gradients": "shared",
    "random_numbers": "shared",
}
SMALL = ("model=linear", "train.steps=1", "schedule.max_operations=20000", "watchdog.seconds=10")


def mode_case(name: str, planted: Planted) -> dict[str, Any]:
    own = name[0].isupper()
    mode = ("update_mode=custom", f"update_mode._target_=defects.{name}") if own else (f"update_mode={name}",)
    return {"overrides": [*mode, *SMALL, *planted.overrides], "require": planted.guarantees}


def holder_case(key: str, name: str, planted: Planted) -> dict[str, Any]:
    own = name[0].isupper()
    given = ("update_mode=locked", f"state.{key}={INSTEAD_OF[key] if own else name}", *SMALL, *planted.overrides)
    return {"holder": f"{key}:{name}" if own else None, "overrides": given, "require": planted.guarantees}


def of_safe(planted: Planted) -> str:
    """The name of a safe form's case: defects that go with the same one share it."""
    return " ".join((planted.safe, *planted.overrides))


def search(folder: Path, cases: dict[str, dict[str, Any]]) -> Found:
    given, output = folder / "cases.json", folder / "found.json"
    given.write_text(json.dumps(cases))
    command = [sys.executable, str(Path(__file__).with_name("search_all.py")), str(given), str(output)]
    subprocess.run(
        command, env=os.environ | {"KERAS_BACKEND": "torch", "PYTHONPATH": str(ROOT)}, check=True, timeout=380
    )
    found: Found = json.loads(output.read_text())
    return found


@pytest.fixture(scope="module")
def modes(tmp_path_factory: pytest.TempPathFactory) -> Found:
    cases = {}
    for name, planted in MODES.items():
        cases[name] = mode_case(name, planted)
        cases[of_safe(planted)] = mode_case(planted.safe, planted)
    cases["OneScratch"] = mode_case("OneScratch", Planted("locked", ()))
    for name in (*UNREDUCED, "OneScratch"):
        cases[f"{name}: unreduced"] = {**cases[name], "reduced": False}
    return search(tmp_path_factory.mktemp("modes"), cases)


@pytest.fixture(scope="module")
def holders(tmp_path_factory: pytest.TempPathFactory) -> Found:
    cases = {}
    for name, planted in HOLDERS.items():
        key, _, own = name.partition(" ")
        cases[name] = holder_case(key, own, planted)
        cases[of_safe(planted)] = holder_case(key, planted.safe, planted)
    return search(tmp_path_factory.mktemp("holders"), cases)


def caught(found: dict[str, Any], planted: Planted) -> None:
    """Each kind was seen, in an order that is named, and told."""
    assert found["error"] is None
    for label in planted.seen:
        assert found["counts"].get(label, 0) > 0, found["counts"]
        assert found["counts"][label] <= found["orders"]
        assert found["examples"][label]["token"].startswith("s1.2.")
        assert found["examples"][label]["witness"]
        assert found["statuses"][label.split()[0]] == "violated"


def kept(found: dict[str, Any], planted: Planted) -> None:
    """No order broke anything of what is claimed."""
    assert found["error"] is None
    assert found["kind"] in ("all_orders", "bounded")
    assert {name: found["statuses"][name] for name in planted.claims} == dict.fromkeys(planted.claims, "upheld")
    assert [label for label in found["counts"] if label.partition(" ")[0] in planted.claims] == []
    assert "disagree" not in found["counts"]


@pytest.mark.parametrize("name", MODES)
def test_a_defect_in_a_mode_is_caught(modes: Found, name: str) -> None:
    caught(modes[name], MODES[name])


@pytest.mark.parametrize("name", MODES)
def test_a_mode_without_the_defect_shows_nothing(modes: Found, name: str) -> None:
    kept(modes[of_safe(MODES[name])], MODES[name])


@pytest.mark.parametrize("name", HOLDERS)
def test_a_defect_in_a_holder_is_caught(holders: Found, name: str) -> None:
    caught(holders[name], HOLDERS[name])


@pytest.mark.parametrize("name", HOLDERS)
def test_a_holder_without_the_defect_shows_nothing(holders: Found, name: str) -> None:
    kept(holders[of_safe(HOLDERS[name])], HOLDERS[name])


@pytest.mark.parametrize("name", UNREDUCED)
def test_leaving_equivalent_orders_out_changes_no_count(modes: Found, name: str) -> None:
    reduced, every = modes[name], modes[f"{name}: unreduced"]
    assert reduced["runs"] < reduced["orders"] == every["orders"] == every["runs"]
    assert reduced["counts"] == every["counts"]


def test_what_is_shared_unannounced_is_noticed_and_counted_as_every_order_has_it(modes: Found) -> None:
    reduced, every = modes["OneScratch"], modes["OneScratch: unreduced"]
    assert reduced["counts"] == every["counts"]
    assert "replicas share something that is not announced" in reduced["evidence"]["no_lost_updates"]
    told = [name for name, found in modes.items() if "not announced" in found["evidence"]["no_lost_updates"]]
    assert "OneScratch" in told
    assert not {of_safe(planted) for planted in MODES.values()} & set(told)


# Counts by hand, and what is told.


def test_a_lock_round_the_write_only_loses_46_and_fractures_18_of_56(modes: Found) -> None:
    counts = modes["WriteLockedOnly"]["counts"]
    assert (counts["orders"], counts[LOST], counts[FRACTURED]) == (56, 46, 18)


def test_locks_round_base_and_write_apart_lose_12_of_20(modes: Found) -> None:
    """Three sections a replica: 20 orders; nothing is lost where one's last two come before or after the other's."""
    counts = modes["BaseUnderALockOfItsOwn"]["counts"]
    assert (counts["orders"], counts[LOST]) == (20, 12)


def test_barriers_for_one_of_two_are_no_barriers(modes: Found) -> None:
    assert modes["TooFewParties"]["counts"] == modes["WithoutTheFirstBarrier"]["counts"]


def test_opposite_locks_are_told_as_a_cycle_with_both_stacks(modes: Found) -> None:
    witness = modes["InOppositeOrders"]["examples"][DEADLOCK]["witness"]
    assert witness.startswith(
        "replica 0 waits for lock of slots, which replica 1 holds; "
        "replica 1 waits for lock of weights, which replica 0 holds\n"
    )
    for own in range(2):
        assert f"\nreplica {own}:\n" in witness
    assert witness.count("in step\n    with outer, inner:") == 2


def test_a_lock_that_its_holder_waits_for_is_told_so(modes: Found) -> None:
    witness = modes["TakenTwicePlain"]["examples"][DEADLOCK]["witness"]
    assert ", which it holds itself\n" in witness
    assert "in write\n    with self.lock:" in witness


def test_a_barrier_that_waits_for_a_third_is_told_so(modes: Found) -> None:
    witness = modes["TooManyParties"]["examples"][DEADLOCK]["witness"]
    assert witness.count("waits at barrier 2, which 3 replicas have to reach") == 2


def test_a_shared_buffer_is_told_as_something_that_the_schedule_does_not_see(modes: Found) -> None:
    told = "canaries and versions disagree: something wrote what it had not read through the schedule"
    assert told in modes["OneDelta"]["evidence"]["no_lost_updates"]
    assert told not in modes["AddsTwice"]["evidence"]["no_lost_updates"]


def test_a_scope_that_does_not_restore_leaks_by_itself_and_one_out_of_turn_takes_two_preemptions(
    holders: Found,
) -> None:
    for name, preemptions in (("PutsBackItsOwn", 0), ("PutsNothingBack", 0), ("EndsLocked", 2)):
        found = holders[f"precision {name}"]
        assert found["examples"]["precision_as_asked mode_left_on"]["preemptions"] == preemptions
        assert found["counts"]["precision_as_asked mode_left_on"] == found["orders"]

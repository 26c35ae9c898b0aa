"""Replicas of MirroredStrategy under a schedule: every order of small programs, and of the training step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# Whichever test comes first runs everything of its fixture.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

HERE = Path(__file__).resolve().parent
STEPS = 8
MODES = ["all_reduce", "unscaled_sum", "unreduced", "first_replica", "reassigned_sum"]
Found = dict[str, Any]


def run_all(what: str, folder: Path) -> Found:
    output = folder / f"{what}.json"
    path = os.pathsep.join(str(folder) for folder in (HERE, HERE.parent))
    environment = os.environ | {"KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": path}
    subprocess.run([sys.executable, HERE / "turn_all.py", what, output], env=environment, check=True, timeout=170)
    found: Found = json.loads(output.read_text())
    return found


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return run_all("programs", tmp_path_factory.mktemp("programs"))


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return run_all("cases", tmp_path_factory.mktemp("cases"))


# Programs.


@pytest.mark.parametrize(
    ("program", "ends"),
    [
        ("2 x (read, write)", {"orders": 6, "1": 4, "2": 2}),
        ("3 x (read, write)", {"orders": 90, "1": 48, "2": 36, "3": 6}),
        ("2 x 2 (read, write)", {"orders": 70, "2": 32, "3": 32, "4": 6}),
        # Within, 6 orders before the barrier and 6 after it.
        ("all_reduce", {"orders": 36, "2": 16, "3": 16, "4": 4}),
    ],
)
def test_every_order_of_a_program_is_run_and_ends_as_it_must(
    programs: Found, program: str, ends: dict[str, int]
) -> None:
    assert programs[program]["found"] == ends


LOSES = {"orders": 6, "[1.0, 1.0]": 4, "[2.0, 2.0]": 2}
KEEPS = {"orders": 2, "[2.0, 2.0]": 2}


@pytest.mark.parametrize(
    ("change", "ends"),
    [("assign", LOSES), ("assign_add", KEEPS), ("assign_sub", KEEPS), ("assign_add in pieces", LOSES)],
)
def test_plain_threads_on_a_variable_of_tensorflow_s(programs: Found, change: str, ends: dict[str, int]) -> None:
    assert programs[change]["found"] == ends


def test_replicas_go_in_the_order_that_was_chosen(programs: Found) -> None:
    told = [f"{own} {kind} x" for kind in ("read", "write") for own in (0, 1)]
    assert programs["in turn"]["done"] == told * 2


def test_each_replicas_result_is_returned(programs: Found) -> None:
    assert programs["returns"]["told"] == "returned [0, 1, 2]"


CYCLE = "replica 0 waits for b, which replica 1 holds; replica 1 waits for a, which replica 0 holds"


def test_locks_taken_in_opposite_orders_deadlock_in_the_orders_that_cross(programs: Found) -> None:
    assert programs["locks"]["found"] == {"orders": 5, "0": 3, CYCLE: 2}


def test_a_deadlock_is_reported_with_where_each_replica_waits(programs: Found) -> None:
    found = programs["deadlock"]
    assert found["told"] == f"Deadlock: {CYCLE}"
    assert sorted(found["stacks"]) == ["0", "1"]
    assert all("point(ACQUIRE, name, of=LOCK)" in stack for stack in found["stacks"].values())


@pytest.mark.parametrize(
    ("program", "told"),
    [
        ("raises", "Failed: replica 1 raised ValueError: not today"),
        ("raises at once", "Failed: replica 0 raised ValueError: not today"),
        ("ignores the end", "Failed: replica 1 raised ValueError: not today"),
        ("raises in collective", "Failed: replica 0 raised ZeroDivisionError: integer division or modulo by zero"),
        ("reduces in one", "Deadlock: replica 1 waits at merge_call, which 2 replicas have to reach"),
        (
            "traces",
            "Failed: replica 0 raised RuntimeError: 'read x' was announced while a graph was traced: a graph's "
            "operations have an order of their own. Under a schedule replica functions run eagerly.",
        ),
        ("abandoned", "Abandoned: "),
    ],
)
def test_an_order_that_ends_early_ends_in_all_replicas(programs: Found, program: str, told: str) -> None:
    assert programs[program]["told"] == told
    assert programs[program]["seconds"] < 2.0


def test_an_order_is_abandoned_where_its_chooser_says_so(programs: Found) -> None:
    assert programs["abandoned"]["done"] == ["0 read x", "0 write x", "0 read x"]


def test_a_real_lock_across_an_announcement_is_given_up(programs: Found) -> None:
    assert programs["real lock"]["told"].startswith("Stalled: replica 1, whose turn it was, announced nothing for 2 s")
    assert "with real_lock:" in programs["real lock"]["told"]


def test_nothing_of_the_schedule_is_left_in_tensorflow(programs: Found) -> None:
    assert programs["left behind"] == {"merge_call": False}


# The training step.

CANARIES = {
    "all_reduce": [[STEPS, STEPS]] * 2,
    "unscaled_sum": [[STEPS, STEPS]] * 2,
    "unreduced": [[STEPS, 0], [0, STEPS]],
    "first_replica": [[STEPS, 0]] * 2,
    "reassigned_sum": [[2**STEPS - 1] * 2] * 2,
}
# Three operations a replica, or one, a barrier and two, or two, a barrier and who writes then.
ORDERS = {"all_reduce": 2 * 6, "unscaled_sum": 2 * 6, "unreduced": 20, "first_replica": 6, "reassigned_sum": 6 * 2}


@pytest.mark.parametrize("mode", MODES)
def test_a_mirrored_mode_ends_in_the_same_bits_in_every_order(cases: Found, mode: str) -> None:
    found = cases[mode]["found"]
    assert found["orders"] == ORDERS[mode]
    assert len([label for label in found if label.startswith("bits")]) == 1


@pytest.mark.parametrize("mode", MODES)
def test_canaries_show_what_became_of_each_replicas_updates(cases: Found, mode: str) -> None:
    assert f"canaries {CANARIES[mode]}" in cases[f"{mode}, many steps"]["labels"]


@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_held_to_the_joint_batch_in_every_order(cases: Found, mode: str) -> None:
    found = cases[mode]["found"]
    assert found["unmixed True"] == ORDERS[mode]
    assert found[f"joint {mode == 'all_reduce'}"] == ORDERS[mode]


@pytest.mark.parametrize("mode", MODES)
def test_a_controlled_run_ends_in_the_bits_of_a_free_one(cases: Found, mode: str) -> None:
    found = cases[f"{mode}, many steps"]
    assert found["free"] in found["labels"]


@pytest.mark.parametrize("mode", MODES)
def test_versions_count_what_was_written_to_each_copy(cases: Found, mode: str) -> None:
    assert cases[f"{mode}, many steps"]["last versions"] == {"0:shared": STEPS, "1:shared": STEPS}


def test_who_writes_the_copies_is_who_is_seen_to(cases: Found) -> None:
    def writers(mode: str) -> set[str]:
        return {told for told in cases[f"{mode}, many steps"]["done"] if "update" in told or "write" in told}

    assert writers("unreduced") == {"0 update 0:shared", "1 update 1:shared"}
    assert writers("first_replica") == {"0 update 0:shared", "0 update 1:shared"}
    assert writers("reassigned_sum") == {"0 write 0:shared", "1 write 1:shared"}


def test_steps_end_for_all_replicas_together(cases: Found) -> None:
    assert cases["2 steps"]["found"]["orders"] == ORDERS["all_reduce"] ** 2


def test_more_replicas_have_more_orders_and_the_same_end(cases: Found) -> None:
    found = cases["3 replicas"]["found"]
    assert found["orders"] == 6 * 90
    assert found["canaries [[1, 1, 1], [1, 1, 1], [1, 1, 1]]"] == 6 * 90
    assert len([label for label in found if label.startswith("bits")]) == 1


def test_each_replicas_own_cursor_is_seen(cases: Found) -> None:
    assert cases["cursor"]["last versions"]["0:cursor"] == cases["cursor"]["last versions"]["1:cursor"] == 2


def test_a_process_wide_precision_mode_leaks_in_the_orders_that_cross(cases: Found) -> None:
    """Without preemptions the choice is who goes first: to the model's first collective, after its last, after the
    backward pass's, after the update's. It leaks where the same replica enters its scope first and leaves it first, as
    MirroredStrategy by itself has it every time.
    """
    found = cases["process_global"]["found"]
    assert found["orders"] == 16
    assert found["computed [['bfloat16'], ['bfloat16']]"] == found["mode left None"] == 8
    assert found["computed [['bfloat16'], ['float32']]"] == 4
    assert found["computed [['float32'], ['bfloat16']]"] == 4
    assert found["mode left bfloat16"] == 8


def test_an_inherited_precision_mode_leaks_in_no_order(cases: Found) -> None:
    found = cases["inherited"]["found"]
    orders = found["orders"]
    assert found["computed [['bfloat16'], ['bfloat16']]"] == found["mode left None"] == orders
    assert [label for label in found if label.startswith("bits")] == [
        label for label in cases["process_global"]["found"] if label.startswith("bits") and label in found
    ]

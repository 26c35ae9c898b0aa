"""Replicas that count in one tf.Variable: plain threads over it, and MirroredStrategy's replicas with a copy each.

TensorFlow is not for this process: `count_all.py` runs each strategy's cases in one of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command import ROOT

pytestmark = pytest.mark.slow

LIMIT_SECONDS = 300  # many times what it takes on two idle cores
SEARCH = ("schedule=search", "train.steps=1")
TENSORFLOW = ("workload.variable=tensorflow",)
DEPENDENT = (*TENSORFLOW, "workload.operation=dependent_gradient_step")
INDEPENDENT = (*TENSORFLOW, "workload.operation=gradient_step")
BY_THEMSELVES = ("lock_free", "locked", "reader_writer", "per_variable_lock", "serialized", "optimistic")
MIRRORED = ("all_reduce", "unscaled_sum", "unreduced", "first_replica", "reassigned_sum")

THREADS: dict[str, tuple[str, ...]] = {
    # Every order.
    **{f"search {mode}": (*TENSORFLOW, *SEARCH, f"update_mode={mode}") for mode in (*BY_THEMSELVES[:-1], "all_reduce")},
    **{
        f"search {mode} assign": (*TENSORFLOW, *SEARCH, f"update_mode={mode}", "workload.operation=assign")
        for mode in ("overwrite", "write_locked", "locked", "optimistic")
    },
    "search two steps": (*TENSORFLOW, "schedule=search", "update_mode=overwrite", "train.steps=2"),
    "search reads": (*TENSORFLOW, *SEARCH, "update_mode=lock_free", "workload.elements=4", "workload.readers=1"),
    **{f"search independent {mode}": (*INDEPENDENT, *SEARCH, f"update_mode={mode}") for mode in BY_THEMSELVES},
    **{f"search dependent {mode}": (*DEPENDENT, *SEARCH, f"update_mode={mode}") for mode in BY_THEMSELVES},
    **{
        f"search joint {mode}": (*DEPENDENT, "schedule=search", f"update_mode={mode}", "train.steps=2")
        for mode in ("all_reduce", "unscaled_sum")
    },
    # Free runs.
    **{
        f"free {mode}": (*TENSORFLOW, f"update_mode={mode}", "train.steps=300", "workload.elements=7", "num_replicas=3")
        for mode in (*BY_THEMSELVES[:-1], "all_reduce")
    },
    "free assign optimistic": (*TENSORFLOW, "update_mode=optimistic", "train.steps=300"),
    "free private": (*TENSORFLOW, "update_mode=locked", "train.steps=300", "workload.private_increments=50"),
    "free reads": (
        *(*TENSORFLOW, "update_mode=lock_free", "train.steps=300"),
        *("workload.elements=50000", "workload.readers=1"),
    ),
    "free down": (*TENSORFLOW, "update_mode=lock_free", "train.steps=100", "workload.counts=down", "num_replicas=3"),
    "free five independent": (*INDEPENDENT, "update_mode=lock_free", "train.steps=20", "num_replicas=5"),
    **{
        f"free five dependent {mode}": (*DEPENDENT, f"update_mode={mode}", "train.steps=20", "num_replicas=5")
        for mode in ("serialized", "optimistic", "all_reduce")
    },
}

COPIES: dict[str, tuple[str, ...]] = {
    **{
        f"search {way} {mode}": ("schedule=search", f"update_mode={mode}", f"workload.operation={way}", "train.steps=2")
        for way in ("gradient_step", "dependent_gradient_step")
        for mode in ("all_reduce", "unscaled_sum")
    },
    **{f"search {mode}": ("schedule=search", f"update_mode={mode}", "train.steps=2") for mode in MIRRORED},
    **{f"free {mode}": (f"update_mode={mode}", "train.steps=50", "workload.elements=3") for mode in MIRRORED},
    **{
        f"{way} {mode}": (f"update_mode={mode}", f"workload.operation={way}", "train.steps=6")
        for way in ("gradient_step", "dependent_gradient_step")
        for mode in ("all_reduce", "unscaled_sum")
    },
}


def counted(strategy: str, cases: dict[str, tuple[str, ...]], folder: Path) -> dict[str, dict[str, Any]]:
    given, output = folder / "cases.json", folder / "output.json"
    given.write_text(json.dumps(cases))
    done = subprocess.run(
        [sys.executable, "tests/count_all.py", strategy, "2", str(given), str(output)],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "KERAS_BACKEND": "torch" if strategy == "threads" else "tensorflow",
            "TF_CPP_MIN_LOG_LEVEL": "3",
        },
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, dict[str, Any]] = json.loads(output.read_text())
    return found


@pytest.fixture(scope="module")
def threads(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return counted("threads", THREADS, tmp_path_factory.mktemp("threads"))


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return counted("mirrored", COPIES, tmp_path_factory.mktemp("mirrored"))


pytestmark = [pytestmark, pytest.mark.timeout(LIMIT_SECONDS)]


# Plain threads over one variable.


@pytest.mark.parametrize("mode", [*BY_THEMSELVES[:-1], "all_reduce"])
def test_assign_add_loses_nothing_whatever_is_held(threads: dict[str, dict[str, Any]], mode: str) -> None:
    found = threads[f"search {mode}"]
    assert (found["kind"], found["verdict"], found["broken"]) == ("all_orders", "upheld", {})
    free = threads[f"free {mode}"]
    assert (free["verdict"], free["anomalies"]) == ("upheld", {})
    assert free["metrics"]["updates_kept"] == free["metrics"]["updates_expected"] == 900


@pytest.mark.parametrize(
    ("mode", "orders", "lost"), [("overwrite", 6, 4), ("write_locked", 10, 6), ("locked", 2, 0), ("optimistic", 132, 0)]
)
def test_assign_of_what_was_read_loses_an_increment_unless_the_lock_goes_round_both(
    threads: dict[str, dict[str, Any]], mode: str, orders: int, lost: int
) -> None:
    found = threads[f"search {mode} assign"]
    assert (found["kind"], found["orders"]) == ("all_orders", orders)
    assert found["broken"].get("no_lost_updates", 0) == lost
    assert found["verdict"] == ("anomaly" if lost else "upheld")


def test_two_assigns_each_lose_in_64_of_70_orders(threads: dict[str, dict[str, Any]]) -> None:
    found = threads["search two steps"]
    assert (found["orders"], found["broken"]["no_lost_updates"], found["outcomes"]) == (70, 64, 3)


def test_a_reader_of_a_variable_never_sees_it_half_written(threads: dict[str, dict[str, Any]]) -> None:
    assert threads["search reads"]["statuses"]["no_torn_reads"] == "upheld"
    free = threads["free reads"]
    assert free["statuses"]["no_torn_reads"] == "upheld"
    assert free["evidence"]["no_torn_reads"].startswith("0 of 301 snapshots showed elements of different versions")


def test_counting_down_and_counting_privately_keep_everything(threads: dict[str, dict[str, Any]]) -> None:
    assert threads["free down"]["evidence"]["no_deadlock"] == "whoever waits for zero was woken"
    assert threads["free private"]["metrics"]["updates_kept"] == 600
    assert threads["free assign optimistic"]["metrics"]["updates_kept"] == 600


@pytest.mark.parametrize("mode", BY_THEMSELVES)
def test_a_gradient_that_does_not_depend_on_the_variable_ends_alike_in_every_order(
    threads: dict[str, dict[str, Any]], mode: str
) -> None:
    found = threads[f"search independent {mode}"]
    assert (found["kind"], found["outcomes"], found["verdict"]) == ("all_orders", 1, "upheld")
    assert found["statuses"]["same_bits"] == found["statuses"]["invariants_kept"] == "upheld"


@pytest.mark.parametrize(
    ("mode", "orders", "off", "outcomes"),
    [
        ("lock_free", 6, 4, 2),
        # The lock is let go between reading and writing.
        ("locked", 6, 4, 2),
        ("per_variable_lock", 6, 4, 2),
        ("reader_writer", 42, 40, 2),
        ("serialized", 2, 0, 1),
        ("optimistic", 132, 0, 1),
    ],
)
def test_one_that_does_depend_on_it_ends_so_only_with_the_lock_round_read_gradient_and_update(
    threads: dict[str, dict[str, Any]], mode: str, orders: int, off: int, outcomes: int
) -> None:
    found = threads[f"search dependent {mode}"]
    assert (found["kind"], found["orders"], found["outcomes"]) == ("all_orders", orders, outcomes)
    assert found["broken"].get("invariants_kept", 0) == off
    # Every step is in the variable: none is lost, some subtract another amount than they should.
    assert found["statuses"]["no_lost_updates"] == "upheld"
    assert found["verdict"] == ("anomaly" if off else "upheld")


def test_five_threads_end_where_one_alone_would(threads: dict[str, dict[str, Any]]) -> None:
    assert threads["free five independent"]["verdict"] == "upheld"
    assert "1 of 1 elements end in -150, as steps" in threads["free five independent"]["evidence"]["invariants_kept"]
    for mode in ("serialized", "optimistic"):
        assert threads[f"free five dependent {mode}"]["statuses"]["invariants_kept"] == "upheld"
    assert threads["free five dependent all_reduce"]["statuses"]["joint_gradient"] == "upheld"


def test_the_mean_of_gradients_is_the_joint_one_and_their_sum_is_not(threads: dict[str, dict[str, Any]]) -> None:
    mean, total = threads["search joint all_reduce"], threads["search joint unscaled_sum"]
    assert mean["statuses"]["joint_gradient"] == "upheld"
    assert total["broken"] == {"joint_gradient": total["orders"]}
    assert total["statuses"]["no_lost_updates"] == "upheld"


# A copy for each replica.

EVERY_COPY = "replica 0: 0 of 50 kept, replica 1: 0 of 50 kept"
ONE_COPY = "replica 0: 50 of 50 kept, replica 1: 0 of 50 kept"


def test_counting_under_mirrored_never_imports_torch(copies: dict[str, dict[str, Any]]) -> None:
    assert copies["imported"]["frameworks"] == ["tensorflow"]


@pytest.mark.parametrize(
    ("mode", "kept", "kind", "lost", "where", "alike"),
    [
        ("all_reduce", 100, None, 0, "", True),
        ("unscaled_sum", 100, None, 0, "", True),
        # In each copy the other replica's are missing, so that none is in all copies.
        ("unreduced", 0, "dropped_update", 100, EVERY_COPY, False),
        ("first_replica", 50, "dropped_update", 50, ONE_COPY, True),
        ("reassigned_sum", 0, "multiplied_update", 100, EVERY_COPY, True),
    ],
)
def test_copies_are_counted_by_replica_and_element(
    copies: dict[str, dict[str, Any]], mode: str, kept: int, kind: str | None, lost: int, where: str, *, alike: bool
) -> None:
    found = copies[f"free {mode}"]
    assert (found["metrics"]["updates_kept"], found["metrics"]["updates_expected"]) == (kept, 100)
    assert found["statuses"]["replicas_identical"] == ("upheld" if alike else "anomaly")
    assert found["statuses"]["no_torn_reads"] == "upheld"
    if kind is None:
        assert (found["verdict"], found["anomalies"]) == ("upheld", {})
        return
    assert found["anomalies"][kind] == [lost, 100]
    assert found["where"][kind] == where


@pytest.mark.parametrize("mode", MIRRORED)
def test_every_order_under_mirrored_ends_alike_and_loses_what_the_only_order_of_a_free_run_loses(
    copies: dict[str, dict[str, Any]], mode: str
) -> None:
    found = copies[f"search {mode}"]
    assert (found["kind"], found["outcomes"]) == ("all_orders", 1)
    safe = mode in ("all_reduce", "unscaled_sum")
    assert found["verdict"] == ("upheld" if safe else "anomaly")
    assert found["broken"].get("no_lost_updates", 0) == (0 if safe else found["orders"])
    assert ("replicas_identical" in found["broken"]) == (mode == "unreduced")


@pytest.mark.parametrize("way", ["gradient_step", "dependent_gradient_step"])
def test_gradients_are_reduced_to_the_joint_one_or_applied_once_for_each_replica(
    copies: dict[str, dict[str, Any]], way: str
) -> None:
    mean, total = copies[f"{way} all_reduce"], copies[f"{way} unscaled_sum"]
    assert (mean["verdict"], mean["statuses"]["joint_gradient"]) == ("upheld", "upheld")
    assert (total["verdict"], total["anomalies"]) == ("anomaly", {"not_joint": [2, 2]})
    for mode, held in (("all_reduce", "upheld"), ("unscaled_sum", "anomaly")):
        every = copies[f"search {way} {mode}"]
        assert (every["kind"], every["outcomes"], every["verdict"]) == ("all_orders", 1, held)
        assert every["statuses"]["joint_gradient"] == held
        assert every["statuses"]["fresh_gradients"] == every["statuses"]["no_lost_updates"] == "upheld"
    # Half the gradient of the mean loss, 1.5, at each of six steps; and twice as far.
    if way == "gradient_step":
        assert total["witnesses"]["not_joint"] == "elements end in -9, not in -4.5"
    else:
        assert total["witnesses"]["not_joint"] == "elements end in 0, not in 0.015625"

"""Replicas that count in one tensor: what every update mode keeps in every order, and what free runs keep of it."""

from __future__ import annotations

import itertools
import re
import sys
import threading
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from command import Command, verdict
from count_all import checked, run, searched
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.audit.records import ReplicaRecord
from trainer.config import Config, ConfigError
from trainer.experiments import FOLDER, experiments
from trainer.workloads.counter import free, roles
from trainer.workloads.counter.build import roles_of, variable_for
from trainer.workloads.counter.bytecode import Waits, of_loop, operations, rows
from trainer.workloads.counter.pace import FreePace
from trainer.workloads.counter.rules import claims
from trainer.workloads.counter.shared import Operation, Shared
from trainer.workloads.counter.ways import JOINT, TORCH, UNDER_THREADS, WAYS, start_of, taken

WAIT_SECONDS = 30
TORCH_MODES = [(mode, way) for mode in UNDER_THREADS for way in taken(mode, "threads", TORCH)]
SAFE = [(mode, way) for mode, way in TORCH_MODES if mode not in ("lock_free", "overwrite", "write_locked")]
# A kernel is cut in two, so that what can come in between is seen.
IN_PIECES = ("schedule=search", "schedule.granularity=memory", "workload.elements=2")


@pytest.fixture(autouse=True)
def _one_intra_op_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def counter(mode: str, way: str, *more: str) -> Config:
    return checked((f"update_mode={mode}", f"workload.operation={way}", *more))


# Every order.


@pytest.mark.parametrize(("mode", "way"), TORCH_MODES)
def test_a_mode_claims_what_no_order_breaks_and_what_it_does_not_claim_some_order_breaks(mode: str, way: str) -> None:
    config = counter(mode, way, *IN_PIECES, "train.steps=1")
    explored, found = searched(config)
    assert found["kind"] == "all_orders"
    assert (explored.counts["no_lost_updates"] == 0) == ("no_lost_updates" in claims(config))
    assert not [name for name in claims(config) if found["statuses"][name] != "upheld"], found["evidence"]


@pytest.mark.parametrize(
    ("mode", "way"), [each for each in TORCH_MODES if each[0] not in ("all_reduce", "unscaled_sum")]
)
def test_a_reader_sees_whole_values_where_the_mode_says_so_and_torn_ones_elsewhere(mode: str, way: str) -> None:
    config = counter(mode, way, *IN_PIECES, "train.steps=1", "workload.readers=1")
    explored, found = searched(config)
    assert (explored.counts["no_torn_reads"] == 0) == ("no_torn_reads" in claims(config)), found["evidence"]
    # One replica counts, and nobody is there to write over what it has written.
    assert explored.counts["no_lost_updates"] == 0


@pytest.mark.parametrize(
    ("mode", "way", "more", "orders", "lost", "outcomes"),
    [
        ("overwrite", "read_add_write", ("train.steps=1",), 6, 4, 2),
        ("overwrite", "rebind", ("train.steps=1",), 6, 4, 2),
        ("overwrite", "read_add_write", ("train.steps=2",), 70, 64, 3),
        ("overwrite", "rebind", ("train.steps=2",), 70, 64, 3),
        ("write_locked", "read_add_write", ("train.steps=1",), 10, 6, 2),
        ("locked", "read_add_write", ("train.steps=1",), 2, 0, 1),
        ("locked", "rebind", ("train.steps=2",), 6, 0, 1),
        # One lock round the whole loop: who has it first counts to the end.
        ("locked", "in_place", ("train.steps=2", "workload.section_increments=0"), 2, 0, 1),
        ("locked", "in_place", ("train.steps=4", "workload.section_increments=2"), 6, 0, 1),
        # Merged twice each: as two increments.
        ("locked", "rebind", ("train.steps=4", "workload.private_increments=2"), 6, 0, 1),
        ("overwrite", "rebind", ("train.steps=4", "workload.private_increments=2"), 70, 64, 3),
        # Only what replicas put in comes in this order or that.
        ("all_reduce", "rebind", ("train.steps=2",), 4, 0, 1),
        # The kernel as one operation, and as reading and writing.
        ("lock_free", "in_place", ("train.steps=1",), 2, 0, 1),
        ("lock_free", "in_place", ("train.steps=1", "schedule.granularity=memory"), 6, 4, 2),
        ("lock_free", "add_", ("train.steps=1", "schedule.granularity=memory"), 6, 4, 2),
    ],
)
def test_orders_and_those_that_lose_an_increment_are_counted(
    mode: str, way: str, more: tuple[str, ...], orders: int, lost: int, outcomes: int
) -> None:
    explored, found = searched(counter(mode, way, "schedule=search", *more))
    assert (found["kind"], explored.orders, explored.counts["no_lost_updates"]) == ("all_orders", orders, lost)
    assert found["outcomes"] == outcomes
    # What the values show and what the versions show is the same in every order.
    assert explored.counts["disagree"] == 0


def test_a_lost_increment_is_replayed_from_its_token() -> None:
    explored, _ = searched(counter("overwrite", "rebind", "schedule=search", "train.steps=2"))
    token = explored.examples["no_lost_updates lost_update"].token
    config = counter("overwrite", "rebind", "schedule=replay", f"schedule.token={token}", "train.steps=2")
    replayed, found = searched(config)
    assert (replayed.orders, found["anomalies"]["lost_update"]) == (1, [1, 1])


# Free runs.


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(SAFE),
    st.integers(2, 4),
    st.integers(0, 40),
    st.integers(1, 60),
    st.sampled_from([(1, 1), (7, 1), (0, 1), (1, 5)]),
)
def test_every_element_shows_every_increment_in_safe_modes(
    safe: tuple[str, str], num_replicas: int, elements: int, steps: int, portions: tuple[int, int]
) -> None:
    (mode, way), (section, private) = safe, portions
    given_up = mode in JOINT or (mode == "optimistic" and section != 1)
    config = counter(
        mode,
        way,
        f"num_replicas={num_replicas}",
        f"workload.elements={elements}",
        f"train.steps={steps}",
        *([] if given_up else [f"workload.section_increments={section}", f"workload.private_increments={private}"]),
    )
    record, found = run(config)
    made = num_replicas * steps
    assert (found["verdict"], found["anomalies"]) == ("upheld", {}), found
    assert found["metrics"]["updates_kept"] == found["metrics"]["updates_expected"] == made
    assert found["evidence"]["no_lost_updates"].startswith(f"{made:,} of {made:,} increments kept")
    assert [each.steps_done for each in record.replicas] == [steps] * num_replicas


def lose(operation: Operation, meeting: threading.Barrier) -> Operation:
    """The same loop, in which all threads have read before any of them writes."""
    assert operation.read is not None
    assert operation.write is not None
    read, write = operation.read, operation.write

    def free_loop(shared: Shared, count: int, amount: Any) -> None:
        for _ in range(count):
            new = read(shared, amount)
            meeting.wait()
            write(shared, new)
            meeting.wait()

    def locked(shared: Shared, count: int, amount: Any, section: Any) -> None:
        for _ in range(count):
            meeting.wait()
            with section:
                write(shared, read(shared, amount))

    return Operation(free_loop, locked, operation.copy, read, write)


@pytest.mark.parametrize("way", ["rebind", "read_add_write"])
@pytest.mark.parametrize(("mode", "kept"), [("overwrite", 50), ("locked", 150)])
def test_threads_that_read_together_lose_all_but_one_increment_and_keep_all_under_the_lock(
    mode: str, kept: int, way: str
) -> None:
    meeting = threading.Barrier(3, timeout=WAIT_SECONDS)
    forced = {way: lose(operations()[way], meeting)}
    config = counter(mode, way, "num_replicas=3", "train.steps=50", "workload.elements=4")
    # Nobody is there to meet where one thread makes increments that are not counted.
    with (
        mock.patch("trainer.workloads.counter.build.OPERATIONS", forced),
        mock.patch.multiple(free, warm_up=mock.DEFAULT, unsafe=mock.Mock(return_value=None)),
    ):
        _, found = run(config)
    assert found["metrics"]["updates_kept"] == kept
    assert found["anomalies"] == ({} if kept == 150 else {"overwritten_update": [100, 150]})
    assert found["verdict"] == ("upheld" if kept == 150 else "anomaly")
    if kept == 50:
        assert found["where"]["overwritten_update"] == "4 of 4 elements, which show 50"
        assert found["witnesses"]["overwritten_update"] == "element 0 shows 50 increments after 150"


def test_a_single_element_that_is_off_is_found() -> None:
    def all_but_one(shared: Shared, count: int, amount: Any) -> None:
        for _ in range(count):
            shared.total.add_(amount)
            shared.total[17] -= 1

    whole = operations()["add_"]
    broken = {"add_": Operation(all_but_one, whole.locked, whole.copy)}
    config = counter("lock_free", "add_", "train.steps=3", "workload.elements=1000")
    with mock.patch("trainer.workloads.counter.build.OPERATIONS", broken):
        _, found = run(config)
    assert found["anomalies"] == {"overwritten_update": [6, 6], "torn_tensor": [1, 1]}
    assert found["where"]["overwritten_update"] == "1 of 1,000 elements, which show 0 to 6"
    assert found["witnesses"]["torn_tensor"] == "copy 0: element 17 shows 0, element 0 6 at the end"


def test_the_ratio_is_to_the_same_loop_with_nothing_held() -> None:
    _, locked = run(counter("locked", "in_place", "train.steps=4000"))
    assert locked["metrics"]["ratio_to_unsafe"] > 0
    assert "us with nothing held" in locked["evidence"]["no_lost_updates"]
    _, unsafe = run(counter("lock_free", "in_place", "train.steps=4000"))
    assert unsafe["metrics"]["ratio_to_unsafe"] is None
    _, private = run(counter("lock_free", "in_place", "train.steps=4000", "workload.private_increments=100"))
    assert private["metrics"]["ratio_to_unsafe"] > 0
    assert 0 <= private["metrics"]["count_late_max"] <= 200


def test_a_run_that_is_stopped_ends_at_once() -> None:
    stop = threading.Event()
    config = counter("lock_free", "in_place", "train.steps=10000000")
    threading.Timer(0.3, stop.set).start()
    from trainer.one_run import UNWATCHED, empty_record
    from trainer.workloads.counter import workload

    record = empty_record(config)
    assert workload.run(config, record, UNWATCHED, stop) == {}
    assert 0 < record.steps_done < 10_000_000


# Counting privately.


class Ending(FreePace):
    """A thread that ends early."""

    def __init__(self, replica: ReplicaRecord, after: int) -> None:
        super().__init__(replica, threading.Event())
        self._after = after

    def _made(self, count: int) -> None:
        super()._made(count)
        if self.done >= self._after:
            self._ended.set()


@pytest.mark.parametrize(("private", "shared", "lost"), [(1, 25, 0), (10, 20, 5)])
def test_what_a_thread_has_not_merged_ends_with_it(private: int, shared: int, lost: int) -> None:
    config = counter("locked", "in_place", "train.steps=100", f"workload.private_increments={private}")
    variable = variable_for(config)
    counting = roles_of(config, variable, variable.make())
    pace = Ending(ReplicaRecord.empty(0, 0, 2), after=25)
    # One at a time, so that it ends where it is to.
    with mock.patch.object(pace, "chunks", pace.single):
        counting.body(0, pace)
    assert pace.done == 25
    assert (int(counting.shared.total), counting.unmerged) == (shared, lost)


# Counting down.

DOWN = ("num_replicas=3", "workload.counts=down")


def test_a_lost_count_leaves_who_waits_for_zero_waiting_for_ever_and_a_lock_does_not() -> None:
    explored, found = searched(counter("overwrite", "rebind", *DOWN, "train.steps=1", "schedule=search"))
    assert (found["kind"], found["verdict"]) == ("all_orders", "anomaly")
    assert 0 < explored.counts["no_deadlock"] < explored.orders
    assert "replica 2 waits for notification of TurnPace.wait_for_zero" in found["witnesses"]["deadlock"]
    # Who finds that a count was lost is never woken, and nobody else waits.
    assert explored.counts["no_lost_updates"] == 0
    explored, found = searched(counter("locked", "rebind", *DOWN, "train.steps=1", "schedule=search"))
    assert (found["kind"], found["verdict"], found["statuses"]["no_deadlock"]) == ("all_orders", "upheld", "upheld")


@pytest.mark.parametrize(("more", "verdict_of"), [(1, "violated"), (0, "upheld")])
def test_a_free_run_says_at_once_that_nobody_is_left_to_count(more: int, verdict_of: str) -> None:
    config = counter("locked", "in_place", *DOWN, "train.steps=200")
    # As if one count had been lost.
    with mock.patch.object(roles, "start_of", lambda config: start_of(config) + more):
        record, found = run(config)
    assert found["verdict"] == verdict_of
    assert found["evidence"]["no_deadlock"] == (
        f"all 400 jobs are counted, {more} are left, and nobody is left to count"
        if more
        else "whoever waits for zero was woken"
    )
    assert ("deadlock" in found["anomalies"]) == bool(more)
    assert record.duration_seconds < WAIT_SECONDS
    assert [each.steps_done for each in record.replicas] == [200] * 3


# The bytecode.


def marked(way: str) -> list[str]:
    return [row.instruction.partition(" to ")[0] for row in of_loop(operations()[way].free) if row.switch]


def test_switches_are_marked_at_kernels_and_where_a_loop_goes_back() -> None:
    assert marked("in_place") == ["BINARY_OP +=", "JUMP_BACKWARD"]
    # The name is bound to another tensor, and the one before is freed.
    assert marked("rebind") == ["BINARY_OP +", "STORE_ATTR total", "JUMP_BACKWARD"]
    assert marked("add_") == ["PRECALL", "CALL", "JUMP_BACKWARD"]
    told = {row.instruction: row.touches for row in of_loop(operations()["in_place"].free) if row.touches}
    assert told == {
        "BINARY_OP +=": "reads and writes it, in one kernel",
        "STORE_ATTR total": "binds the name to the tensor that it is bound to: harmless",
    }


@pytest.mark.stress
@pytest.mark.parametrize("locked", [False, True])
@pytest.mark.parametrize("way", ["in_place", "add_", "rebind", "read_add_write"])
def test_threads_are_seen_to_wait_where_a_switch_is_marked_and_nowhere_else(way: str, *, locked: bool) -> None:
    operation, shared = operations()[way], Shared(torch.zeros((), dtype=torch.int32))
    ended, section, waits = threading.Event(), threading.Lock(), Waits()

    def body() -> None:
        while not ended.is_set():
            if locked:
                operation.locked(shared, 100, 1, section)
            else:
                operation.free(shared, 100, 1)

    threads = [threading.Thread(target=body) for _ in range(2)]
    before = sys.getswitchinterval()
    # So short that threads are asked for the GIL all the time.
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for _ in range(2000):
            ended.wait(0.0001)
            waits.look()
    finally:
        ended.set()
        sys.setswitchinterval(before)
        for thread in threads:
            thread.join(WAIT_SECONDS)
    seen = waits.rows()
    assert sum(times for _, times in seen) > 100
    assert not [row for row, _ in seen if not row.switch]


def test_every_place_of_a_loop_is_in_its_bytecode() -> None:
    for operation in operations().values():
        for function in (operation.free, operation.locked):
            assert {row.offset for row in of_loop(function)} <= {row.offset for row in rows(function.__code__)}


# What is refused.

REFUSED = [
    (["workload.variable=jax"], "workload.variable must be one of auto, torch, tensorflow; got 'jax'."),
    (
        ["workload.operation=inplace"],
        "workload.operation must be one of auto, in_place, add_, rebind, read_add_write, assign_add, assign, "
        "gradient_step, dependent_gradient_step; got 'inplace'. Did you mean 'in_place'?",
    ),
    (["workload.counts=sideways"], "workload.counts must be one of up, down; got 'sideways'."),
    (["workload.elements=-1"], "workload.elements must be at least 0; got -1."),
    (["workload.private_increments=0"], "workload.private_increments must be at least 1; got 0."),
    (
        ["workload.operation=assign"],
        "workload.operation=assign does not go with workload.variable=torch: it is for a tf.Variable. It takes "
        "in_place, add_, rebind, read_add_write.",
    ),
    (
        ["workload.operation=in_place", "workload.variable=tensorflow"],
        "workload.operation=in_place does not go with workload.variable=tensorflow: it is for a tensor; `+=` on a "
        "tf.Variable makes a tensor, and leaves the variable as it was. It takes assign_add, assign, gradient_step, "
        "dependent_gradient_step.",
    ),
    (
        ["workload.variable=torch", "strategy=mirrored"],
        "workload.variable=torch needs strategy=threads: under mirrored every variable is TensorFlow's.",
    ),
    (
        ["update_mode=slots_unlocked"],
        "update_mode=slots_unlocked does not go with workload=counter: a count has no optimizer slots. "
        "strategy=threads takes all_reduce, unscaled_sum, serialized, locked, reader_writer, per_variable_lock, "
        "optimistic, lock_free, write_locked, overwrite.",
    ),
    (
        ["update_mode=lock_free", "workload.operation=rebind"],
        "workload.operation=rebind does not go with update_mode=lock_free: that mode changes the current value inside "
        "one kernel, and this reads first. With nothing held it is update_mode=overwrite. It takes in_place, add_.",
    ),
    (
        ["update_mode=overwrite", "workload.operation=in_place"],
        "workload.operation=in_place does not go with update_mode=overwrite: that mode writes what it has read before, "
        "and this is one kernel. It takes rebind, read_add_write.",
    ),
    (
        ["update_mode=unreduced", "strategy=mirrored", "workload.operation=assign"],
        "workload.operation=assign does not go with update_mode=unreduced: replicas change their copies in another way "
        "then. It takes assign_add.",
    ),
    (
        ["update_mode=locked", "workload.readers=2"],
        "workload.readers must be from 0 to num_replicas - 1; got 2.",
    ),
    (
        ["workload.readers=1"],
        "workload.readers=1 needs strategy=threads and an update_mode in which nobody waits for all replicas, as "
        "lock_free or locked.",
    ),
    (
        ["workload.counts=down"],
        "workload.counts=down needs num_replicas of at least 3, two that count and one that waits; got 2.",
    ),
    (
        ["workload.counts=down", "strategy=mirrored", "num_replicas=3"],
        "workload.counts=down needs strategy=threads: nobody can wait inside MirroredStrategy.",
    ),
    (
        ["update_mode=lock_free", "workload.section_increments=0"],
        "workload.section_increments=0 needs increments that are counted up one by one under a lock: "
        "strategy=threads and update_mode=serialized,locked,reader_writer,per_variable_lock.",
    ),
    (
        ["update_mode=all_reduce", "workload.private_increments=10"],
        "workload.private_increments=10 needs increments that are counted up and that a replica merges by itself: "
        "strategy=threads and an update_mode other than all_reduce and unscaled_sum.",
    ),
    (
        ["update_mode=lock_free", "workload.variable=tensorflow", "schedule=search", "schedule.granularity=memory"],
        "schedule.granularity=memory does not go with workload.variable=tensorflow: a kernel that changes a "
        "tf.Variable holds the variable's own lock, and nothing comes in between. Leave it out.",
    ),
    (
        ["audit.repeat=2"],
        "audit.repeat=2 needs schedule=replay: free runs of workload=counter differ. Leave it out.",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=[" ".join(arguments) for arguments, _ in REFUSED])
def test_what_does_not_go_together_is_refused_in_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        checked(tuple(arguments))
    assert str(refused.value) == message


def test_more_halvings_than_a_number_can_show_are_refused() -> None:
    given = ("update_mode=locked", "workload.variable=tensorflow", "workload.operation=dependent_gradient_step")
    checked((*given, "train.steps=500"))
    with pytest.raises(ConfigError, match=r"^train\.steps=501 x 2 replicas is 1002 updates, .* at most 1,000"):
        checked((*given, "train.steps=501"))


def test_a_mistake_ends_with_status_2_and_one_line(command: Command) -> None:
    arguments, message = REFUSED[5]
    ended = command("workload=counter", *arguments)
    assert (ended.returncode, ended.stderr) == (2, f"trainer: {message}\n")
    assert command.left() == []


# The command.


def test_every_way_to_write_an_increment_has_an_experiment_or_is_the_cure_of_one() -> None:
    told = {name: (FOLDER / f"{name}.yaml").read_text() for name in experiments()}
    own = {name: text for name, text in told.items() if "override /workload: counter" in text}
    assert {name.partition("_")[0] for name in own} == {"counter", "variable", "field"}
    used = {way for way in WAYS if any(f"operation: {way}" in text for text in own.values())}
    assert used == {"in_place", "rebind", "assign_add", "assign", "gradient_step", "dependent_gradient_step"}


@pytest.mark.slow
@pytest.mark.stress
@pytest.mark.parametrize(("experiment", "safe"), [("counter_rebind", False), ("counter_locked_each", True)])
def test_a_free_run_tells_what_it_lost(command: Command, experiment: str, *, safe: bool) -> None:
    given = (f"experiment={experiment}", "train.steps=20000", "hydra.run.dir=run")
    ended = command(*given, PYTHONPROFILEIMPORTTIME="1")
    assert ended.returncode == 0, ended.stderr
    imported = set(re.findall(r"^import time:.*\| +(\w+)$", (command.folder / "run" / "console.log").read_text(), re.M))
    assert imported & {"torch", "tensorflow"} == {"torch"}
    found = verdict(command.folder / "run")
    kept = found["metrics"]["updates_kept"]
    if safe:
        assert (found["verdict"], kept) == ("upheld", 40_000)
        return
    assert 20_000 <= kept <= 40_000
    assert found["verdict"] == ("inconclusive" if kept == 40_000 else "anomaly")
    assert [each["count"] for each in found["anomalies"]] == ([] if kept == 40_000 else [40_000 - kept])


def test_show_bytecode_has_every_way(command: Command) -> None:
    shown = command("show", "bytecode")
    assert (shown.returncode, shown.stderr) == (0, "")
    for way in operations():
        assert f"workload.operation={way}: {WAYS[way].written}" in shown.stdout
    assert shown.stdout.count("inside: its kernel runs without the GIL") == 9
    assert shown.stdout.count("inside: it is Python code, with a kernel without the GIL") == 5


def test_modes_that_write_what_they_have_read_take_no_kernel_and_the_other_way_round() -> None:
    by_mode = {mode: {way for other, way in TORCH_MODES if other == mode} for mode in UNDER_THREADS}
    assert by_mode["lock_free"] == {"in_place", "add_"}
    assert by_mode["overwrite"] == by_mode["write_locked"] == by_mode["optimistic"] == {"rebind", "read_add_write"}
    assert by_mode["locked"] == {"in_place", "add_", "rebind", "read_add_write"}
    assert not set(itertools.chain(*by_mode.values())) & {"assign", "assign_add"}

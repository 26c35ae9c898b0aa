"""The compiled loop of `train.engine=native`, mode by mode, around a step that is a Python function.

Orders are forced where the loop calls the step: whoever is in it has read and has not written.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trainer.audit import spans
from trainer.cache.store import Store
from trainer.engines.native.build import load_loop
from trainer.engines.native.loop import KINDS, MODES, LoopFailed, NativeLoop, Taken, Update
from trainer.state.layout import Floats, Layout, plan
from trainer.updates.optimizers import Adam, Momentum, Optimizer, Sgd
from trainer.updates.shared_vector import JointUpdate, SharedVector

pytestmark = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX") or "g++") is None, reason="the loop needs a C++ compiler, and there is none"
)

LIMIT_SECONDS = 20.0
BATCH = 3
OPTIMIZERS: dict[str, Optimizer] = {
    "sgd": Sgd(0.1),
    "momentum": Momentum(0.03, 0.9),
    "adam": Adam(0.003, 0.9, 0.999, 1e-7),
}
KEEP = ["locked", "reader_writer", "optimistic", "per_variable_lock", "lock_free"]
LOSE = ["write_locked", "overwrite"]
STEP = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p))

Body = Callable[[int, int, Floats], int]  # replica, step, what is read -> status


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return load_loop(Store(tmp_path_factory.mktemp("cache")))


def layout_of(optimizer: Optimizer, num_replicas: int, elements: int = 37) -> Layout:
    return plan(
        [("kernel", (elements, 5)), ("bias", (elements,))],
        [("mean", (6,))],
        optimizer.slots,
        counter=optimizer.counts,
        num_replicas=num_replicas,
    )


def first_values(layout: Layout) -> Floats:
    random = np.random.default_rng(1)
    return layout.pack([random.normal(size=each.shape) for each in layout.read_segments])


class Hosted:
    """A loop whose replicas take steps that are a function; its gradients are the same whoever asks, and when."""

    def __init__(
        self, loaded: ctypes.CDLL, update: Update, optimizer: Optimizer, num_replicas: int, body: Body | None = None
    ) -> None:
        self.layout = layout_of(optimizer, num_replicas)
        self.vector = first_values(self.layout)
        self.calls: list[tuple[int, int]] = []
        self.loop = NativeLoop(
            loaded,
            self.layout,
            optimizer,
            update,
            self.vector,
            batch_size=BATCH,
            row_size=2,
            keeps=True,
            spins=False,
        )
        self.kept_alive: list[Any] = []
        for own in range(num_replicas):
            self._join(own, update, body or (lambda own, step, read: 0))

    def contribution(self, own: int, step: int) -> Floats:
        found = self.layout.own_canaries(own)
        random = np.random.default_rng([own, step])
        for each in self.layout.read_segments:
            found[each.span] = random.normal(size=each.size)
        return found

    def run(self, own: int, first: int, steps: int, **how: Any) -> Taken:
        return self.loop.run(own, first, np.full((steps, BATCH), own, np.int64), **how)

    def _join(self, own: int, update: Update, body: Body) -> None:
        snapshot = None
        if not update.in_place:
            snapshot = np.zeros(self.layout.size if update.whole_snapshot else self.layout.read_size, np.float32)
        read = (self.vector if snapshot is None else snapshot)[: self.layout.read_size]
        samples, number = np.zeros(BATCH, np.int64), np.zeros(1, np.int64)
        contribution, row = np.zeros(self.layout.read_size, np.float32), np.zeros(2, np.float32)

        def step(frame: int, outputs: Any) -> int:
            assert (samples == own).all()
            self.calls.append((own, int(number[0])))
            status = body(own, int(number[0]), read)
            contribution[:] = self.contribution(own, int(number[0]))
            row[:] = own, number[0]
            outputs[0], outputs[1] = contribution.ctypes.data, row.ctypes.data
            return status

        called = STEP(step)
        self.kept_alive += [called, snapshot, samples, number, contribution, row]
        address = ctypes.cast(called, ctypes.c_void_p).value or 0
        self.loop.join(own, address, None, samples, number, snapshot)


def together(*bodies: Callable[[], Any]) -> list[Any]:
    """What each returns, run by threads of their own."""
    found: list[Any] = [None] * len(bodies)

    def call(index: int) -> None:
        try:
            found[index] = bodies[index]()
        except BaseException as error:
            found[index] = error

    threads = [threading.Thread(target=call, args=(index,), daemon=True) for index in range(len(bodies))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_SECONDS)
        assert not thread.is_alive(), "a replica hangs"
    for each in found:
        if isinstance(each, BaseException) and not isinstance(each, LoopFailed):
            raise each
    return found


def until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while not happened():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0)


def both_read_before_either_writes(hosted: Callable[[Body], Hosted]) -> Hosted:
    """Two replicas, a step each: both have read, then replica 0 writes, then replica 1."""
    met = threading.Barrier(2)
    found: Hosted

    def body(own: int, step: int, read: Floats) -> int:
        if len([each for each in found.calls if each[0] == own]) == 1:  # the first time: a mode may compute again
            met.wait(LIMIT_SECONDS)
            if own == 1:
                last = found.layout.segments[-1]
                until(lambda: found.vector[last.tail] == 1)
        return 0

    found = hosted(body)
    together(lambda: found.run(0, 0, 1), lambda: found.run(1, 0, 1))
    return found


@pytest.mark.parametrize("rule", OPTIMIZERS)
@pytest.mark.parametrize("mode", KEEP)
def test_these_modes_keep_both_updates_when_reads_overlap(loaded: ctypes.CDLL, mode: str, rule: str) -> None:
    found = both_read_before_either_writes(lambda body: Hosted(loaded, Update(mode), OPTIMIZERS[rule], 2, body))
    assert found.layout.kept(found.vector).tolist() == [1, 1]
    assert found.loop.commits() == [1, 1]


@pytest.mark.parametrize("rule", OPTIMIZERS)
@pytest.mark.parametrize("mode", LOSE)
def test_these_modes_lose_the_first_update_when_reads_overlap(loaded: ctypes.CDLL, mode: str, rule: str) -> None:
    found = both_read_before_either_writes(lambda body: Hosted(loaded, Update(mode), OPTIMIZERS[rule], 2, body))
    assert found.layout.kept(found.vector).tolist() == [0, 1]
    assert found.loop.commits() == [1, 1]


@pytest.mark.parametrize("rule", ["momentum", "adam"])
def test_slots_unlocked_keeps_both_updates_of_the_weights_and_one_of_the_slots(loaded: ctypes.CDLL, rule: str) -> None:
    found = both_read_before_either_writes(
        lambda body: Hosted(loaded, Update("slots_unlocked"), OPTIMIZERS[rule], 2, body)
    )
    for segment in found.layout.segments:
        canaries = found.vector[[segment.start, segment.start + 1, segment.tail, segment.tail + 1]].tolist()
        assert canaries == ([0, 1] if segment.kind in ("slot", "counter") else [1, 1]) * 2, segment.name


@pytest.mark.parametrize("mode", KEEP)
def test_staleness_is_what_landed_between_read_and_write(loaded: ctypes.CDLL, mode: str) -> None:
    met, taken = threading.Barrier(2), {}
    hosted: Hosted

    def body(own: int, step: int, read: Floats) -> int:
        if hosted.calls.count((own, 0)) == 1:
            met.wait(LIMIT_SECONDS)
            if own == 1:
                until(lambda: hosted.vector[hosted.layout.segments[-1].tail] == 1)
        return 0

    hosted = Hosted(loaded, Update(mode), OPTIMIZERS["sgd"], 2, body)
    taken = together(lambda: hosted.run(0, 0, 1), lambda: hosted.run(1, 0, 1))
    assert taken[0].notes.tolist() == [[0, 0]]
    # Optimistic computes again from what has landed: its gradient is fresh, and cost two.
    assert taken[1].notes.tolist() == ([[1, 0]] if mode == "optimistic" else [[0, 1]])
    assert hosted.calls.count((1, 0)) == (2 if mode == "optimistic" else 1)


def most_inside(loaded: ctypes.CDLL, mode: str, meet: bool) -> int:
    """How many replicas were in the step at once, at most, of two that take 50 steps each."""
    inside, most, met = [0, 0], [0], threading.Barrier(2)

    def body(own: int, step: int, read: Floats) -> int:
        inside[own] = 1
        if meet:
            met.wait(LIMIT_SECONDS)
        time.sleep(0)  # so that the other one has its chance
        most[0] = max(most[0], sum(inside))
        if meet:
            met.wait(LIMIT_SECONDS)
        inside[own] = 0
        return 0

    hosted = Hosted(loaded, Update(mode), OPTIMIZERS["sgd"], 2, body)
    together(lambda: hosted.run(0, 0, 50), lambda: hosted.run(1, 0, 50))
    assert hosted.layout.kept(hosted.vector).tolist() == [50, 50]
    return most[0]


def test_serialized_lets_one_replica_compute_at_a_time_and_locked_lets_both(loaded: ctypes.CDLL) -> None:
    assert most_inside(loaded, "serialized", meet=False) == 1
    assert most_inside(loaded, "locked", meet=True) == 2


@pytest.mark.parametrize("rule", OPTIMIZERS)
@pytest.mark.parametrize("mode", MODES)
def test_one_replica_gets_what_the_rule_says(loaded: ctypes.CDLL, mode: str, rule: str) -> None:
    hosted = Hosted(loaded, Update(mode), OPTIMIZERS[rule], 1)
    expected = SharedVector(hosted.vector, hosted.layout, OPTIMIZERS[rule])
    replica = expected.replica(0, whole=False)
    hosted.run(0, 0, 5)
    for step in range(5):
        replica.contribution = torch.from_numpy(hosted.contribution(0, step))
        expected.add(replica, expected.delta(replica, expected.vector))
    _hold(hosted, expected, rule)


@pytest.mark.parametrize("rule", OPTIMIZERS)
def test_all_reduce_sums_in_the_order_of_replicas_and_scales_once(loaded: ctypes.CDLL, rule: str) -> None:
    num_replicas, steps = 3, 4
    hosted = Hosted(loaded, Update("all_reduce", 1 / 3, 1 / 3), OPTIMIZERS[rule], num_replicas)
    expected = SharedVector(hosted.vector, hosted.layout, OPTIMIZERS[rule])
    replicas = [expected.replica(own, whole=False) for own in range(num_replicas)]
    joint = JointUpdate(expected, replicas, 1 / 3)
    taken = together(*(lambda own=own: hosted.run(own, 0, steps, kept=[1, 3]) for own in range(num_replicas)))
    before = []
    for step in range(steps):
        before.append(expected.plain.numpy()[: hosted.layout.read_size].copy())
        for replica in replicas:
            replica.contribution = torch.from_numpy(hosted.contribution(replica.replica_id, step))
        for replica in replicas:
            joint.add_share(replica)
        joint.commit()
        joint.count()
    _hold(hosted, expected, rule)
    assert hosted.layout.kept(hosted.vector).tolist() == [steps] * num_replicas
    value = hosted.layout.is_value[: hosted.layout.read_size]
    for own, each in enumerate(taken):
        for index, step in enumerate([1, 3]):
            np.testing.assert_allclose(each.snapshots[index], before[step], rtol=1e-5, atol=1e-7)
            assert (each.contributions[index] == hosted.contribution(own, step)).all()
            sums = sum(hosted.contribution(other, step).astype(np.float64) for other in range(num_replicas))
            np.testing.assert_allclose(each.totals[index][value], sums[value], rtol=1e-5, atol=1e-6)
        assert each.rows.tolist() == [[own, step] for step in range(steps)]
        assert each.notes.tolist() == [[step * num_replicas, 0] for step in range(steps)]


def _hold(hosted: Hosted, expected: SharedVector, rule: str) -> None:
    found, wanted = hosted.vector, expected.plain.numpy()
    values, canaries = hosted.layout.is_value, hosted.layout.canaries.reshape(-1)
    assert (found[canaries] == wanted[canaries]).all()
    if rule == "adam":  # PyTorch's roots may be off by the last bit
        np.testing.assert_allclose(found[values], wanted[values], rtol=1e-5, atol=1e-7)
    else:
        assert found[values].tobytes() == wanted[values].tobytes()


@pytest.mark.parametrize("mode", ["all_reduce", "locked"])
def test_stop_ends_a_replica_that_waits_and_one_that_goes_on(loaded: ctypes.CDLL, mode: str) -> None:
    hosted = Hosted(loaded, Update(mode), OPTIMIZERS["sgd"], 2)

    def stopped() -> None:
        until(lambda: (0, 0) in hosted.calls)
        hosted.loop.stop()

    taken, _ = together(lambda: hosted.run(0, 0, 1_000_000), stopped)
    assert len(taken.rows) == len(taken.notes) < 1_000_000
    assert len(hosted.run(1, 0, 3).rows) == 0


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "all_reduce"])
def test_what_is_kept_of_a_step_is_what_its_gradient_was_computed_from(loaded: ctypes.CDLL, mode: str) -> None:
    read_by: list[Floats] = []

    def body(own: int, step: int, read: Floats) -> int:
        read_by.append(read.copy())
        return 0

    hosted = Hosted(loaded, Update(mode), OPTIMIZERS["momentum"], 1, body)
    taken = hosted.run(0, 0, 5, kept=[0, 2, 4])
    for index, step in enumerate([0, 2, 4]):
        assert taken.snapshots[index].tobytes() == read_by[step].tobytes()
        assert (taken.contributions[index] == hosted.contribution(0, step)).all()
    assert not len(taken.totals)


def test_a_step_that_fails_is_told_with_its_status(loaded: ctypes.CDLL) -> None:
    hosted = Hosted(loaded, Update("locked"), OPTIMIZERS["sgd"], 1, lambda own, step, read: -1 if step == 2 else 0)
    (failed,) = together(lambda: hosted.run(0, 0, 5))
    assert isinstance(failed, LoopFailed)
    assert failed.status == -1
    assert hosted.layout.kept(hosted.vector).tolist() == [2]  # and the lock is free again
    with pytest.raises(LoopFailed):
        hosted.run(0, 2, 1)


@pytest.mark.parametrize("mode", MODES)
def test_spans_tell_what_a_replica_did_when(loaded: ctypes.CDLL, mode: str) -> None:
    hosted = Hosted(loaded, Update(mode), OPTIMIZERS["sgd"], 1)
    began = time.perf_counter_ns()
    taken = hosted.run(0, 7, 3, num_spans=1000)
    ended = time.perf_counter_ns()
    found = [(step, KINDS[kind], start, stop) for step, kind, start, stop in taken.spans.tolist()]
    steps = {step: (start, stop) for step, kind, start, stop in found if kind == spans.STEP}
    assert list(steps) == [7, 8, 9]
    for step, _, start, stop in found:
        assert began <= steps[step][0] <= start <= stop <= steps[step][1] <= ended
    kinds = {kind for _, kind, _, _ in found}
    locks = mode not in ("all_reduce", "lock_free", "overwrite")
    assert {spans.COMPUTE, spans.DATA, spans.LOGGING} < kinds
    assert (spans.LOCK_WAIT in kinds, spans.CRITICAL_SECTION in kinds) == (locks, locks)
    assert (spans.BARRIER_WAIT in kinds) == (mode == "all_reduce")
    assert (spans.WRITE in kinds) == (mode in (*LOSE, "slots_unlocked"))


def test_spans_beyond_the_room_for_them_are_left_out(loaded: ctypes.CDLL) -> None:
    hosted = Hosted(loaded, Update("locked"), OPTIMIZERS["sgd"], 1)
    assert len(hosted.run(0, 0, 3, num_spans=5).spans) == 5
    assert len(hosted.run(0, 3, 3).spans) == 0
    assert hosted.layout.kept(hosted.vector).tolist() == [6]


def test_the_loop_is_compiled_once_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    load_loop(store)
    monkeypatch.setenv("CXX", "no_such_compiler")
    load_loop(store)
    assert (store.statistics.hits, store.statistics.misses) == (1, 1)

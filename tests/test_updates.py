"""Every update mode of `strategy=threads` under forced orders: what it claims holds, what it does not claim breaks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from trainer.config import Config, UpdateMode
from trainer.state.layout import Layout, plan
from trainer.strategies.threads import build_mode
from trainer.updates import optimizers
from trainer.updates.all_reduce import AllReduce
from trainer.updates.mechanisms import MODES
from trainer.updates.shared_vector import Replica, SharedVector
from trainer.updates.transactions import Compute, Serialized, reads_in_place

WAIT = 20.0
THREAD_MODES = [name for name, mode in MODES.items() if "threads" in mode.strategies and name != "custom"]
JOINT = ["all_reduce", "unscaled_sum"]
ALONE = [name for name in THREAD_MODES if name not in JOINT]
KEEPING = [name for name in THREAD_MODES if "no_lost_updates" in MODES[name].claims]
RULES = {
    "sgd": optimizers.Sgd(0.1),
    "momentum": optimizers.Momentum(0.1, 0.9),
    "adam": optimizers.Adam(0.01, 0.9, 0.999, 1e-7),
}


class Case:
    """A mode over a small set of shared variables, with gradients that are a function of (replica, step)."""

    def __init__(self, name: str, rule: optimizers.Optimizer, num_replicas: int = 2, growth_steps: int = 0) -> None:
        self.rule = rule
        self.layout: Layout = plan(
            [("kernel", (5, 7)), ("bias", (7,))],
            [("moving_mean", (7,))],
            rule.slots,
            counter=rule.counts,
            num_replicas=num_replicas,
            loss_scale=growth_steps > 0,
        )
        self.initial = self.layout.pack([np.full(segment.shape, 0.5) for segment in self.layout.read_segments])
        training = SimpleNamespace(
            layout=self.layout,
            initial=self.initial,
            optimizer=rule,
            num_replicas=num_replicas,
            num_trainers=num_replicas,
            growth_steps=growth_steps,
        )
        config = Config(update_mode=UpdateMode(name), num_replicas=num_replicas)
        self.shared, self.mode, self.replicas = build_mode(config, training)

    def contribute(self, replica: Replica, step: int) -> None:
        generator = np.random.default_rng([replica.replica_id, step])
        vector = self.layout.own_canaries(replica.replica_id)
        for segment in self.layout.read_segments:
            vector[segment.span] = generator.normal(size=segment.size)
        replica.contribution = torch.from_numpy(vector)

    @property
    def kept(self) -> list[float]:
        return self.layout.kept(self.shared.vector.numpy()).tolist()


def in_threads(case: Case, body: Callable[[Replica], None]) -> None:
    """Run `body` for every replica in a thread of its own; whatever one raises is raised here."""
    errors: list[BaseException] = []

    def guarded(replica: Replica) -> None:
        try:
            body(replica)
        except BaseException as error:  # handed to the test's own thread
            errors.append(error)
            case.mode.abort()

    threads = [threading.Thread(target=guarded, args=(replica,), daemon=True) for replica in case.replicas]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
        assert not thread.is_alive(), "a replica is stuck"
    if errors:
        raise errors[0]


def overlapping(case: Case, steps: int) -> bool:
    """Every step, all replicas have read before any writes; whether the mode let them."""
    read, through = (threading.Barrier(len(case.replicas)) for _ in range(2))

    def body(replica: Replica) -> None:
        for step in range(steps):
            attempts = 0

            def compute(replica: Replica, step: int = step) -> None:
                nonlocal attempts
                attempts += 1
                case.contribute(replica, step)
                if attempts == 1:  # what an optimistic mode does again, it does alone
                    meet(read, 0.5)

            case.mode.step(replica, compute)
            if not read.broken:
                meet(through, WAIT)

    in_threads(case, body)
    return not read.broken


def meet(barrier: threading.Barrier, patience: float) -> None:
    """Wait for the others, until it turns out that they cannot come."""
    with suppress(threading.BrokenBarrierError):
        barrier.wait(patience)


def take_step(case: Case, replica: Replica, step: int) -> None:
    case.mode.step(replica, lambda replica: case.contribute(replica, step))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", KEEPING)
def test_a_mode_that_claims_it_keeps_every_update_when_reads_overlap(name: str, rule: str) -> None:
    case = Case(name, RULES[rule])
    assert overlapping(case, steps=30) == (name != "serialized")
    assert case.kept == [30, 30]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["write_locked", "overwrite", "slots_unlocked"])
def test_a_write_based_on_a_snapshot_loses_one_of_two_updates_whenever_reads_overlap(name: str, rule: str) -> None:
    case = Case(name, RULES[rule])
    assert overlapping(case, steps=30)
    if name == "slots_unlocked" and not RULES[rule].slots:
        assert case.kept == [30, 30]  # no slots, nothing unlocked
    elif name == "write_locked":
        assert sum(case.kept) == 30
    else:
        # Unlocked copies may also mix, so that variables keep different updates: never more than one of two.
        assert sum(case.kept) <= 30


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ALONE)
def test_one_after_the_other_no_mode_loses_anything(name: str, rule: str) -> None:
    case = Case(name, RULES[rule])
    for step in range(20):
        for replica in case.replicas:
            take_step(case, replica, step)
            assert replica.staleness == 0
    assert case.kept == [20, 20]


@pytest.mark.parametrize("rule", RULES)
def test_one_after_the_other_all_modes_end_in_the_same_bits(rule: str) -> None:
    vectors = []
    for name in ALONE:
        case = Case(name, RULES[rule])
        for step in range(20):
            for replica in case.replicas:
                take_step(case, replica, step)
        vectors.append(case.shared.vector.numpy())
    for vector in vectors[1:]:
        np.testing.assert_array_equal(vectors[0], vector)


@pytest.mark.parametrize("name", [name for name in ALONE if name != "serialized"])
def test_staleness_counts_the_updates_between_read_and_write(name: str) -> None:
    case = Case(name, RULES["sgd"])
    late, quick = case.replicas
    attempts = 0

    def compute_while_others_write(replica: Replica) -> None:
        nonlocal attempts
        attempts += 1
        case.contribute(replica, 0)
        if attempts == 1:
            for step in range(3):
                take_step(case, quick, step)

    case.mode.step(late, compute_while_others_write)
    fresh = "fresh_gradients" in MODES[name].claims
    assert (late.staleness, attempts) == ((0, 2) if fresh else (3, 1))
    assert quick.staleness == 0


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("num_replicas", [1, 2, 3, 7])
@pytest.mark.parametrize("name", ["all_reduce", "unscaled_sum"])
def test_a_joint_update_equals_one_replicas_with_the_mean_or_the_sum_of_gradients(
    name: str, num_replicas: int, rule: str
) -> None:
    case = Case(name, RULES[rule], num_replicas)
    scale = 1.0 / num_replicas if name == "all_reduce" else 1.0
    overlapping(case, steps=10)
    assert case.kept == [10] * num_replicas
    assert case.shared.commits == [10] * num_replicas

    alone = Case("locked", RULES[rule], num_replicas=1)
    (replica,) = alone.replicas

    def compute(step: int, replica: Replica) -> None:
        total = sum(contribution_values(case, own, step) for own in range(num_replicas))
        vector = alone.layout.own_canaries(0)
        vector[alone.layout.is_value[: alone.layout.read_size]] = total * np.float32(scale)
        replica.contribution = torch.from_numpy(vector)

    for step in range(10):
        alone.mode.step(replica, partial(compute, step))
    kinds = ("weight", "statistic", "slot", "counter")
    np.testing.assert_allclose(
        case.layout.values_of(case.shared.vector.numpy(), kinds),
        alone.layout.values_of(alone.shared.vector.numpy(), kinds),
        rtol=1e-6,
        atol=1e-7,
    )


def contribution_values(case: Case, own: int, step: int) -> np.ndarray:
    case.contribute(case.replicas[own], step)
    return case.replicas[own].contribution.numpy()[case.layout.is_value[: case.layout.read_size]]


def test_all_reduce_gives_the_same_bits_in_every_run() -> None:
    vectors = []
    for _ in range(5):
        case = Case("all_reduce", RULES["adam"], num_replicas=3)
        overlapping(case, steps=20)
        vectors.append(case.shared.vector.numpy().copy())
    assert all(np.array_equal(vectors[0], vector) for vector in vectors)


def test_locked_ends_where_the_sum_of_all_deltas_leads() -> None:
    case = Case("locked", RULES["sgd"])
    overlapping(case, steps=50)
    total = sum(contribution_values(case, own, step).astype(np.float64) for own in range(2) for step in range(50))
    segments = [segment.size for segment in case.layout.of_kind("weight")]
    weights = case.layout.values_of(case.shared.vector.numpy(), kinds=("weight",))
    np.testing.assert_allclose(weights, 0.5 - 0.1 * total[: sum(segments)], rtol=1e-4, atol=1e-5)


IN_PLACE = ["serialized", *JOINT]
UNPREPARED = ["per_variable_lock", "slots_unlocked"]  # their rule is applied under no lock, or under many


@pytest.mark.parametrize("name", THREAD_MODES)
def test_a_snapshot_is_no_copy_where_nobody_writes_meanwhile(name: str) -> None:
    case = Case(name, RULES["momentum"])
    shared = case.shared.plain.untyped_storage().data_ptr()
    copies = {replica.snapshot.untyped_storage().data_ptr() != shared for replica in case.replicas}
    assert copies == {name not in IN_PLACE}


def test_a_step_of_ones_own_gets_copies_unless_it_says_otherwise() -> None:
    class Leaky(Serialized):
        def step(self, replica: Replica, compute: Compute) -> None:
            self.shared.copy_to(replica)

    class Said(Leaky):
        reads_in_place = True

        def step(self, replica: Replica, compute: Compute) -> None:
            self.shared.copy_to(replica)

    assert [reads_in_place(kind) for kind in (Serialized, Leaky, Said)] == [True, False, True]


@cache
def taken(name: str, rule: str, *, keeps: bool) -> Case:
    """Three steps of two replicas, one after the other where the mode lets them. Several tests look at it."""
    case = Case(name, RULES[rule])
    for replica in case.replicas:
        replica.keeps = keeps
    for step in range(3):
        if name in JOINT:
            in_threads(case, partial(take_step, case, step=step))
        else:
            for replica in case.replicas:
                take_step(case, replica, step)
    return case


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", THREAD_MODES)
def test_keeping_what_a_step_gave_changes_no_bit(name: str, rule: str) -> None:
    kept, spent = (taken(name, rule, keeps=keeps) for keeps in (True, False))
    np.testing.assert_array_equal(kept.shared.plain.numpy(), spent.shared.plain.numpy())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", THREAD_MODES)
def test_what_is_kept_is_what_the_optimizer_was_given(name: str, rule: str) -> None:
    case = taken(name, rule, keeps=True)
    values = case.mode.applied(case.replicas[1]).numpy()[case.layout.is_value[: case.layout.read_size]]
    own, other = contribution_values(case, 1, 2), contribution_values(case, 0, 2)
    expected = (other + own) * np.float32(0.5 if name == "all_reduce" else 1) if name in JOINT else own
    np.testing.assert_array_equal(values, expected)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", THREAD_MODES)
def test_a_spent_contribution_takes_no_memory_when_the_next_one_is_made(name: str, rule: str) -> None:
    in_place = name in JOINT or (rule == "sgd" and name not in UNPREPARED)
    for keeps in (True, False):
        case = taken(name, rule, keeps=keeps)
        for replica in case.replicas:
            case.shared.forget(replica)
            assert (len(replica.contribution) == 0) == (in_place and not keeps)


def test_autograd_does_not_take_a_write_beside_a_snapshot_for_one_in_it() -> None:
    shared = Case("all_reduce", RULES["adam"]).shared
    snapshot, counter = shared.replica(0, whole=False, in_place=True).snapshot, shared.layout.of_kind("counter")[0]
    with torch.enable_grad():
        loss = (snapshot.detach().requires_grad_() ** 2).sum()
        with torch.no_grad():
            shared.vector[counter.span] += 1
        loss.backward()
    shared.vector[0] = 7.0
    assert snapshot[0] == 7.0  # no copy


@pytest.mark.parametrize("name", [name for name in ALONE if name not in ("serialized", *UNPREPARED)])
def test_a_rule_that_only_multiplies_is_applied_before_the_lock(name: str) -> None:
    case, held = Case(name, RULES["sgd"]), []
    prepare = case.shared.prepare

    def watched(replica: Replica) -> None:
        held.append(case.mode.lock.locked())
        prepare(replica)

    case.shared.prepare = watched
    take_step(case, case.replicas[0], 0)
    assert held == [False]
    assert not case.replicas[0].prepared  # the delta is the one that was made then


class Halting(SharedVector):
    """A shared vector whose copy is interrupted after the first variable: it lets a writer go, and waits a moment."""

    half_way: threading.Event
    written: threading.Event

    def copy_to(self, replica: Replica) -> None:
        self.note_version(replica)
        half = self.layout.segments[0].end
        replica.snapshot[:half] = self.vector[:half]
        self.let_the_writer_go()
        replica.snapshot[half:] = self.vector[half : len(replica.snapshot)]

    def let_the_writer_go(self) -> None:
        self.half_way.set()
        self.written.wait(0.3)


class HaltingLock:
    """The same between two variables: a lock before which the reader, who is the main thread, lets a writer go."""

    def __init__(self, lock: threading.Lock, shared: Halting) -> None:
        self.lock, self.shared = lock, shared

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self.shared.let_the_writer_go()
        self.lock.acquire()

    def __exit__(self, *_: object) -> None:
        self.lock.release()


def canaries_of_a_halted_read(name: str) -> np.ndarray:
    """The canaries that a gradient was committed from, after another replica tried to write during the copying."""
    case = Case(name, RULES["momentum"])
    reader, writer = case.replicas
    case.contribute(writer, 0)
    ready, half_way, written = (threading.Event() for _ in range(3))

    def wait_for_the_reader(replica: Replica) -> None:
        if not ready.is_set():
            ready.set()
            assert half_way.wait(WAIT) or name == "serialized"

    def write() -> None:
        case.mode.step(writer, wait_for_the_reader)
        written.set()

    thread = threading.Thread(target=write, daemon=True)
    if name == "serialized":  # its writer cannot have read before
        half_way.set()
        ready.set()
    else:
        thread.start()
    assert ready.wait(WAIT)
    case.shared.__class__ = Halting
    case.shared.half_way, case.shared.written = half_way, written
    if name == "per_variable_lock":
        lock, part = case.mode.locks[1]
        case.mode.locks[1] = (HaltingLock(lock, case.shared), part)
    if name == "serialized":
        half_way.clear()
        threading.Timer(0.05, thread.start).start()
    found = []
    case.mode.step(reader, lambda replica: (case.contribute(replica, 0), found.append(replica.snapshot.numpy().copy())))
    thread.join(WAIT)
    assert not thread.is_alive()
    snapshot = found[-1]  # an optimistic mode's earlier attempt was thrown away
    canaries = case.layout.canaries
    return snapshot[canaries[(canaries < len(snapshot)).all(axis=(1, 2))]]


@pytest.mark.parametrize("name", ALONE)
def test_a_write_during_a_copy_tears_the_read_unless_the_mode_claims_otherwise(name: str) -> None:
    canaries = canaries_of_a_halted_read(name)
    whole = bool((canaries == canaries[:1, :1]).all())
    assert whole == ("no_torn_reads" in MODES[name].claims)


@pytest.mark.parametrize("name", THREAD_MODES)
def test_abort_frees_whoever_waits_for_another_replica(name: str) -> None:
    case = Case(name, RULES["sgd"])
    threading.Timer(0.1, case.mode.abort).start()
    if name in JOINT:
        with pytest.raises(threading.BrokenBarrierError):
            take_step(case, case.replicas[0], 0)
    else:
        take_step(case, case.replicas[0], 0)
        assert case.kept == [1, 0]


@pytest.mark.stress
def test_an_unlocked_in_place_add_tears_inside_the_kernel() -> None:
    """Two threads add 1 to a million floats 1,500 times each: under a lock all are kept, without it some are lost."""

    def total(lock: threading.Lock | None) -> torch.Tensor:
        shared, ones = torch.zeros(1_000_000), torch.ones(1_000_000)

        def add() -> None:
            for _ in range(1_500):
                if lock is None:
                    shared.add_(ones)
                else:
                    with lock:
                        shared.add_(ones)

        threads = [threading.Thread(target=add) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT * 2)
        return shared

    assert (total(threading.Lock()) == 3_000).all()
    unlocked = total(None)
    assert (unlocked <= 3_000).all()
    assert (unlocked < 3_000).any()


@pytest.mark.parametrize("overflows", [0.0, 1.0])
def test_the_counter_is_raised_by_what_was_decided_of_its_own_step(overflows: float) -> None:
    case = Case("all_reduce", optimizers.Adam(0.01, 0.9, 0.999, 1e-7), growth_steps=100)
    assert isinstance(case.mode, AllReduce)
    assert case.layout.loss_scale is not None
    joint, flag = case.mode.joint, case.layout.loss_scale.start
    for replica in case.replicas:
        case.contribute(replica, 0)
        replica.contribution[flag] = overflows
    for replica in case.replicas:
        joint.add_share(replica)
    joint.commit()
    # Both are through; one has let go of its contribution, the other has made the next one, for which it is otherwise.
    case.replicas[0].contribution = torch.empty(0)
    case.contribute(case.replicas[1], 1)
    case.replicas[1].contribution[flag] = 1.0 - overflows
    joint.count()
    (counter,) = case.layout.of_kind("counter")
    assert case.shared.vector[counter.span].tolist() == [1.0 - overflows]

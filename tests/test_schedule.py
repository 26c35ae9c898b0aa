"""Orders under control: who can go next, all orders of a case, orders drawn, orders as tokens, and locks in them."""

from __future__ import annotations

import itertools
import queue
import random
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.schedule.attributes import announced, rebound
from trainer.schedule.free_barrier import FreeBarrier
from trainer.schedule.locks import (
    AnyLock,
    Barrier,
    Lock,
    RLock,
    SharedLock,
    known_to_the_schedule,
    modelled,
    unmodelled,
)
from trainer.schedule.operations import ACQUIRE, BEGIN, COMPUTE, READ, RELEASE, SHARE, UNSHARE, UPDATE, WRITE, Operation
from trainer.schedule.order import DONE, Abandoned, Choose, Deadlock, Order
from trainer.schedule.point import listener, mark, point
from trainer.schedule.sampling import priorities, random_walk
from trainer.schedule.search import ORDERS, Search, Unsteady
from trainer.schedule.tokens import BadToken, Diverged, Replay, config_hash, parse, token_of
from trainer.schedule.turnstile import Failed, Stalled, Turnstile
from trainer.state.cursor import Sharded, SharedIterator
from trainer.state.first_call import FIRST_CALLS
from trainer.state.gradients import GradientHolder, PerReplica, SharedGrad
from trainer.state.layout import plan
from trainer.state.precision import PRECISION_HOLDERS
from trainer.state.random_numbers import Generated
from trainer.state.synchronized import Synchronized
from trainer.strategies.steps import draw

WAIT = 30.0

Body = Callable[[], None]


@pytest.fixture(autouse=True)
def _leaves_no_thread_and_no_listener() -> Iterator[None]:
    before = set(threading.enumerate())
    real = threading.Lock, threading.RLock, threading.Condition
    yield
    assert set(threading.enumerate()) == before
    assert listener() is None
    assert (threading.Lock, threading.RLock, threading.Condition) == real


# Running things.


def run(bodies: Sequence[Body], choose: Choose, *, seconds: float = WAIT) -> Order:
    order = Order(len(bodies), choose)
    Turnstile(order, seconds).run(bodies)
    return order


def first_able(order: Order) -> int:
    return order.able()[0]


def in_turn(turns: Sequence[int]) -> Choose:
    """Whoever `turns` names next, while it can go; then whoever can."""
    left = list(turns)

    def choose(order: Order) -> int:
        able = order.able()
        while left:
            if (own := left.pop(0)) in able:
                return own
        return able[0]

    return choose


@dataclass
class Explored:
    found: Counter[str]
    search: Search
    deadlocks: set[str] = field(default_factory=set)

    @property
    def orders(self) -> int:
        return self.found[ORDERS]


def explore(
    make: Callable[[], tuple[Sequence[Body], Callable[[], list[str]]]],
    *,
    preemptions: int | None = None,
    known: bool = False,
) -> Explored:
    """Every order of what `make` makes anew each time: bodies, and what to call the outcome."""
    search = Search(preemptions)
    explored = Explored(Counter(), search)
    while search.unfinished:
        with modelled():
            if known:
                with known_to_the_schedule():
                    _explore_one(make, search, explored)
            else:
                _explore_one(make, search, explored)
    explored.found = search.found
    return explored


def _explore_one(
    make: Callable[[], tuple[Sequence[Body], Callable[[], list[str]]]], search: Search, explored: Explored
) -> None:
    bodies, outcome = make()
    try:
        run(bodies, search.choose)
    except Abandoned:
        search.cut()
    except Deadlock as deadlock:
        explored.deadlocks.add(deadlock.told)
        search.complete(["deadlock"])
    else:
        search.complete(outcome())


def nothing() -> list[str]:
    return []


# Counts that can be had by hand.


def step_of(kind: str, num_variables: int) -> Callable[[], tuple[list[Body], Callable[[], list[str]]]]:
    """Two replicas that each make one step on shared variables, isolated as an update mode of that name does it."""
    names = [f"v{index}" for index in range(num_variables)]

    def make() -> tuple[list[Body], Callable[[], list[str]]]:
        locks = [Lock(f"lock of {name}") for name in names]

        def read(name: str) -> None:
            point(READ, name)

        def body() -> None:
            mark(BEGIN)
            if kind == "locked":
                with locks[0]:
                    list(map(read, names))
            elif kind == "per_variable_lock":
                for lock, name in zip(locks, names, strict=True):
                    with lock:
                        read(name)
            else:
                list(map(read, names))
            mark(COMPUTE)
            if kind == "locked":
                with locks[0]:
                    for name in names:
                        point(UPDATE, name)
            elif kind == "per_variable_lock":
                for lock, name in zip(locks, names, strict=True):
                    with lock:
                        point(UPDATE, name)
            elif kind == "write_locked":
                with locks[0]:
                    for name in names:
                        point(WRITE, name)
            elif kind == "split":
                for name in names:
                    read(name)
                    point(WRITE, name)
            else:
                for name in names:
                    point(WRITE if kind == "overwrite" else UPDATE, name)

        return [body, body], nothing

    return make


@pytest.mark.parametrize(
    ("kind", "num_variables", "orders"),
    [
        ("locked", 2, 6),
        ("overwrite", 1, 6),
        ("overwrite", 2, 70),
        ("overwrite", 3, 924),
        ("write_locked", 2, 56),
        ("lock_free", 2, 70),
        ("split", 2, 924),
        ("per_variable_lock", 2, 18_646),
    ],
)
def test_a_step_of_two_replicas_has_so_many_orders(kind: str, num_variables: int, orders: int) -> None:
    explored = explore(step_of(kind, num_variables))
    assert explored.orders == orders
    # What is equivalent is run once.
    assert explored.search.completed <= explored.search.runs <= orders


def same_place(num_replicas: int, operations: int) -> Callable[[], tuple[list[Body], Callable[[], list[str]]]]:
    def body() -> None:
        for _ in range(operations):
            point(UPDATE, "v")

    return lambda: ([body] * num_replicas, nothing)


@pytest.mark.parametrize(
    ("num_replicas", "preemptions", "orders"),
    [(3, 0, 6), (3, 1, 42), (3, 2, 192), (3, 3, 552), (3, None, 1_680), (4, 2, 2_424)],
)
def test_so_many_orders_of_three_operations_each_have_at_most_so_many_preemptions(
    num_replicas: int, preemptions: int | None, orders: int
) -> None:
    assert explore(same_place(num_replicas, 3), preemptions=preemptions).orders == orders


def test_replicas_that_never_meet_are_run_in_few_orders_and_counted_in_all() -> None:
    def body_of(own: int) -> Body:
        return lambda: [point(UPDATE, f"v{own}") for _ in range(4)] and None

    explored = explore(lambda: ([body_of(0), body_of(1)], nothing))
    assert explored.orders == 70
    # Not more than there are pairs of how far the two have come.
    assert explored.search.runs <= 5 * 5


def test_a_barrier_lets_all_go_on_and_is_no_choice() -> None:
    def make() -> tuple[list[Body], Callable[[], list[str]]]:
        barrier = Barrier(2)

        def body() -> None:
            for _ in range(2):
                point(READ, "v")
                point(WRITE, "v")
                barrier.wait()

        return [body, body], nothing

    assert explore(make).orders == 6 * 6


# The search against every order tried one by one.

Action = tuple[Any, ...]  # ("read" | "write" | "update", place) or ("lock", number, [actions])


def actions(depth: int) -> st.SearchStrategy[Action]:
    access = st.tuples(st.sampled_from([READ, WRITE, UPDATE]), st.sampled_from(["x", "y"]))
    if not depth:
        return access
    section = st.tuples(st.just("lock"), st.integers(0, 1), st.lists(actions(depth - 1), min_size=1, max_size=2))
    return st.one_of(access, access, section)


def flat(program: Sequence[Action]) -> Iterator[tuple[str, str]]:
    """A program in single operations."""
    for action in program:
        if action[0] == "lock":
            yield (ACQUIRE, f"lock {action[1]}")
            yield from flat(action[2])
            yield (RELEASE, f"lock {action[1]}")
        else:
            yield (action[0], action[1])


def is_small(programs: list[list[Action]]) -> bool:
    lengths = [len(list(flat(program))) for program in programs]
    return sum(lengths) <= (9 if len(programs) == 3 else 10)


PROGRAMS = (
    st.integers(2, 3)
    .flatmap(lambda n: st.lists(st.lists(actions(2), min_size=1, max_size=3), min_size=n, max_size=n))
    .filter(is_small)
)


class World:
    """What programs do to two places: a write leaves who wrote, an update counts, a read is remembered."""

    def __init__(self, num_replicas: int) -> None:
        self.places: dict[str, tuple[Any, ...]] = {"x": (), "y": ()}
        self.seen: list[tuple[Any, ...]] = [()] * num_replicas

    def do(self, own: int, kind: str, place: str) -> None:
        if kind != WRITE:
            self.seen[own] = (*self.seen[own], self.places[place])
        if kind == WRITE:
            self.places[place] = (f"by {own}",)
        elif kind == UPDATE:
            self.places[place] = (*self.places[place], own)

    @property
    def told(self) -> str:
        return f"{self.places} {self.seen}"

    def copy(self) -> World:
        other = World(len(self.seen))
        other.places, other.seen = dict(self.places), list(self.seen)
        return other


def brute_force(programs: list[list[tuple[str, str]]], preemptions: int | None) -> Counter[str]:
    """Every order, one after another: how many there are, and how many have each outcome."""
    found: Counter[str] = Counter()

    def go(at: tuple[int, ...], owners: dict[str, int], world: World, last: int | None, left: int | None) -> None:
        def can_go(own: int) -> bool:
            if at[own] == len(programs[own]):
                return False
            kind, place = programs[own][at[own]]
            return kind != ACQUIRE or place not in owners

        able = [own for own in range(len(programs)) if can_go(own)]
        if not able:
            through = all(place == len(program) for place, program in zip(at, programs, strict=True))
            found.update([ORDERS, world.told if through else "deadlock"])
            return
        for own in able:
            cost = last in able and own != last
            if left is not None and cost > left:
                continue
            kind, place = programs[own][at[own]]
            now, after = dict(owners), world.copy()
            if kind == ACQUIRE:
                now[place] = own
            elif kind == RELEASE:
                del now[place]
            else:
                after.do(own, kind, place)
            following = tuple(where + (each == own) for each, where in enumerate(at))
            go(following, now, after, own, None if left is None else left - cost)

    go((0,) * len(programs), {}, World(len(programs)), None, preemptions)
    return found


@given(programs=PROGRAMS, preemptions=st.sampled_from([None, 0, 1, 2]))
@settings(max_examples=60, deadline=None)
def test_a_search_counts_what_trying_every_order_counts(programs: list[list[Action]], preemptions: int | None) -> None:
    def make() -> tuple[list[Body], Callable[[], list[str]]]:
        world, locks = World(len(programs)), [Lock("lock 0"), Lock("lock 1")]

        def do(own: int, program: Sequence[Action]) -> None:
            for action in program:
                if action[0] == "lock":
                    with locks[action[1]]:
                        do(own, action[2])
                else:
                    point(*action)
                    world.do(own, *action)

        bodies = [lambda own=own, program=program: do(own, program) for own, program in enumerate(programs)]
        return bodies, lambda: [world.told]

    explored = explore(make, preemptions=preemptions)
    assert explored.found == brute_force([list(flat(program)) for program in programs], preemptions)


def test_a_search_of_a_program_that_depends_on_something_else_says_so() -> None:
    runs = itertools.count()

    def make() -> tuple[list[Body], Callable[[], list[str]]]:
        name = f"v{next(runs)}"
        return [lambda: point(WRITE, name)] * 2, nothing

    with pytest.raises(Unsteady, match="after 0 operations the replicas were about to 0 write v1, 1 write v1, and in"):
        explore(make)


# Deadlocks.


def test_two_locks_in_opposite_orders_are_a_deadlock_told_as_a_cycle_with_both_stacks() -> None:
    with modelled():
        a, b = Lock("lock of a"), Lock("lock of b")

    def one() -> None:
        with a, b:
            point(UPDATE, "v")

    def other() -> None:
        with b, a:
            point(UPDATE, "v")

    with pytest.raises(Deadlock) as raised:
        run([one, other], in_turn([0, 1]))
    assert raised.value.told == (
        "replica 0 waits for lock of b, which replica 1 holds; replica 1 waits for lock of a, which replica 0 holds"
    )
    assert {own: operation.told for own, operation in raised.value.waits.items()} == {
        0: "acquire lock of b",
        1: "acquire lock of a",
    }
    assert "in one" in raised.value.stacks[0]
    assert "in other" in raised.value.stacks[1]
    assert "trainer/schedule" not in "".join(raised.value.stacks.values())


def test_locks_in_opposite_orders_deadlock_in_two_of_six_orders_and_in_one_order_in_none() -> None:
    def locking(opposite: bool) -> Callable[[], tuple[list[Body], Callable[[], list[str]]]]:
        def make() -> tuple[list[Body], Callable[[], list[str]]]:
            locks = [Lock("a"), Lock("b")]

            def body(first: int) -> None:
                with locks[first], locks[1 - first]:
                    pass

            return [lambda: body(0), lambda: body(1 if opposite else 0)], nothing

        return make

    crossed = explore(locking(True))
    assert crossed.found["deadlock"] > 0
    assert crossed.deadlocks == {
        "replica 0 waits for b, which replica 1 holds; replica 1 waits for a, which replica 0 holds"
    }
    assert explore(locking(False)).found["deadlock"] == 0


def test_a_replica_that_waits_for_itself() -> None:
    with modelled():
        lock = Lock("lock")

    def body() -> None:
        with lock, lock:
            pass

    with pytest.raises(Deadlock, match=r"^replica 0 waits for lock, which it holds itself$"):
        run([body], first_able)


def test_a_barrier_that_one_replica_never_reaches() -> None:
    with modelled():
        barrier = Barrier(2)
    with pytest.raises(Deadlock, match=r"^replica 0 waits at barrier, which 2 replicas have to reach$"):
        run([barrier.wait, lambda: None], first_able)


# Locks.


def test_readers_share_a_lock_and_a_writer_does_not() -> None:
    inside: list[int] = []
    met: set[int] = set()

    def make() -> tuple[list[Body], Callable[[], list[str]]]:
        lock = SharedLock()
        inside.clear()

        def read() -> None:
            with lock.read():
                inside.append(1)
                point(READ, "v")
                met.add(sum(inside))
                inside.remove(1)

        def write() -> None:
            with lock.write():
                inside.append(10)
                point(WRITE, "v")
                met.add(sum(inside))
                inside.remove(10)

        return [read, read, write], nothing

    explored = explore(make)
    assert explored.found["deadlock"] == 0
    assert met == {1, 2, 10}


def test_a_reentrant_lock_lets_its_holder_in_again_and_nobody_else() -> None:
    inside: list[int] = []

    def make() -> tuple[list[Body], Callable[[], list[str]]]:
        lock = RLock()

        def body() -> None:
            with lock:
                inside.append(threading.get_ident())
                with lock:
                    point(UPDATE, "v")
                point(UPDATE, "v")
                assert set(inside) == {threading.get_ident()}
                inside.clear()

        return [body, body], nothing

    assert explore(make).found == Counter({ORDERS: 2})


def test_trying_a_lock_does_not_wait() -> None:
    def make() -> tuple[list[Body], Callable[[], list[str]]]:
        lock, found = Lock(), []

        def body() -> None:
            got = lock.acquire(blocking=False)
            found.append(got)
            if got:
                point(UPDATE, "v")
                lock.release()

        return [body, body], lambda: [str(found)]

    # The second to try gets it only after the first has given it back.
    found = explore(make).found
    assert set(found) == {ORDERS, "[True, True]", "[True, False]"}
    assert found["[True, True]"] == 2


@pytest.mark.parametrize("timeout", [0, 5.0])
def test_a_lock_with_a_time_limit(timeout: float) -> None:
    def make() -> tuple[list[Body], Callable[[], list[str]]]:
        lock, found = Lock(), []

        def body() -> None:
            found.append(lock.acquire(timeout=timeout))
            point(UPDATE, "v")
            if found[-1]:
                lock.release()

        return [body, body], lambda: [str(all(found))]

    assert (explore(make).found["False"] > 0) == (timeout == 0)


@pytest.mark.parametrize(("timeout", "ends"), [(-1.0, "stuck"), (5.0, "gave up")])
def test_the_time_for_a_lock_is_up_where_nobody_can_go_on(timeout: float, ends: str) -> None:
    def make() -> tuple[list[Body], Callable[[], list[str]]]:
        one, other = Lock("one"), Lock("other")
        got: list[bool] = []

        def body(first: AnyLock, second: AnyLock) -> None:
            with first:
                got.append(second.acquire(timeout=timeout))
                if got[-1]:
                    second.release()

        return [lambda: body(one, other), lambda: body(other, one)], lambda: [] if all(got) else ["gave up"]

    found = explore(make).found
    labels = {label: number for label, number in found.items() if label != ORDERS}
    # The orders that nobody gets out of without a limit are those in which somebody gives up with one.
    assert list(labels.values()) == [2]
    assert (ends in labels) == (ends == "gave up")


def test_a_wrong_time_limit_is_refused_as_by_threading() -> None:
    with modelled():
        lock = Lock()

    def body() -> None:
        with pytest.raises(ValueError, match="non-blocking"):
            lock.acquire(False, 1.0)
        with pytest.raises(ValueError, match="non-negative"):
            lock.acquire(True, -2.0)

    run([body], first_able)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_lock_that_is_not_held_is_not_given_back(reentrant: bool) -> None:
    with modelled():
        lock: Any = RLock() if reentrant else Lock()
    refused = "cannot release un-acquired lock" if reentrant else "release unlocked lock"

    def body() -> None:
        with pytest.raises(RuntimeError, match=refused):
            lock.release()
        with lock:
            pass
        with pytest.raises(RuntimeError, match=refused):
            lock.release()

    run([body, body], first_able)


@pytest.mark.parametrize("reentrant", [False, True])
def test_somebody_elses_lock_can_be_given_back_unless_it_is_reentrant(reentrant: bool) -> None:
    with modelled():
        lock: Any = RLock() if reentrant else Lock()

    def holds() -> None:
        lock.acquire()
        point(UPDATE, "v")

    def frees() -> None:
        if reentrant:
            with pytest.raises(RuntimeError, match="cannot release un-acquired lock"):
                lock.release()
        else:
            lock.release()
            assert not lock.locked()

    run([holds, frees], first_able)


def test_looking_at_a_lock_is_an_operation() -> None:
    with modelled():
        lock: Any = Lock()
    order = run([lock.locked], first_able)
    assert order.told == ["read lock"]


def test_a_lock_that_main_holds_is_refused_and_main_uses_it_as_an_ordinary_one() -> None:
    with modelled():
        lock = Lock("gate")
    with lock, pytest.raises(Failed, match="RuntimeError: gate is held by a thread that is no replica"):
        run([lock.acquire], first_able)
    assert lock.acquire(blocking=False)
    assert not lock.acquire(timeout=0.01)
    lock.release()


def test_names_do_not_depend_on_which_replica_made_its_lock_first() -> None:
    def names(turns: list[int]) -> dict[int, list[str]]:
        def body() -> None:
            point(UPDATE, "v")
            for _ in range(2):
                with Lock("own"):
                    pass

        with modelled():
            order = run([body, body], in_turn(turns))
        told: dict[int, list[str]] = {0: [], 1: []}
        for own, name in zip(order.granted, order.told, strict=True):
            told[own].append(name)
        return told

    assert names([0, 1, 0, 1]) == names([1, 0, 0, 1, 1])
    assert names([0])[1][1:3] == ["acquire own of replica 1", "release own of replica 1"]


def test_free_runs_have_ordinary_locks() -> None:
    assert isinstance(Lock(), type(threading.Lock()))
    assert isinstance(RLock(), type(threading.RLock()))
    assert isinstance(Barrier(2), FreeBarrier)
    with modelled(), unmodelled(), known_to_the_schedule():
        assert isinstance(threading.Lock(), type(threading._allocate_lock()))  # type: ignore[attr-defined]
        assert isinstance(threading.RLock(), threading._CRLock)  # type: ignore[attr-defined]


# What other people's code makes of locks.


def test_a_buffer_with_a_condition_hands_everything_on_in_every_order() -> None:
    def make() -> tuple[list[Body], Callable[[], list[str]]]:
        items: list[int] = []
        got: list[int] = []
        filled = threading.Condition()

        def produce() -> None:
            with filled:
                items.append(1)
                filled.notify()

        def consume() -> None:
            with filled:
                filled.wait_for(lambda: items)
                got.append(items.pop())

        return [produce, consume], lambda: [str(got)]

    found = explore(make, known=True).found
    assert found["[1]"] == found[ORDERS] > 1


def test_a_notification_that_comes_too_early_is_found_and_told() -> None:
    def make() -> tuple[list[Body], Callable[[], list[str]]]:
        ready = threading.Condition()

        def notify() -> None:
            with ready:
                ready.notify()

        def wait() -> None:
            with ready:
                ready.wait()  # no predicate: what came before is missed

        return [notify, wait], lambda: ["woken"]

    explored = explore(make, known=True)
    assert 0 < explored.found["deadlock"] < explored.orders
    assert explored.found["woken"] == explored.orders - explored.found["deadlock"]
    (told,) = explored.deadlocks
    assert re.fullmatch(r"replica 1 waits for notification of .*wait of replica 1, which it holds itself", told)


def test_a_condition_gives_up_all_of_a_reentrant_lock_and_has_all_of_it_back() -> None:
    def make() -> tuple[list[Body], Callable[[], list[str]]]:
        turn, done = threading.Condition(), []

        def wait() -> None:
            with turn, turn:
                turn.wait_for(lambda: done)
            with pytest.raises(RuntimeError, match="un-acquired"):
                turn.notify()

        def act() -> None:
            with turn:
                done.append(1)
                turn.notify_all()

        return [wait, act], nothing

    explored = explore(make, known=True)
    assert explored.found["deadlock"] == 0
    assert explored.orders > 1


def test_an_event() -> None:
    def make() -> tuple[list[Body], Callable[[], list[str]]]:
        event, values = threading.Event(), []

        def wait() -> None:
            assert event.wait()
            assert values == [1]

        def act() -> None:
            values.append(1)
            event.set()

        return [wait, act], nothing

    explored = explore(make, known=True)
    assert explored.found["deadlock"] == 0
    assert explored.orders > 1


@pytest.mark.parametrize(("permits", "most"), [(1, 1), (2, 2)])
def test_a_semaphore_lets_so_many_in(permits: int, most: int) -> None:
    most_inside = 0

    def make() -> tuple[list[Body], Callable[[], list[str]]]:
        semaphore, inside = threading.Semaphore(permits), []

        def body() -> None:
            nonlocal most_inside
            with semaphore:
                inside.append(1)
                point(UPDATE, "v")
                most_inside = max(most_inside, len(inside))
                inside.pop()

        return [body, body], nothing

    explored = explore(make, known=True)
    assert explored.found["deadlock"] == 0
    assert most_inside == most


def test_a_barrier_of_threading() -> None:
    def make() -> tuple[list[Body], Callable[[], list[str]]]:
        barrier, came = threading.Barrier(2), []

        def body() -> None:
            came.append(1)
            barrier.wait()
            assert len(came) == 2

        return [body, body], nothing

    explored = explore(make, known=True, preemptions=2)
    assert explored.found["deadlock"] == 0
    assert explored.orders > 1


def test_a_queue_hands_everything_on_in_its_order() -> None:
    def make() -> tuple[list[Body], Callable[[], list[str]]]:
        full: queue.Queue[int] = queue.Queue(maxsize=1)
        got: list[int] = []

        def put() -> None:
            for item in range(2):
                full.put(item)

        def get() -> None:
            for _ in range(2):
                got.append(full.get(timeout=1.0))

        return [put, get], lambda: [str(got)]

    found = explore(make, known=True, preemptions=2).found
    assert found["[0, 1]"] == found[ORDERS] > 1


@pytest.mark.parametrize("lock", ["exclusive", "re_entrant", "read_write", "upgradable"])
def test_a_synchronized_value_may_be_held_at_an_announcement(lock: Any) -> None:
    def make() -> tuple[list[Body], Callable[[], list[str]]]:
        total = Synchronized([0], lock)

        def body() -> None:
            with total.lock() if lock in ("exclusive", "re_entrant") else total.wlock() as handle:
                before = handle.value[0]
                point(UPDATE, "v")
                handle.value[0] = before + 1

        def outcome() -> list[str]:
            return [str(total.copy())]

        return [body, body], outcome

    explored = explore(make, known=True, preemptions=2)
    assert explored.found["[2]"] == explored.orders > 1


def test_a_synchronized_value_is_waited_for() -> None:
    def make() -> tuple[list[Body], Callable[[], list[str]]]:
        total = Synchronized([0])

        def wait() -> None:
            with total.lock() as handle:
                handle.wait_for(lambda value: value[0] == 1)

        def act() -> None:
            total.with_lock(lambda value: value.__setitem__(0, 1))

        return [wait, act], nothing

    explored = explore(make, known=True, preemptions=2)
    assert explored.found["deadlock"] == 0


# Attributes.


class Tickets:
    def __init__(self) -> None:
        self.limit = 3  # never assigned again
        self.next = 0
        self.__drawn = 0
        self.waiting: list[int] = []

    @property
    def half(self) -> float:
        return self.next / 2

    @half.setter
    def half(self, value: float) -> None:
        self.next = int(value * 2)

    def draw(self) -> int:
        number = self.next
        self.next = number + 1
        self.__drawn += 1
        self.waiting.append(self.limit)
        return number

    def set_half(self) -> None:
        self.half = 0.5


def test_attributes_that_methods_assign_are_announced_and_no_others() -> None:
    assert rebound(Tickets) == {"next", "_Tickets__drawn"}
    tickets = announced(Tickets)()
    assert isinstance(tickets, Tickets)
    order = run([tickets.draw], first_able)
    drawn = "Tickets._Tickets__drawn"
    assert order.told == ["read Tickets.next", "write Tickets.next", f"read {drawn}", f"write {drawn}"]
    values = [event.operation.value for event in order.history.events if event.operation.kind == WRITE]
    assert values == ["1", "1"]
    assert {event.operation.of for event in order.history.events} == {"attribute"}
    assert run([tickets.set_half], first_able).told == ["write Tickets.next"]


def test_an_attribute_that_two_replicas_count_in_loses_an_update_in_four_of_six_orders() -> None:
    class Counts:
        def __init__(self) -> None:
            self.total = 0

        def add(self) -> None:
            self.total += 1

    def make() -> tuple[list[Body], Callable[[], list[str]]]:
        counts = announced(Counts)()
        return [counts.add] * 2, lambda: [str(counts.total)]

    assert explore(make).found == Counter({ORDERS: 6, "1": 4, "2": 2})


def test_without_source_attributes_that_hold_scalars_are_announced() -> None:
    namespace: dict[str, Any] = {}
    exec(
        "class Made:\n"
        "    def __init__(self):\n"
        "        self.count, self.items = (0, 'a'), []\n"
        "    def go(self):\n"
        "        self.items.append(self.count)\n"
        "        self.more = 1\n"
        "        del self.more\n",
        namespace,
    )
    made = announced(namespace["Made"])()
    assert rebound(namespace["Made"]) is None
    assert run([made.go], first_able).told == ["read Made.count", "write Made.more", "write Made.more"]


# State holders.


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("explicit", []),
        ("inherited", []),
        ("thread_local", []),
        ("process_global", [READ, WRITE, READ, WRITE]),
        ("locked_global", [UPDATE, READ, UPDATE]),
    ],
)
def test_a_precision_holder_announces_what_replicas_share_of_it(name: str, told: list[str]) -> None:
    with modelled(), known_to_the_schedule():
        holder = PRECISION_HOLDERS[name]()

    def body() -> None:
        with holder.scope("bfloat16"):
            holder.current()

    order = run([body], first_able)
    assert order.told == [f"{kind} precision mode" for kind in told]
    values = [event.operation.value for event in order.history.events if event.operation.kind != READ]
    assert values == (["bfloat16", "none"] if told else [])


@pytest.mark.parametrize("name", PRECISION_HOLDERS)
def test_a_cleared_precision_holder_has_no_mode(name: str) -> None:
    holder = PRECISION_HOLDERS[name]()
    with holder.scope("bfloat16"):
        holder.clear()
        assert holder.current() is None


@pytest.mark.parametrize(
    ("name", "most"), [("before_start", 0), ("double_checked", 1), ("instance_set", 2), ("flag", 2)]
)
def test_a_first_call_is_made_so_often_in_the_worst_order(name: str, most: int) -> None:
    def make() -> tuple[list[Body], Callable[[], list[str]]]:
        first_call, firsts = FIRST_CALLS[name](object()), []

        def body() -> None:
            with first_call.call() as first:
                firsts.append(first)

        return [body, body], lambda: [str(sum(firsts))]

    found = explore(make).found
    assert max(int(each) for each in found if each != ORDERS) == most


def test_a_shared_cursor_gives_a_batch_twice_in_four_of_six_orders_and_a_sharded_one_never() -> None:
    def taking(make_cursor: Callable[[], Any]) -> Callable[[], tuple[list[Body], Callable[[], list[str]]]]:
        def make() -> tuple[list[Body], Callable[[], list[str]]]:
            cursor, taken = make_cursor(), []

            def body_of(own: int) -> Body:
                return lambda: taken.append(cursor.take(own, 0)[0])

            return [body_of(0), body_of(1)], lambda: [str(sorted(taken))]

        return make

    assert explore(taking(lambda: SharedIterator(str, 4))).found == Counter({ORDERS: 6, "[0, 0]": 4, "[0, 1]": 2})
    assert explore(taking(lambda: Sharded(str, 2))).found == Counter({ORDERS: 1, "[0, 1]": 1})
    order = run([lambda: SharedIterator(str, 4).take(0, 0) and None], first_able)
    assert [(event.operation.told, event.operation.value) for event in order.history.events] == [
        ("read cursor", ""),
        ("write cursor", "0"),
    ]


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("captured", [True, False])
def test_a_gradient_buffer_announces_its_clearing_adding_and_reading(shared: bool, captured: bool) -> None:
    layout = plan([("kernel", (3,))], [], (), counter=False, num_replicas=2)

    def make() -> tuple[list[Body], Callable[[], list[str]]]:
        holder: GradientHolder = SharedGrad(layout) if shared else PerReplica()
        mixed: list[bool | None] = []

        def body(gradient: float) -> None:
            if captured:
                holder.put(torch.full((layout.read_size,), gradient))
            else:
                holder.differentiate(lambda leaves: ((leaves[0] * gradient).sum(), None), [torch.zeros(3)])
            mixed.append(holder.mixed())

        return [lambda: body(1.0), lambda: body(2.0)], lambda: ["mixed" if any(mixed) else "apart"]

    found = explore(make).found
    assert found == (Counter({ORDERS: 20, "mixed": 18, "apart": 2}) if shared else Counter({ORDERS: 1, "apart": 1}))
    order = run(make()[0][:1], first_able)
    assert order.told == (["write .grad", "update .grad", "read .grad"] if shared else [])


def test_a_shared_generator_announces_each_draw() -> None:
    drawn = Generated(draw)
    order = run([lambda: drawn.bits(layer_index=0, num_elements=3, batch=2)], first_able)
    assert order.told == ["update generator"]


# Drawn orders. These need no threads: an order is asked directly.


def dry(programs: Sequence[Sequence[Operation]], choose: Choose) -> Order:
    """An order of replicas that do nothing but announce."""
    order = Order(len(programs), choose)
    left = [list(program) for program in programs]
    while (own := order.next()) is not None:
        order.pending[own] = left[own].pop(0) if left[own] else DONE
    return order


def independent(lengths: Sequence[int]) -> list[list[Operation]]:
    return [[Operation(UPDATE, f"v{own}", (f"v{own}",)) for _ in range(length)] for own, length in enumerate(lengths)]


@pytest.mark.parametrize(("lengths", "orders"), [((3, 3), 20), ((1, 5), 6), ((2, 2, 2), 90)])
def test_a_random_walk_draws_every_order_equally_often(lengths: tuple[int, ...], orders: int) -> None:
    programs, expected = independent(lengths), 200
    drawn = Counter(tuple(dry(programs, random_walk(seed, lengths)).granted) for seed in range(expected * orders))
    assert len(drawn) == orders
    # Five standard deviations.
    assert all(abs(count - expected) < 5 * expected**0.5 for count in drawn.values())


def test_whoever_goes_next_by_a_fair_coin_does_not() -> None:
    programs = independent((1, 5))

    def coin(seed: int) -> Choose:
        numbers = random.Random(seed)
        return lambda order: numbers.choice(order.able())

    drawn = Counter(tuple(dry(programs, coin(seed)).granted) for seed in range(1200))
    assert max(drawn.values()) > 200 + 5 * 200**0.5


@pytest.mark.parametrize("length", [4, 10, 20])
def test_priorities_find_what_needs_two_things_in_order_as_often_as_promised(length: int) -> None:
    # Replica 1's only operation has to fall between two given ones of replica 0.
    lengths, seeds, found = (length, 1), 4000, 0
    for seed in range(seeds):
        granted = dry(independent(lengths), priorities(seed, lengths, depth=2)).granted
        found += granted.index(1) == length - 1
    promised = seeds / (len(lengths) * sum(lengths))
    assert found >= promised - 5 * promised**0.5  # exactly as often as that, here; five standard deviations


def test_a_fair_coin_hardly_ever_lets_a_replica_fall_behind() -> None:
    found = 0
    for seed in range(4000):
        numbers = random.Random(seed)
        granted = dry(independent((20, 1)), lambda order, numbers=numbers: numbers.choice(order.able())).granted
        found += granted.index(1) == 19
    assert found < 4000 / 42 / 2


@given(lengths=st.lists(st.integers(1, 5), min_size=1, max_size=4), seed=st.integers(0, 2**32), depth=st.integers(1, 9))
def test_drawn_orders_are_the_same_for_the_same_seed(lengths: list[int], seed: int, depth: int) -> None:
    for drawn in (lambda: random_walk(seed, lengths), lambda: priorities(seed, lengths, depth)):
        first, second = (dry(independent(lengths), drawn()).granted for _ in range(2))
        assert first == second
        assert Counter(first) == Counter(dict(enumerate(lengths)))


def test_one_priority_never_preempts() -> None:
    for seed in range(50):
        assert dry(independent((4, 4, 4)), priorities(seed, (4, 4, 4), depth=1)).preemptions == 0


# Tokens.

NAMES = st.sampled_from(["v", "dense/kernel", "precision mode", "dense/kernel[3]"])
OPERATIONS = st.builds(lambda kind, name: Operation(kind, name, (name,)), st.sampled_from([READ, WRITE, UPDATE]), NAMES)
# More replicas than there are letters, too.
DRY_PROGRAMS = st.one_of(
    st.lists(st.lists(OPERATIONS, max_size=12), min_size=1, max_size=4),
    st.lists(st.lists(OPERATIONS, max_size=2), min_size=27, max_size=30),
)


@given(programs=DRY_PROGRAMS, seed=st.integers(0, 2**32))
@settings(deadline=None)
def test_a_token_is_read_as_it_was_written_and_replays_to_the_same_order(
    programs: list[list[Operation]], seed: int
) -> None:
    numbers = random.Random(seed)
    order = dry(programs, lambda order: numbers.choice(order.able()))
    token = token_of(order, config_hash(["locked", 2]))
    assert re.fullmatch(r"[A-Za-z][A-Za-z0-9_.-]*", str(token))
    assert parse(str(token)) == token
    replay = Replay(parse(str(token)))
    again = dry(programs, replay.choose)
    replay.check(again, done=True)
    assert (again.granted, again.told) == (order.granted, order.told)


def test_a_replay_is_the_same_order_a_hundred_times_over() -> None:
    def bodies() -> tuple[list[Body], list[int]]:
        value = [0]
        lock = Lock()

        def body() -> None:
            for _ in range(3):
                point(READ, "v")
                before = value[0]
                with lock:
                    point(WRITE, "v")
                    value[0] = before + 1

        return [body] * 3, value

    with modelled():
        made, value = bodies()
    numbers = random.Random(5)
    order = run(made, lambda order: numbers.choice(order.able()))
    token = parse(str(token_of(order, "abcdef")))
    for _ in range(100):
        with modelled():
            made, again = bodies()
        replay = Replay(token)
        repeated = run(made, replay.choose)
        replay.check(repeated, done=True)
        assert repeated.granted == order.granted
        assert repeated.told == order.told
        assert again == value


def replayed(programs: list[list[Operation]], changed: list[list[Operation]], choose: Choose) -> None:
    replay = Replay(token_of(dry(programs, choose), "abcdef"))
    replay.check(dry(changed, replay.choose), done=True)


def writes(*names: str) -> list[Operation]:
    return [Operation(WRITE, name, (name,)) for name in names]


def test_a_replay_of_another_program_stops_at_the_first_run_of_operations_that_differs() -> None:
    programs = [writes("a", "b", "c"), writes("a", "b", "c")]
    # Replica 0 twice, replica 1 once, replica 0, replica 1 twice.
    turns = [0, 0, 1, 0, 1, 1]
    with pytest.raises(Diverged) as raised:
        replayed(programs, [writes("a", "b", "c"), writes("other", "b", "c")], in_turn(turns))
    assert re.fullmatch(
        r"operations 3 to 3 should be replica 1's with names that check to '[a-z]{3}', but they were: "
        r"replica 1 write other",
        str(raised.value),
    )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ((1, 2, 2), "operation 2 should be replica 0's, which is through"),
        ((2, 2, 1), "operations 5 to 6 should be replica 2's with names that .*, but they were: replica 2 write v0"),
        ((3, 2, 3), "after 6 operations, all that the token has, replicas still have something to do"),
        ((2, 2, 3), "the token has 6 operations, and there were 7"),
    ],
)
def test_a_replay_of_a_longer_or_shorter_program_says_so(changed: tuple[int, ...], message: str) -> None:
    def programs(lengths: tuple[int, ...]) -> list[list[Operation]]:
        return [writes(*(f"v{index}" for index in range(length))) for length in lengths]

    with pytest.raises(Diverged, match=message):
        replayed(programs((2, 2, 2)), programs(changed), in_turn([0, 0, 1, 1, 2, 2]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no token"),
        ("nonsense", "is no token"),
        ("s1.2.abcdef", "is no token"),
        ("s1.2.ABCDEF.a1bb", "is no token"),
        ("s2.2.abcdef.a1bb", "is of format 2, and this version reads format 1"),
        ("s1.2.abcdef.a1bbb-c1bbb", "names a replica beyond its 2"),
        ("s1.2.abcdef.a0bb", "has 'a0bb' where a run of operations should be"),
        ("s1.2.abcdef.a1bbb-xx", "has 'xx' where a run of operations should be"),
    ],
)
def test_what_is_no_token_is_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(BadToken, match=message) as raised:
        parse(text)
    assert "\n" not in str(raised.value)


@given(
    text=st.one_of(
        st.text(max_size=30), st.from_regex(r"s1\.[0-9]{1,2}\.[0-9a-f]{6}\.[a-z0-9_-]{0,12}", fullmatch=True)
    )
)
def test_any_text_is_a_token_that_reads_back_or_is_refused(text: str) -> None:
    try:
        token = parse(text)
    except BadToken:
        return
    assert parse(str(token)) == token


# Threads.


def test_what_is_thread_local_stays_so_under_a_schedule() -> None:
    held = threading.local()

    def body_of(own: int) -> Body:
        def body() -> None:
            held.own = own
            for _ in range(3):
                point(UPDATE, "v")
                assert held.own == own

        return body

    order = run([body_of(own) for own in range(3)], in_turn([0, 1, 2] * 3))
    assert order.granted == [0, 1, 2] * 3


def test_one_replica_runs_at_a_time() -> None:
    running = 0

    def body() -> None:
        nonlocal running
        for _ in range(20):
            running += 1
            assert running == 1
            sum(range(2000))
            running -= 1
            point(UPDATE, "v")

    numbers = random.Random(0)
    run([body] * 4, lambda order: numbers.choice(order.able()))


def test_threads_that_are_no_replicas_are_not_kept_waiting() -> None:
    order = Order(1, first_able)

    def body() -> None:
        other = threading.Thread(target=lambda: point(WRITE, "v"))
        other.start()
        other.join(WAIT)
        assert not other.is_alive()
        point(READ, "v")

    Turnstile(order, WAIT).run([body])
    assert order.told == ["read v"]


def test_a_replica_that_raises_ends_the_order_and_its_exception_is_the_cause() -> None:
    cleaned: list[int] = []

    def raises() -> None:
        point(UPDATE, "v")
        raise KeyError("missing")

    def waits() -> None:
        try:
            for _ in range(5):
                point(UPDATE, "v")
        finally:
            cleaned.append(1)

    with pytest.raises(Failed, match=r"^replica 1 raised KeyError: 'missing'$") as raised:
        run([waits, raises, waits], in_turn([0, 1, 1]))
    assert isinstance(raised.value.__cause__, KeyError)
    assert raised.value.replica == 1
    assert cleaned == [1, 1]


def test_an_abandoned_order_unwinds_through_everything() -> None:
    unwound: list[str] = []
    with modelled(), known_to_the_schedule():
        lock, turn, total = Lock(), threading.Condition(), Synchronized(0)
        shared, first_call = SharedLock(), FIRST_CALLS["double_checked"](object())

    def locks() -> None:
        try:
            with lock, turn, shared.write(), total.lock(), first_call.call():
                point(UPDATE, "v")
                point(UPDATE, "v")
        except BaseException as error:
            unwound.append(type(error).__name__)
            raise

    def waits() -> None:
        try:
            with turn:
                turn.wait()
        except BaseException as error:
            unwound.append(type(error).__name__)
            raise

    def stands_by() -> None:
        point(READ, "w")

    def choose(order: Order) -> int:
        if "update v" in order.told:
            raise Abandoned
        # First replica 1, until it waits; then replica 0, until it has everything.
        return min(order.able(), key=[1, 0, 2, 3].__getitem__)

    with modelled(), known_to_the_schedule(), pytest.raises(Abandoned):
        run([locks, waits, locks, stands_by], choose)
    assert unwound == ["Abandoned"] * 3


def test_a_replica_that_makes_something_of_being_ended_is_let_end() -> None:
    def stubborn() -> None:
        for _ in range(3):
            try:
                point(UPDATE, "v")
            except BaseException:
                continue
        raise ValueError("of its own")

    def choose(order: Order) -> int:
        raise Abandoned

    with pytest.raises(Abandoned):
        run([stubborn, stubborn], choose)


def test_what_goes_wrong_in_a_chooser_ends_the_order() -> None:
    def choose(order: Order) -> int:
        raise Diverged("elsewhere")

    with pytest.raises(Diverged, match="elsewhere"):
        run([lambda: point(UPDATE, "v")] * 2, choose)


def test_a_replica_that_waits_for_what_the_schedule_cannot_see_is_told_with_its_stack() -> None:
    real = threading.Lock()
    ended = threading.Event()

    def waits_for_a_real_lock() -> None:
        try:
            point(UPDATE, "v")
            with real:
                point(UPDATE, "v")
        finally:
            ended.set()

    with real:
        with pytest.raises(Stalled, match=r"replica 0, whose turn it was, announced nothing for 0\.5 s") as raised:
            run([waits_for_a_real_lock, lambda: point(UPDATE, "v")], first_able, seconds=0.5)
        assert "in waits_for_a_real_lock" in str(raised.value)
        assert "with real:" in str(raised.value)
        assert "turnstile" not in str(raised.value)
    assert ended.wait(WAIT)
    for thread in threading.enumerate():
        if thread.name.startswith("replica-"):
            thread.join(WAIT)


def test_one_schedule_at_a_time() -> None:
    def body() -> None:
        with pytest.raises(AssertionError, match="one schedule at a time"):
            Turnstile(Order(1, first_able)).run([lambda: None])

    run([body], first_able)


# The history.


def test_versions_are_counted_per_place_and_bases_are_what_the_step_read_last() -> None:
    def body() -> None:
        mark(BEGIN)
        point(READ, "v")
        point(WRITE, "v")
        point(UPDATE, "v")
        mark(BEGIN)
        point(WRITE, "v")

    order = run([body, body], in_turn([0, 1, 0, 1, 0, 1, 0, 1]))
    noted = [
        (event.replica, event.step, event.operation.kind, event.versions, event.bases)
        for event in order.history.events
        if event.operation.kind != BEGIN
    ]
    assert noted == [
        (0, 0, READ, (0,), ()),
        (1, 0, READ, (0,), ()),
        (0, 0, WRITE, (1,), (0,)),
        (1, 0, WRITE, (2,), (0,)),
        (0, 0, UPDATE, (3,), (2,)),
        (1, 0, UPDATE, (4,), (3,)),
        (0, 1, WRITE, (5,), (-1,)),
        (1, 1, WRITE, (6,), (-1,)),
    ]


def test_sharing_and_unsharing_are_told() -> None:
    with modelled():
        lock = SharedLock("lock")

    def body() -> None:
        with lock.read():
            pass

    assert [told.split()[0] for told in run([body], first_able).told] == [SHARE, UNSHARE]

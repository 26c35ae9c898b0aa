"""`LockOrder`: opposite orders are told before anything waits, with both sites; what cannot deadlock is not."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any, get_args

import pytest
from beside import WAIT, Beside, Worker, line_of, until

from trainer.state.guarded import LockKind
from trainer.state.synchronized import (
    AlreadyHeld,
    LockOrder,
    LockOrderError,
    LockTimeout,
    Poisoned,
    Synchronized,
    acquire_locked,
)

KINDS: tuple[LockKind, ...] = get_args(LockKind)
SHARED: tuple[LockKind, ...] = ("read_write", "upgradable")
every_kind = pytest.mark.parametrize("kind", KINDS)


def traced(names: str, order: LockOrder | None, kind: LockKind = "exclusive") -> list[Synchronized[Any]]:
    return [Synchronized([], kind, name=name, order=order, poisoning=False) for name in names.split()]


def section(shared: Synchronized[Any], timeout_seconds: float | None = None) -> Any:
    return shared.wlock(timeout_seconds) if shared._lock.kind in SHARED else shared.lock(timeout_seconds)


def a_then_b(a: Synchronized[Any], b: Synchronized[Any]) -> None:
    with section(a):  # a comes first
        inner = section(b)
        with inner:  # b comes second
            pass


def b_then_a(a: Synchronized[Any], b: Synchronized[Any]) -> None:
    with section(b):  # b comes before
        inner = section(a)
        with inner:  # a comes after
            pass


def nested(*wanted: Synchronized[Any]) -> None:
    if wanted:
        with section(wanted[0]):
            nested(*wanted[1:])


@every_kind
def test_two_threads_that_disagree_are_told_with_both_sites_of_each(kind: LockKind) -> None:
    a, b = traced("a b", LockOrder(), kind)
    first = Beside(lambda: a_then_b(a, b))
    first.result()
    second = Beside(lambda: b_then_a(a, b))
    with pytest.raises(LockOrderError) as raised:
        second.result()
    assert str(raised.value) == (
        f"Lock order: thread {second.name} acquires a at {line_of(__file__, 'a comes after')} "
        f"while it holds b from {line_of(__file__, 'b comes before')}, "
        f"but thread {first.name} acquired b at {line_of(__file__, 'b comes second')} "
        f"while it held a from {line_of(__file__, 'a comes first')}. "
        "Acquire them in one order, or together with acquire_locked()."
    )


@every_kind
def test_without_a_lock_order_nobody_is_told(kind: LockKind) -> None:
    """Unsafe twin: the same two threads, and it went well this time."""
    a, b = traced("a b", None, kind)
    Beside(lambda: a_then_b(a, b)).result()
    Beside(lambda: b_then_a(a, b)).result()


@every_kind
def test_the_thread_is_told_before_it_waits(kind: LockKind) -> None:
    a, b = traced("a b", LockOrder(), kind)
    a_then_b(a, b)
    holder, handle = Worker(), section(a)
    holder.do(handle.__enter__)
    with pytest.raises(LockOrderError):
        Beside(lambda: b_then_a(a, b)).result()
    holder.do(lambda: handle.__exit__(None, None, None))
    holder.end()
    nested(b)
    nested(a)


def test_one_thread_that_uses_both_orders_is_told_too() -> None:
    a, b = traced("a b", LockOrder())
    a_then_b(a, b)
    with pytest.raises(LockOrderError):
        b_then_a(a, b)


@pytest.mark.parametrize("number", [3, 4, 6])
def test_a_circle_of_any_length_is_told_with_every_site(number: int) -> None:
    names = [f"lock{index}" for index in range(number)]
    objects = traced(" ".join(names), LockOrder())
    pairs = list(itertools.pairwise([*objects, objects[0]]))
    for pair in pairs[:-1]:
        nested(*pair)
    with pytest.raises(LockOrderError) as raised:
        nested(*pairs[-1])
    message = str(raised.value)
    assert message.count("while it held") == number - 1
    assert message.count(f"{__file__}:") == 2 * number
    assert message.startswith(f"Lock order: thread MainThread acquires lock0 at {__file__}:")


def test_the_shortest_circle_is_the_one_that_is_told() -> None:
    a, b, c, d, e = traced("a b c d e", LockOrder())
    for pair in ((a, e), (e, d), (a, b), (b, c), (c, d)):
        nested(*pair)
    with pytest.raises(LockOrderError) as raised:
        nested(d, a)
    assert str(raised.value).count("while it held") == 2


def test_one_order_among_many_is_never_told() -> None:
    objects = traced("a b c d e", LockOrder())
    for number in range(2, 6):
        for subset in itertools.combinations(objects, number):
            Beside(lambda subset=subset: nested(*subset)).result()


def test_with_lock_and_whole_value_methods_are_seen() -> None:
    uses: list[Callable[[Synchronized[Any]], Any]] = [
        lambda shared: shared.with_lock(len),
        lambda shared: shared.with_lock(len, WAIT),
        lambda shared: shared.copy(),
        lambda shared: shared.exchange([]),
        lambda shared: shared.swap(Synchronized([])),
        lambda shared: shared.clear_poison(),
    ]
    for use in uses:
        a, b = traced("a b", LockOrder())
        a_then_b(a, b)
        with pytest.raises(LockOrderError), b.lock():
            use(a)


def test_acquire_locked_never_disagrees_with_itself() -> None:
    objects = traced("a b c", LockOrder())
    for order in itertools.permutations(objects):
        with acquire_locked(*order):
            pass


def test_acquire_locked_with_a_lock_in_hand_can_disagree() -> None:
    a, b, c = traced("a b c", LockOrder())
    with acquire_locked(c, b), a.lock():
        pass
    with pytest.raises(LockOrderError), a.lock(), acquire_locked(b, c):
        pass


def test_two_that_share_no_lock_order_are_not_compared() -> None:
    a, b = traced("a", LockOrder())[0], traced("b", LockOrder())[0]
    a_then_b(a, b)
    b_then_a(a, b)


def test_a_try_cannot_wait_and_so_cannot_deadlock() -> None:
    a, b = traced("a b", LockOrder())
    a_then_b(a, b)
    with b.lock(), a.lock(timeout_seconds=0):
        pass


def test_what_is_acquired_while_a_try_is_held_can() -> None:
    a, b = traced("a b", LockOrder())
    with a.lock(timeout_seconds=0), b.lock():
        pass
    with pytest.raises(LockOrderError):
        b_then_a(a, b)


def test_a_re_entrant_lock_that_is_held_may_be_acquired_again_after_others() -> None:
    a, b = traced("a b", LockOrder(), "re_entrant")
    with a.lock(), b.lock(), a.lock():
        pass
    a_then_b(a, b)
    with pytest.raises(LockOrderError):
        b_then_a(a, b)


def b_twice_and_then_a(a: Synchronized[Any], b: Synchronized[Any]) -> None:
    with b.lock():  # the outer section
        with b.lock():
            pass
        nested(a)


def test_the_site_of_a_re_entrant_lock_is_that_of_a_section_that_is_still_open() -> None:
    a, b = traced("a b", LockOrder(), "re_entrant")
    a_then_b(a, b)
    with pytest.raises(LockOrderError) as raised:
        b_twice_and_then_a(a, b)
    assert f"while it holds b from {line_of(__file__, 'the outer section')}, but" in str(raised.value)


@every_kind
def test_a_lock_that_was_not_had_or_is_no_longer_held_counts_for_nothing(kind: LockKind) -> None:
    a, b = traced("a b", LockOrder(), kind)
    holder, handle = Worker(), section(a)
    holder.do(handle.__enter__)
    with pytest.raises(LockTimeout):
        nested_with_limit(a)
    with section(b):
        pass
    holder.do(lambda: handle.__exit__(None, None, None))
    holder.end()
    poison(a)
    with pytest.raises(Poisoned):
        nested(a, b)
    a.clear_poison()
    b_then_a(a, b)


def nested_with_limit(shared: Synchronized[Any]) -> None:
    with section(shared, 0.01):
        raise AssertionError("inside")


def poison(shared: Synchronized[Any]) -> None:
    shared._poisoning = True
    with pytest.raises(ZeroDivisionError), section(shared):
        raise ZeroDivisionError
    shared._poisoning = False


def test_upgrading_with_another_lock_in_hand_is_waiting_in_the_opposite_order() -> None:
    """A reader of a that waits for b would wait for the upgrade, and the upgrade for the reader."""
    a, b = traced("a b", LockOrder(), "upgradable")
    with a.ulock() as handle:
        handle.upgrade()
    with pytest.raises(LockOrderError) as raised, a.ulock() as handle, b.rlock():
        handle.upgrade()  # the upgrade
    assert f"acquires a at {line_of(__file__, 'the upgrade')} while it holds b" in str(raised.value)
    with a.ulock() as handle, b.rlock():
        handle.upgrade(timeout_seconds=0)


@every_kind
def test_waiting_for_a_condition_with_another_lock_in_hand_is_too(kind: LockKind) -> None:
    a, b = traced("a b", LockOrder(), kind)
    with section(a) as handle, pytest.raises(LockOrderError), section(b):
        handle.wait_for(lambda value: value, WAIT)
    waiting = Beside(lambda: wait_alone(a))
    until(lambda: a._waiting == 1)
    a.exchange([1])
    waiting.result()


def wait_alone(shared: Synchronized[Any]) -> None:
    with section(shared) as handle:
        handle.wait_for(lambda value: value, WAIT)


def test_a_report_gets_each_disagreement_once_and_the_thread_goes_on() -> None:
    found: list[LockOrderError] = []
    a, b = traced("a b", LockOrder(report=found.append))
    a_then_b(a, b)
    for _ in range(3):
        b_then_a(a, b)
        a_then_b(a, b)
    assert len(found) == 1
    assert f"acquires a at {line_of(__file__, 'a comes after')}" in str(found[0])


def test_a_report_may_acquire_locks_of_the_same_order() -> None:
    found: Synchronized[list[str]]
    order = LockOrder(report=lambda error: found.with_lock(lambda value: value.append(str(error))))
    found = Synchronized([], order=order)
    a, b = traced("a b", order)
    a_then_b(a, b)
    b_then_a(a, b)
    assert len(found.copy()) == 1


def test_a_thread_that_would_wait_for_itself_is_told_that() -> None:
    (a,) = traced("a", LockOrder())
    with pytest.raises(AlreadyHeld):
        nested(a, a)


def test_threads_that_acquire_at_the_same_time_do_not_disturb_the_record() -> None:
    objects = traced("a b c d", LockOrder())
    start = threading.Barrier(8)

    def work() -> None:
        start.wait(WAIT)
        for _ in range(20):
            nested(*objects)

    for each in [Beside(work) for _ in range(8)]:
        each.result()
    with pytest.raises(LockOrderError):
        nested(objects[3], objects[0])

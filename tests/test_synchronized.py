"""`Synchronized`, of every lock kind: one suite, and what only some kinds have below it."""

from __future__ import annotations

import copy
import itertools
import pickle
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, get_args

import pytest
from beside import WAIT, Beside, Worker, line_of, passed, until

from trainer.state.guarded import LockKind
from trainer.state.synchronized import (
    AlreadyHeld,
    DeadHandle,
    LockTimeout,
    NoSuchAccess,
    Poisoned,
    ReadHandle,
    ReadOnlyHandle,
    Synchronized,
    WaitTimeout,
    WriteHandle,
    acquire_locked,
)

KINDS: tuple[LockKind, ...] = get_args(LockKind)
ANY_TWO = list(itertools.product(KINDS, repeat=2))
every_kind = pytest.mark.parametrize("kind", KINDS)
shared_kinds = pytest.mark.parametrize("kind", ["read_write", "upgradable"])
one_access_kinds = pytest.mark.parametrize("kind", ["exclusive", "re_entrant"])


def writing(shared: Synchronized[Any], timeout_seconds: float | None = None) -> WriteHandle[Any]:
    """A write section, by the name that the kind has for it."""
    return shared.lock(timeout_seconds) if has_one_access(shared) else shared.wlock(timeout_seconds)


def reading(shared: Synchronized[Any], timeout_seconds: float | None = None) -> ReadHandle[Any]:
    """The weakest section."""
    return shared.lock(timeout_seconds) if has_one_access(shared) else shared.rlock(timeout_seconds)


def with_write(shared: Synchronized[Any], fn: Callable[[Any], Any], timeout_seconds: float | None = None) -> Any:
    by = shared.with_lock if has_one_access(shared) else shared.with_wlock
    return by(fn, timeout_seconds)


def has_one_access(shared: Synchronized[Any]) -> bool:
    return shared._lock.kind in ("exclusive", "re_entrant")


class Acquire:
    """Every way to go in, by name: each takes the object and a time-out."""

    @staticmethod
    def handle(shared: Synchronized[Any], timeout_seconds: float | None) -> None:
        with writing(shared, timeout_seconds):
            pass

    @staticmethod
    def weakest(shared: Synchronized[Any], timeout_seconds: float | None) -> None:
        with reading(shared, timeout_seconds):
            pass

    @staticmethod
    def with_write(shared: Synchronized[Any], timeout_seconds: float | None) -> None:
        with_write(shared, lambda value: None, timeout_seconds)

    @staticmethod
    def copy(shared: Synchronized[Any], timeout_seconds: float | None) -> None:
        shared.copy(timeout_seconds)

    @staticmethod
    def exchange(shared: Synchronized[Any], timeout_seconds: float | None) -> None:
        shared.exchange(0, timeout_seconds)

    @staticmethod
    def swap(shared: Synchronized[Any], timeout_seconds: float | None) -> None:
        Synchronized(0).swap(shared, timeout_seconds)

    @staticmethod
    def together(shared: Synchronized[Any], timeout_seconds: float | None) -> None:
        with acquire_locked(shared, Synchronized(0), timeout_seconds=timeout_seconds):
            pass

    @staticmethod
    def together_each(shared: Synchronized[Any], timeout_seconds: float | None) -> None:
        with acquire_locked(writing(shared, timeout_seconds), Synchronized(0)):
            pass


WAYS = [name for name in vars(Acquire) if not name.startswith("_")]
every_way = pytest.mark.parametrize("way", WAYS)


def fails_in(section: Any, body: Callable[[Any], object] = lambda handle: None) -> None:
    """Leaves a section by an exception, after what the body does."""
    with pytest.raises(ZeroDivisionError), section as handle:
        fail(body(handle))


def fail(done: object = None) -> None:
    raise ZeroDivisionError("half way")


def held(shared: Synchronized[Any]) -> Callable[..., None]:
    """Another thread is in a write section until what is returned is called, with the exception to leave by if any."""
    worker, handle = Worker(), writing(shared)
    worker.do(handle.__enter__)

    def leave(error: BaseException | None = None) -> None:
        worker.do(lambda: handle.__exit__(None if error is None else type(error), error, None))
        worker.end()

    return leave


class Bare:
    """Unsafe twin: the value without a lock, used in the same words."""

    def __init__(self, value: Any) -> None:
        self.value = value

    @contextmanager
    def section(self, timeout_seconds: float | None = None) -> Iterator[Bare]:
        yield self


# Keeping others out


def increments_kept(section: Callable[[float | None], Any]) -> int:
    """Two increments, the second in the middle of the first if it can get in, else after it: how many are left."""

    def increment_now() -> bool:
        try:
            with section(0) as handle:
                handle.value += 1
        except LockTimeout:
            return False
        return True

    with section(None) as handle:
        before = handle.value
        overlapped = Beside(increment_now).result()
        handle.value = before + 1
    if not overlapped:
        assert Beside(increment_now).result()
    with section(None) as handle:
        return handle.value


@every_kind
def test_sections_keep_every_increment(kind: LockKind) -> None:
    shared = Synchronized(0, kind)
    assert increments_kept(lambda timeout_seconds: writing(shared, timeout_seconds)) == 2


def test_a_bare_value_loses_an_increment_when_they_overlap() -> None:
    assert increments_kept(Bare(0).section) == 1


@every_kind
@every_way
def test_a_try_raises_where_it_would_have_to_wait_and_leaves_nothing_behind(kind: LockKind, way: str) -> None:
    shared = Synchronized(0, kind, name="it")
    leave = held(shared)
    with pytest.raises(LockTimeout) as raised:
        getattr(Acquire, way)(shared, 0)
    access = "read" if way == "copy" or (way == "weakest" and not has_one_access(shared)) else "write"
    assert str(raised.value) == f"it: no {access} access within 0 s."
    leave()
    getattr(Acquire, way)(shared, 0)


@every_kind
@every_way
def test_a_time_out_ends_a_wait(kind: LockKind, way: str) -> None:
    shared = Synchronized(0, kind)
    leave = held(shared)
    with pytest.raises(LockTimeout, match=r"within 0\.01 s\.$"):
        getattr(Acquire, way)(shared, 0.01)
    leave()
    getattr(Acquire, way)(shared, 0.01)


@every_kind
@every_way
def test_who_waits_gets_in_when_the_other_leaves(kind: LockKind, way: str) -> None:
    shared = Synchronized(0, kind)
    leave = held(shared)
    waiting = [Beside(lambda seconds=seconds: getattr(Acquire, way)(shared, seconds)) for seconds in (None, WAIT)]
    leave()
    for each in waiting:
        each.result()


@pytest.mark.parametrize("kind", ["exclusive", "read_write", "upgradable"])
@every_way
def test_a_thread_that_would_wait_for_itself_is_told(kind: LockKind, way: str) -> None:
    shared = Synchronized(0, kind, name="it", poisoning=False)
    with pytest.raises(AlreadyHeld) as raised, writing(shared):
        getattr(Acquire, way)(shared, None)
    if kind == "exclusive":
        assert str(raised.value) == "it: this thread holds it already; lock='re_entrant' would let it in again."
    else:
        assert str(raised.value) == f"it: this thread holds it already, and lock='{kind}' is not re-entrant."
    getattr(Acquire, way)(shared, 0)


def test_with_lock_inside_with_lock_is_told_too() -> None:
    shared = Synchronized(0, name="it")
    with pytest.raises(AlreadyHeld):
        shared.with_lock(lambda _: shared.with_lock(lambda _: None))


def test_a_re_entrant_lock_lets_its_thread_in_again_and_frees_when_the_outermost_section_ends() -> None:
    shared = Synchronized([1], "re_entrant")

    def others_get_in() -> bool:
        def enter() -> bool:
            try:
                return shared.with_lock(lambda value: True, 0)
            except LockTimeout:
                return False

        return Beside(enter).result()

    with shared.lock() as outer:
        with shared.lock() as inner:
            inner.value.append(2)
        shared.with_lock(lambda value: shared.with_lock(lambda again: again.append(3)))
        shared.copy()
        outer.value.append(4)
        assert not others_get_in()
    assert others_get_in()
    assert shared.with_lock(lambda value: others_get_in()) is False
    assert shared.copy() == [1, 2, 3, 4]


class InterruptedCore:
    """Ctrl-C falls before the lock is acquired, or just after."""

    def __init__(self, core: Any, after: bool) -> None:
        self._core, self._after, self.release = core, after, core.release

    def acquire(self) -> bool:
        if self._after:
            self._core.acquire()
        raise KeyboardInterrupt


@one_access_kinds
@pytest.mark.parametrize("after", [False, True])
def test_ctrl_c_while_with_lock_acquires_leaves_no_trace(kind: LockKind, after: bool) -> None:
    shared: Any = Synchronized(0, kind)
    core = shared._lock.core
    leave = None if after else held(shared)
    shared._lock.core = InterruptedCore(core, after)
    with pytest.raises(KeyboardInterrupt):
        shared.with_lock(lambda value: value)
    shared._lock.core = core
    if leave is not None:
        with pytest.raises(LockTimeout):
            shared.exchange(1, timeout_seconds=0)
        leave()
    assert shared.poisoned_by is None
    assert Beside(lambda: shared.exchange(1, timeout_seconds=0)).result() == 0


# Handles


def uses_of(handle: Any) -> list[Callable[[], object]]:
    def set_value() -> None:
        handle.value = 1

    uses: list[Callable[[], object]] = [lambda: handle.value, set_value, lambda: handle.wait_for(lambda value: True)]
    if isinstance(handle, WriteHandle):
        uses += [handle.upgrade, handle.downgrade]
    return uses


def refusals(handle: Any) -> set[str]:
    """What every use of a handle answers; each must refuse."""
    messages = set()
    for use in uses_of(handle):
        with pytest.raises(DeadHandle) as raised:
            use()
        messages.add(str(raised.value))
    return messages


@every_kind
@pytest.mark.parametrize("section", [reading, writing])
def test_a_handle_gives_nothing_before_or_after_its_section(kind: LockKind, section: Any) -> None:
    handle = section(Synchronized(0, kind, name="it"))
    assert refusals(handle) == {"it: the handle does not hold the lock yet; use it as 'with ... as handle'."}
    with handle as same:
        assert same is handle
        assert handle.value == 0
    assert refusals(handle) == {"it: the handle is dead: its lock has been released."}


@every_kind
def test_a_handle_is_dead_after_an_exception_too(kind: LockKind) -> None:
    handle = writing(Synchronized(0, kind, name="it"))
    fails_in(handle)
    assert refusals(handle) == {"it: the handle is dead: its lock has been released."}


@every_kind
@pytest.mark.parametrize("section", [reading, writing])
def test_a_handle_gives_nothing_to_another_thread(kind: LockKind, section: Any) -> None:
    shared = Synchronized(0, kind, name="it")
    with section(shared) as handle:
        assert Beside(lambda: refusals(handle)).result() == {"it: another thread holds the lock through this handle."}
        with pytest.raises(DeadHandle):
            Beside(lambda: handle.__exit__(None, None, None)).result()
        assert handle.value == 0
    assert with_write(shared, lambda value: value, 0) == 0


@every_kind
def test_a_handle_that_was_kept_does_not_come_to_life_again(kind: LockKind) -> None:
    shared = Synchronized(0, kind, name="it")
    handle = writing(shared)
    with handle:
        pass
    with pytest.raises(DeadHandle) as raised, handle:
        pass
    assert str(raised.value) == "it: a handle is entered once; ask for another."
    assert with_write(shared, lambda value: value, 0) == 0


@every_kind
def test_a_handle_that_did_not_get_in_may_try_again(kind: LockKind) -> None:
    shared = Synchronized(0, kind)
    leave = held(shared)
    handle = writing(shared, 0)
    with pytest.raises(LockTimeout), handle:
        pass
    leave()
    with handle:
        assert handle.value == 0


@every_kind
def test_a_write_handle_sets_the_value(kind: LockKind) -> None:
    shared = Synchronized(0, kind)
    with writing(shared) as handle:
        assert handle.access == "write"
        handle.value = 1
        handle.value += 1
    assert shared.copy() == 2


@shared_kinds
def test_a_read_handle_does_not_set_the_value(kind: LockKind) -> None:
    shared = Synchronized(0, kind, name="it")
    with shared.rlock() as handle:
        assert handle.access == "read"
        with pytest.raises(ReadOnlyHandle) as raised:
            handle.value = 1  # type: ignore[assignment]
    assert str(raised.value) == "it: read access does not set the value; write access does."
    assert shared.copy() == 0


@shared_kinds
def test_a_read_handle_cannot_stop_a_method_of_the_value(kind: LockKind) -> None:
    """A limit, told in the docstring; were it gone, the docstring would be wrong."""
    shared = Synchronized([1], kind)
    with shared.rlock() as handle:
        handle.value.append(2)
    assert shared.copy() == [1, 2]


# What a kind does not have

HAVE = {
    "exclusive": {"lock", "with_lock"},
    "re_entrant": {"lock", "with_lock"},
    "read_write": {"rlock", "with_rlock", "wlock", "with_wlock"},
    "upgradable": {"rlock", "with_rlock", "wlock", "with_wlock", "ulock"},
}
METHODS = sorted(set().union(*HAVE.values()))


@every_kind
@pytest.mark.parametrize("method", METHODS)
def test_a_method_that_the_kind_lacks_says_which_kinds_have_it(kind: LockKind, method: str) -> None:
    shared = Synchronized(0, kind, name="it")
    call = getattr(shared, method)
    arguments = [lambda value: value] if method.startswith("with_") else []
    if method in HAVE[kind]:
        call(*arguments)
        return
    with pytest.raises(NoSuchAccess) as raised:
        call(*arguments)
    kinds = " or ".join(f"lock='{each}'" for each in KINDS if method in HAVE[each])
    assert str(raised.value) == f"it: {method}() needs {kinds}; this has lock='{kind}'."


def test_an_unknown_kind_is_refused_with_those_that_there_are() -> None:
    message = "lock must be one of exclusive, re_entrant, read_write, upgradable; got 'rw'."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Synchronized(0, "rw")  # type: ignore[arg-type]


# The value as a whole


@every_kind
def test_copy_shares_nothing_with_the_value(kind: LockKind) -> None:
    shared = Synchronized({"a": [1]}, kind)
    shared.copy()["a"].append(2)
    assert shared.copy() == {"a": [1]}


@every_kind
def test_exchange_sets_the_value_and_gives_back_the_old_one(kind: LockKind) -> None:
    shared = Synchronized("old", kind)
    assert shared.exchange("new") == "old"
    assert shared.copy() == "new"


@pytest.mark.parametrize(("one", "other"), ANY_TWO)
def test_swap_exchanges_the_values_of_any_two_kinds(one: LockKind, other: LockKind) -> None:
    first, second = Synchronized(1, one), Synchronized(2, other)
    first.swap(second)
    assert (first.copy(), second.copy()) == (2, 1)
    second.swap(first)
    first.swap(first)
    assert (first.copy(), second.copy()) == (1, 2)


@every_kind
def test_no_public_attribute_gives_the_value(kind: LockKind) -> None:
    value = object()
    shared = Synchronized(value, kind, name="it")
    public = {name: getattr(shared, name) for name in dir(shared) if not name.startswith("_")}
    assert value not in public.values()
    assert {name for name, attribute in public.items() if not callable(attribute)} == {"name", "poisoned_by"}
    assert repr(shared) == f"<Synchronized it: lock='{kind}'>"


@every_kind
def test_the_object_is_not_copied_or_pickled_with_its_lock(kind: LockKind) -> None:
    shared = Synchronized(0, kind, name="it")
    for duplicate in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError) as raised:
            duplicate(shared)
        assert str(raised.value) == "it: a Synchronized is not copied or pickled; copy() gives a copy of its value."


def test_a_nameless_object_is_named_after_its_value() -> None:
    names = {Synchronized([]).name, Synchronized([]).name}
    assert len(names) == 2
    assert all(re.fullmatch(r"list#\d+", name) for name in names)


# Poison


@every_kind
@every_way
def test_an_exception_in_a_write_section_keeps_everybody_out(kind: LockKind, way: str) -> None:
    shared = Synchronized([1], kind, name="it")
    with pytest.raises(ZeroDivisionError) as first, writing(shared) as handle:
        handle.value.append(1 / 0)  # the section that fails
    assert shared.poisoned_by is first.value
    for acquire in (
        lambda: getattr(Acquire, way)(shared, None),
        Beside(lambda: getattr(Acquire, way)(shared, 0)).result,
    ):
        with pytest.raises(Poisoned) as raised:
            acquire()
        assert raised.value.__cause__ is first.value
        assert str(raised.value) == (
            f"it is poisoned: ZeroDivisionError('division by zero') left a write section at "
            f"{line_of(__file__, 'the section that fails')}. "
            "repair() gives the value to look at and mend; clear_poison() lets everybody in again."
        )


@every_kind
def test_an_exception_in_with_lock_poisons_and_names_the_line_that_raised(kind: LockKind) -> None:
    shared = Synchronized([1], kind, name="it")

    def fails(value: list[int]) -> None:
        value.append(2)
        raise ZeroDivisionError("half way")  # fn fails

    with pytest.raises(ZeroDivisionError):
        with_write(shared, fails)
    with pytest.raises(Poisoned, match=f"at {re.escape(line_of(__file__, 'fn fails'))}\\. "):
        with_write(shared, len)


def raises() -> None:
    raise ZeroDivisionError  # below the section


@every_kind
def test_the_line_that_raised_is_named_however_deep_it_is(kind: LockKind) -> None:
    shared = Synchronized(0, kind)
    with pytest.raises(ZeroDivisionError), writing(shared):
        raises()
    with pytest.raises(Poisoned, match=f"at {re.escape(line_of(__file__, 'below the section'))}\\. "):
        shared.copy()


def test_a_builtin_that_fails_in_with_lock_is_named_by_the_call() -> None:
    shared: Synchronized[list[int]] = Synchronized([])
    with pytest.raises(IndexError):
        shared.with_lock(list.pop)  # a builtin fails
    with pytest.raises(Poisoned, match=f"at {re.escape(line_of(__file__, 'a builtin fails'))}\\. "):
        shared.with_lock(len)


@every_kind
def test_without_poisoning_the_next_one_sees_half_a_change(kind: LockKind) -> None:
    """Unsafe twin: the same section, and nobody is told."""
    seen: dict[bool, int | None] = {}
    for poisoning in (True, False):
        shared = Synchronized({"from": 10, "to": 0}, kind, poisoning=poisoning)
        fails_in(writing(shared), lambda handle: handle.value.update({"from": 5}))
        try:
            seen[poisoning] = sum(shared.copy().values())
        except Poisoned:
            seen[poisoning] = None
    assert seen == {True: None, False: 5}


@every_kind
def test_who_waited_when_the_section_failed_is_told(kind: LockKind) -> None:
    shared = Synchronized(0, kind)
    leave = held(shared)
    waiting = [Beside(lambda way=way: getattr(Acquire, way)(shared, None)) for way in WAYS]
    leave(ZeroDivisionError("half way"))
    for each in waiting:
        with pytest.raises(Poisoned):
            each.result()


@every_kind
def test_the_first_error_is_the_one_that_is_told(kind: LockKind) -> None:
    shared = Synchronized(0, kind)
    fails_in(writing(shared))
    first = shared.poisoned_by
    fails_in(shared.repair())
    assert shared.poisoned_by is first


@shared_kinds
def test_a_read_section_does_not_poison(kind: LockKind) -> None:
    shared = Synchronized(0, kind)
    fails_in(shared.rlock())
    with pytest.raises(ZeroDivisionError):
        shared.with_rlock(lambda value: 1 / value)
    assert shared.poisoned_by is None
    assert shared.copy() == 0


@every_kind
def test_a_copy_that_fails_does_not_poison(kind: LockKind) -> None:
    shared = Synchronized(threading.Lock(), kind)
    with pytest.raises(TypeError):
        shared.copy()
    assert shared.poisoned_by is None


@pytest.mark.parametrize("steps", [[], ["upgrade", "downgrade"], ["upgrade", "downgrade", "downgrade"]])
def test_an_exception_under_upgrade_access_poisons_only_what_was_upgraded(steps: list[str]) -> None:
    shared = Synchronized(0, "upgradable")
    fails_in(shared.ulock(), lambda handle: [getattr(handle, step)() for step in steps])
    assert shared.poisoned_by is None
    fails_in(shared.ulock(), lambda handle: handle.upgrade())
    assert isinstance(shared.poisoned_by, ZeroDivisionError)


@every_kind
def test_repair_shows_the_value_and_ends_the_poison(kind: LockKind) -> None:
    shared = Synchronized([1], kind)
    fails_in(writing(shared))
    with shared.repair() as handle:
        handle.value.append(2)
        assert shared.poisoned_by is not None
    assert shared.poisoned_by is None
    assert shared.copy() == [1, 2]


@every_kind
def test_a_repair_that_fails_leaves_the_poison(kind: LockKind) -> None:
    shared = Synchronized([1], kind)
    fails_in(writing(shared))
    fails_in(shared.repair())
    with pytest.raises(Poisoned):
        shared.copy()
    with pytest.raises(WaitTimeout), shared.repair() as handle:
        handle.wait_for(lambda value: False, 0)
    with pytest.raises(Poisoned):
        shared.copy()


@shared_kinds
def test_a_repair_ends_where_it_is_downgraded(kind: LockKind) -> None:
    shared = Synchronized([1], kind)
    fails_in(writing(shared))
    with shared.repair() as handle:
        handle.downgrade()
        assert Beside(lambda: shared.with_rlock(len)).result() == 1


@every_kind
def test_clear_poison_keeps_the_value_or_sets_another(kind: LockKind) -> None:
    shared: Synchronized[list[int] | None] = Synchronized([1], kind)
    fails_in(writing(shared))
    shared.clear_poison()
    assert shared.copy() == [1]
    fails_in(writing(shared))
    shared.clear_poison(None)
    assert shared.copy() is None


@every_kind
def test_a_time_out_of_another_object_poisons_the_section_that_it_leaves_and_not_the_other(kind: LockKind) -> None:
    one, other = Synchronized(0, kind), Synchronized(0, kind)
    leave = held(other)
    with pytest.raises(LockTimeout), writing(one), writing(other, 0):
        pass
    leave()
    assert isinstance(one.poisoned_by, LockTimeout)
    assert other.poisoned_by is None


def test_the_inner_of_two_re_entrant_sections_poisons_though_the_outer_goes_on() -> None:
    for outer in (lambda shared, body: shared.with_lock(lambda _: body()), in_section):
        shared = Synchronized(0, "re_entrant")
        outer(shared, lambda shared=shared: fails_in(shared.lock()))
        assert isinstance(shared.poisoned_by, ZeroDivisionError)


def in_section(shared: Synchronized[Any], body: Callable[[], object]) -> None:
    with shared.lock():
        body()


def test_every_error_goes_to_another_process_with_its_message() -> None:
    shared = Synchronized(0, name="it")
    leave = held(shared)
    with pytest.raises(LockTimeout) as raised:
        shared.copy(timeout_seconds=0)
    leave()
    errors = [raised.value, *(kind("why") for kind in (AlreadyHeld, DeadHandle, NoSuchAccess, Poisoned, WaitTimeout))]
    for error in errors:
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again)) == (type(error), str(error))


# Several at once


@contextmanager
def one_by_one(
    first: Synchronized[Any], second: Synchronized[Any], meet: Callable[[], object]
) -> Iterator[tuple[WriteHandle[Any], WriteHandle[Any]]]:
    """Unsafe twin of acquire_locked(): in the order of the arguments. A deadlock is told where it would begin."""
    with writing(first) as one:
        meet()
        with writing(second, 0) as other:
            yield one, other


def transfers(one: Synchronized[Any], other: Synchronized[Any], take: Callable[..., Any]) -> list[str]:
    """Two threads take the same two in opposite orders: what became of each."""

    def transfer(first: Synchronized[Any], second: Synchronized[Any]) -> str:
        try:
            with take(first, second) as (source, target):
                source.value, target.value = source.value - 1, target.value + 1
        except LockTimeout:
            return "stuck"
        return "done"

    both = [Beside(lambda: transfer(one, other)), Beside(lambda: transfer(other, one))]
    return [each.result() for each in both]


@pytest.mark.parametrize(("one", "other"), ANY_TWO)
def test_opposite_orders_do_not_deadlock(one: LockKind, other: LockKind) -> None:
    first, second = Synchronized(0, one), Synchronized(0, other)
    for _ in range(20):
        assert transfers(first, second, acquire_locked) == ["done", "done"]
    assert (first.copy(), second.copy()) == (0, 0)


@pytest.mark.parametrize(("one", "other"), ANY_TWO)
def test_the_object_that_was_made_first_is_acquired_first_in_any_order_of_arguments(
    one: LockKind, other: LockKind
) -> None:
    first, second = Synchronized(0, one, name="first"), Synchronized(0, other, name="second")
    leave = [held(first), held(second)]
    for wanted in ((first, second), (second, first)):
        with pytest.raises(LockTimeout) as raised, acquire_locked(*wanted, timeout_seconds=0):
            pass
        assert str(raised.value) == "first: no write access within 0 s."
    for each in leave:
        each()


def test_one_by_one_in_opposite_orders_is_stuck_when_each_has_its_first() -> None:
    first, second = Synchronized(0, poisoning=False), Synchronized(0, poisoning=False)
    both_have_one = threading.Barrier(2)
    outcome = transfers(first, second, lambda one, other: one_by_one(one, other, lambda: both_have_one.wait(WAIT)))
    assert "stuck" in outcome


def test_every_order_of_every_mix_comes_through() -> None:
    objects = [Synchronized(0, kind) for kind in ("exclusive", "read_write", "upgradable", "re_entrant")]
    mixes = [[writing, writing, writing, writing], [writing, reading, reading, writing], [reading] * 4]

    def work(order: tuple[int, ...]) -> None:
        for mix in mixes:
            wanted = [mix[index](objects[index]) for index in order]
            with acquire_locked(*wanted, timeout_seconds=WAIT) as handles:
                assert list(handles) == wanted
                before = [handle.value for handle in handles]
                threading.Event().wait(0)  # lets the others run
                assert [handle.value for handle in handles] == before
                for handle in handles:
                    if handle.access == "write":
                        handle.value += 1

    threads = [Beside(lambda order=order: work(order)) for order in itertools.permutations(range(4))]
    for each in threads:
        each.result()
    # The first and the last mix get a `lock()` from kinds without a read access.
    assert [each.copy() for each in objects] == [72, 24, 24, 72]


def test_readers_of_acquire_locked_are_inside_together() -> None:
    one, other = Synchronized(1, "read_write"), Synchronized(2, "upgradable")
    together = threading.Barrier(2)

    def read(first: Synchronized[int], second: Synchronized[int]) -> int:
        with acquire_locked(first.rlock(), second.rlock()) as (x, y):
            together.wait(WAIT)
            return x.value + y.value

    both = [Beside(lambda: read(one, other)), Beside(lambda: read(other, one))]
    assert [each.result() for each in both] == [3, 3]


def test_a_plain_object_stands_for_its_write_access() -> None:
    objects = [Synchronized(0, kind) for kind in KINDS]
    with acquire_locked(*objects) as handles:
        assert [handle.access for handle in handles] == ["write"] * 4
    with acquire_locked(objects[3].ulock(), objects[2].rlock()) as (upgradable, read):
        assert (upgradable.access, read.access) == ("upgrade", "read")


@every_kind
@pytest.mark.parametrize("late", [False, True])
def test_all_or_none_and_who_did_not_get_all_poisons_nothing(kind: LockKind, late: bool) -> None:
    objects = [Synchronized(0, kind, name=name) for name in ("a", "b", "c")]
    leave = held(objects[2 if late else 0])
    with pytest.raises(LockTimeout) as raised, acquire_locked(*objects, timeout_seconds=0.01):
        pass
    assert str(raised.value) == f"{'c' if late else 'a'}: no write access within 0.01 s."
    with acquire_locked(*objects[:2] if late else objects[1:], timeout_seconds=0) as handles:
        assert [handle.value for handle in handles] == [0, 0]
    leave()
    with acquire_locked(*objects, timeout_seconds=0) as handles:
        assert [handle.value for handle in handles] == [0, 0, 0]


@every_kind
def test_the_shorter_of_two_limits_holds_and_is_told(kind: LockKind) -> None:
    free, taken = Synchronized(0, kind), Synchronized(0, kind, name="it")
    leave = held(taken)
    for own, all_together, told in ((0, WAIT, 0), (WAIT, 0.01, 0.01), (None, 0.01, 0.01), (0.01, None, 0.01)):
        wanted = acquire_locked(free, writing(taken, own), timeout_seconds=all_together)
        with pytest.raises(LockTimeout) as raised, wanted:
            pass
        assert str(raised.value) == f"it: no write access within {told} s."
    leave()


@every_kind
def test_a_poisoned_one_among_several_keeps_the_others_clean(kind: LockKind) -> None:
    clean, poisoned = Synchronized(0, kind), Synchronized(0, kind)
    fails_in(writing(poisoned))
    with pytest.raises(Poisoned), acquire_locked(clean, poisoned):
        pass
    assert clean.exchange(1, timeout_seconds=0) == 0


def test_an_exception_poisons_those_that_were_held_for_writing() -> None:
    written, read, upgradable = (Synchronized(0, kind) for kind in ("re_entrant", "read_write", "upgradable"))
    fails_in(acquire_locked(upgradable.ulock(), read.rlock(), written))  # type: ignore[arg-type]
    assert [each.poisoned_by is not None for each in (written, read, upgradable)] == [True, False, False]
    assert read.copy() == upgradable.copy() == 0


@every_kind
def test_the_same_object_twice_is_refused(kind: LockKind) -> None:
    shared = Synchronized(0, kind, name="it")
    message = "acquire_locked() got it twice; once, with the stronger access, is enough."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        acquire_locked(shared, Synchronized(0), reading(shared))
    assert shared.exchange(1, timeout_seconds=0) == 0


# Waiting for a condition. No time-outs: one that ran out would look again, and find what nobody had told it.

ENDS: dict[str, Callable[[Synchronized[Any]], object]] = {
    "handle": lambda shared: append(writing(shared)),
    "with_write": lambda shared: with_write(shared, lambda value: value.append(1)),
    "with_write, timed": lambda shared: with_write(shared, lambda value: value.append(1), WAIT),
    "exchange": lambda shared: shared.exchange([1]),
    "swap": lambda shared: Synchronized([1]).swap(shared),
    "together": lambda shared: append_together(shared),
    "repair": lambda shared: append(shared.repair()),
    "clear_poison": lambda shared: shared.clear_poison([1]),
}


def append(section: WriteHandle[Any]) -> None:
    with section as handle:
        handle.value.append(1)


def append_together(shared: Synchronized[Any]) -> None:
    with acquire_locked(Synchronized(0), shared) as (_, handle):
        handle.value.append(1)


def wait_until_true(section: ReadHandle[Any], timeout_seconds: float | None = None) -> Any:
    with section as handle:
        handle.wait_for(lambda value: value, timeout_seconds)
        return handle.value


@every_kind
@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("section", [reading, writing])
def test_the_end_of_any_write_section_wakes_who_waits(kind: LockKind, end: str, section: Any) -> None:
    shared: Synchronized[list[int]] = Synchronized([], kind)
    waiting = [Beside(lambda: wait_until_true(section(shared))) for _ in range(2)]
    until(lambda: shared._waiting == 2)
    ENDS[end](shared)
    assert [each.result() for each in waiting] == [[1], [1]]
    assert shared._waiting == 0


@every_kind
def test_a_condition_that_is_so_already_is_not_waited_for(kind: LockKind) -> None:
    assert wait_until_true(writing(Synchronized([1], kind)), 0) == [1]


@every_kind
def test_the_lock_is_free_while_its_section_waits_and_held_when_it_goes_on(kind: LockKind) -> None:
    shared, may_leave = Synchronized([], kind), threading.Event()
    goes_on = threading.Event()

    def wait() -> None:
        with writing(shared) as handle:
            handle.wait_for(lambda value: value)
            goes_on.set()
            passed(may_leave)

    waiting = Beside(wait)
    until(lambda: shared._waiting == 1)
    with_write(shared, lambda value: value.append(1), WAIT)
    passed(goes_on)
    with pytest.raises(LockTimeout):
        with_write(shared, len, 0)
    may_leave.set()
    waiting.result()


@every_kind
def test_who_waits_looks_again_after_every_write_and_waits_on_if_it_is_not_so(kind: LockKind) -> None:
    shared: Synchronized[list[int]] = Synchronized([], kind)
    seen: list[int] = []

    def three(value: list[int]) -> bool:
        seen.append(len(value))
        return len(value) == 3

    def wait() -> None:
        with writing(shared) as handle:
            handle.wait_for(three)

    waiting = Beside(wait)
    for count in range(1, 4):
        until(lambda count=count: len(seen) == count and shared._waiting == 1)
        with_write(shared, lambda value: value.append(1))
    waiting.result()
    assert seen == [0, 1, 2, 3]


def wait_and_try_beside(handle: WriteHandle[Any], shared: Synchronized[Any], timeout_seconds: float) -> None:
    try:
        handle.wait_for(lambda value: value, timeout_seconds)
    finally:
        with pytest.raises(LockTimeout):
            Beside(lambda: with_write(shared, len, 0)).result()


@every_kind
def test_a_wait_that_takes_too_long_says_so_holds_the_lock_and_does_not_poison(kind: LockKind) -> None:
    shared = Synchronized([], kind, name="it")
    for seconds in (0, 0.01):
        with pytest.raises(WaitTimeout) as raised, writing(shared) as handle:
            wait_and_try_beside(handle, shared, seconds)
        assert str(raised.value) == f"it: the condition did not come true within {seconds} s."
    assert shared.poisoned_by is None
    assert shared.copy() == []


@every_kind
def test_what_was_changed_before_waiting_is_told_to_others_who_wait(kind: LockKind) -> None:
    """Two that answer each other within their sections: each changes the value and then waits for the other."""
    shared: Synchronized[list[str]] = Synchronized([], kind)

    def answer() -> None:
        with writing(shared) as handle:
            handle.wait_for(lambda value: value == ["ping"])
            handle.value.append("pong")

    answering = Beside(answer)
    until(lambda: shared._waiting == 1)
    with writing(shared) as handle:
        handle.value.append("ping")
        handle.wait_for(lambda value: value == ["ping", "pong"])
    answering.result()


def fails_in_with_write(shared: Synchronized[Any]) -> None:
    with pytest.raises(ZeroDivisionError):
        with_write(shared, fail)


@every_kind
@pytest.mark.parametrize("failing", [lambda shared: fails_in(writing(shared)), fails_in_with_write])
@pytest.mark.parametrize("section", [reading, writing])
def test_a_section_that_fails_tells_those_who_wait(kind: LockKind, failing: Any, section: Any) -> None:
    shared: Synchronized[list[int]] = Synchronized([], kind)
    waiting = Beside(lambda: wait_until_true(section(shared)))
    until(lambda: shared._waiting == 1)
    failing(shared)
    with pytest.raises(Poisoned):
        waiting.result()


@every_kind
def test_a_predicate_that_raises_ends_the_section_as_any_exception_does(kind: LockKind) -> None:
    shared = Synchronized(0, kind)
    with pytest.raises(ZeroDivisionError), writing(shared) as handle:
        handle.wait_for(lambda value: 1 / value)
    assert isinstance(shared.poisoned_by, ZeroDivisionError)


def test_a_wait_inside_two_re_entrant_sections_is_refused() -> None:
    shared = Synchronized([], "re_entrant", name="it", poisoning=False)
    with shared.lock(), pytest.raises(AlreadyHeld) as raised, shared.lock() as handle:
        handle.wait_for(lambda value: value)
    assert str(raised.value) == "it: wait_for() would give up the lock that an outer section still relies on."


@shared_kinds
def test_a_downgrade_wakes_who_waits_though_the_section_goes_on(kind: LockKind) -> None:
    shared: Synchronized[list[int]] = Synchronized([], kind)
    waiting = Beside(lambda: wait_until_true(shared.rlock()))
    until(lambda: shared._waiting == 1)
    with shared.wlock() as handle:
        handle.value.append(1)
        handle.downgrade()
        assert waiting.result() == [1]


def test_a_wait_under_upgrade_access_has_it_again_afterwards() -> None:
    shared: Synchronized[list[int]] = Synchronized([], "upgradable")

    def wait() -> str:
        with shared.ulock() as handle:
            handle.wait_for(lambda value: value)
            handle.upgrade()
            handle.value.append(2)
            return handle.access

    waiting = Beside(wait)
    until(lambda: shared._waiting == 1)
    append(shared.wlock())
    assert waiting.result() == "write"
    assert shared.copy() == [1, 2]


class Interrupted(threading.Condition):
    def wait(self, timeout: float | None = None) -> bool:
        raise KeyboardInterrupt


@every_kind
def test_ctrl_c_ends_a_wait_with_the_lock_held(kind: LockKind) -> None:
    shared: Synchronized[list[int]] = Synchronized([], kind)
    shared._changed = Interrupted(threading.Lock())
    with writing(shared) as handle:
        with pytest.raises(KeyboardInterrupt):
            handle.wait_for(lambda value: value)
        assert handle.value == []
        with pytest.raises(LockTimeout):
            Beside(lambda: with_write(shared, len, 0)).result()
    assert shared._waiting == 0
    assert with_write(shared, len, 0) == 0


# Upgrade and downgrade


def looks_then_adds(shared: Synchronized[Any], meanwhile: Callable[[], object]) -> None:
    """Unsafe twin: between the end of the read section and the write section it is anybody's."""
    with shared.rlock(0) as handle:
        missing = not handle.value
    meanwhile()
    if missing:
        append(shared.wlock(0))


def looks_and_adds(shared: Synchronized[Any], meanwhile: Callable[[], object]) -> None:
    with shared.ulock(0) as handle:
        missing = not handle.value
        meanwhile()
        if missing:
            handle.upgrade()
            handle.value.append(1)


def entries(body: Callable[[Synchronized[Any], Callable[[], object]], None]) -> int:
    """Two threads add what is missing, the second in the middle of the first if it can, else after it."""
    shared: Synchronized[list[int]] = Synchronized([], "upgradable")

    def other() -> bool:
        try:
            body(shared, lambda: None)
        except LockTimeout:
            return False
        return True

    overlapped = []
    body(shared, lambda: overlapped.append(Beside(other).result()))
    if not overlapped[0]:
        assert Beside(other).result()
    return len(shared.copy())


def test_upgrade_lets_nobody_write_between_looking_and_writing() -> None:
    assert entries(looks_and_adds) == 1


def test_a_read_section_and_then_a_write_section_add_twice() -> None:
    assert entries(looks_then_adds) == 2


def test_upgrade_access_goes_with_readers_and_sets_the_value_once_they_have_left() -> None:
    shared = Synchronized(0, "upgradable", name="it")
    reader, handle_of_reader = Worker(), shared.rlock()
    reader.do(handle_of_reader.__enter__)
    with shared.ulock() as handle:
        assert Beside(lambda: shared.with_rlock(lambda value: value, 0)).result() == 0
        with pytest.raises(ReadOnlyHandle) as raised:
            handle.value = 1
        assert str(raised.value) == "it: upgrade access does not set the value; write access does."
        with pytest.raises(LockTimeout) as too_late:
            handle.upgrade(timeout_seconds=0.01)
        assert str(too_late.value) == "it: no write access within 0.01 s."
        assert handle.access == "upgrade"
        reader.do(lambda: handle_of_reader.__exit__(None, None, None))
        handle.upgrade()
        handle.value = 1
        with pytest.raises(LockTimeout):
            Beside(lambda: shared.with_rlock(lambda value: value, 0)).result()
        handle.downgrade()
        assert handle.access == "upgrade"
        assert Beside(lambda: shared.with_rlock(lambda value: value, 0)).result() == 1
        handle.downgrade()
        assert handle.access == "read"
        assert Beside(lambda: shared.ulock(0).__enter__().access).result() == "upgrade"
    reader.end()


def test_no_two_have_upgrade_access_at_a_time() -> None:
    shared = Synchronized(0, "upgradable", name="it")

    def upgrade() -> None:
        with shared.ulock(0):
            pass

    with shared.ulock(), pytest.raises(LockTimeout) as raised:
        Beside(upgrade).result()
    assert str(raised.value) == "it: no upgrade access within 0 s."
    upgrade()


@shared_kinds
def test_a_downgrade_to_read_keeps_writers_out_until_the_section_ends(kind: LockKind) -> None:
    shared = Synchronized(0, kind)
    with shared.wlock() as handle:
        handle.value = 1
        while handle.access != "read":
            handle.downgrade()
        with pytest.raises(LockTimeout):
            Beside(lambda: shared.exchange(2, timeout_seconds=0)).result()
        assert Beside(lambda: shared.with_rlock(lambda value: value, 0)).result() == 1
        assert handle.value == 1
    assert shared.exchange(2, timeout_seconds=0) == 1


@pytest.mark.parametrize(
    ("kind", "section", "step", "message"),
    [
        ("exclusive", "lock", "downgrade", "it: lock='exclusive' has no access weaker than write."),
        ("re_entrant", "lock", "downgrade", "it: lock='re_entrant' has no access weaker than write."),
        ("exclusive", "lock", "upgrade", "it: upgrade() goes from upgrade to write access; this handle has write."),
        ("upgradable", "wlock", "upgrade", "it: upgrade() goes from upgrade to write access; this handle has write."),
    ],
)
def test_a_step_that_is_not_there_is_refused(kind: LockKind, section: str, step: str, message: str) -> None:
    shared = Synchronized(0, kind, name="it", poisoning=False)
    with pytest.raises(NoSuchAccess) as raised, getattr(shared, section)() as handle:
        getattr(handle, step)()
    assert str(raised.value) == message
    assert shared.exchange(1, timeout_seconds=0) == 0


def test_a_read_handle_has_no_upgrade_for_two_readers_would_wait_for_each_other() -> None:
    assert not hasattr(ReadHandle, "upgrade")
    assert not hasattr(ReadHandle, "downgrade")

"""The lock kinds by themselves: who may be inside together, who is next, and that nobody waits for ever."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from queue import SimpleQueue
from typing import Any, get_args

import pytest
from beside import WAIT, Beside, Worker, passed, until
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.state import read_write_lock
from trainer.state.guarded import KINDS, LockKind
from trainer.state.locks import Access, AlreadyHeld, ExclusiveLock, Lock, LockTimeout, NoSuchAccess, ReentrantLock
from trainer.state.read_write_lock import ReadWriteLock, UpgradableLock

every_kind = pytest.mark.parametrize("kind", KINDS)
shared_kinds = pytest.mark.parametrize("kind", [ReadWriteLock, UpgradableLock])


class NoLock:
    """Unsafe twin: lets everybody in."""

    def acquire(self, access: Access, timeout_seconds: float | None = None) -> bool:
        return True

    def release(self, access: Access) -> None:
        pass


def increments_kept(lock: Lock | NoLock) -> int:
    """Two increments, the second in the middle of the first if it can get in, else after it: how many are left."""
    value = [0]

    def increment_now() -> bool:
        if not lock.acquire("write", 0):
            return False
        value[0] += 1
        lock.release("write")
        return True

    lock.acquire("write")
    before = value[0]
    overlapped = Beside(increment_now).result()
    value[0] = before + 1
    lock.release("write")
    if not overlapped:
        assert Beside(increment_now).result()
    return value[0]


@every_kind
def test_a_write_section_keeps_others_out(kind: str) -> None:
    assert increments_kept(KINDS[kind]("it")) == 2


def test_without_a_lock_the_same_increments_lose_one() -> None:
    assert increments_kept(NoLock()) == 1


def test_the_table_has_every_kind() -> None:
    assert tuple(KINDS) == get_args(LockKind)


def entering(lock: ReadWriteLock, order: list[str], role: str) -> Callable[[], None]:
    """A body that goes in as a reader or writer and notes when."""

    def enter() -> None:
        with lock.read() if role == "reader" else lock.write():
            order.append(role)

    return enter


@shared_kinds
def test_readers_are_inside_together(kind: type[ReadWriteLock]) -> None:
    lock, inside = kind(), threading.Barrier(3)

    def read() -> None:
        with lock.read():
            inside.wait(WAIT)

    for reader in [Beside(read) for _ in range(3)]:
        reader.result()


@shared_kinds
def test_a_writer_is_inside_alone(kind: type[ReadWriteLock]) -> None:
    lock, order = kind(), []
    with lock.write():
        bodies = [Beside(entering(lock, order, "writer")), Beside(entering(lock, order, "reader"))]
        until(lambda: lock.num_waiting == 2)
        order.append("first")
    for body in bodies:
        body.result()
    assert order[0] == "first"
    assert sorted(order[1:]) == ["reader", "writer"]


@shared_kinds
def test_a_reader_that_comes_after_a_waiting_writer_goes_after_it(kind: type[ReadWriteLock]) -> None:
    lock, order = kind(), []
    with lock.read():
        writer = Beside(entering(lock, order, "writer"))
        until(lambda: lock.num_waiting == 1)
        reader = Beside(entering(lock, order, "reader"))
        until(lambda: lock.num_waiting == 2)
    writer.result()
    reader.result()
    assert order == ["writer", "reader"]


@shared_kinds
def test_readers_that_waited_for_a_writer_go_before_the_next_one(kind: type[ReadWriteLock]) -> None:
    lock, order = kind(), []
    with lock.write():
        writer = Beside(entering(lock, order, "writer"))
        until(lambda: lock.num_waiting == 1)
        reader = Beside(entering(lock, order, "reader"))
        until(lambda: lock.num_waiting == 2)
    reader.result()
    writer.result()
    assert order == ["reader", "writer"]


@shared_kinds
def test_writers_go_in_the_order_of_their_coming_and_nobody_slips_in_between(kind: type[ReadWriteLock]) -> None:
    lock, order = kind(), []

    def write(index: int) -> None:
        with lock.write():
            order.append(index)

    lock.acquire("write")
    writers = []
    for index in range(5):
        writers.append(Beside(lambda index=index: write(index)))
        until(lambda index=index: lock.num_waiting == index + 1)
    lock.release("write")
    # The lock has been handed on: whoever has just let go is not quicker than who waits.
    write(5)
    for writer in writers:
        writer.result()
    assert order == [0, 1, 2, 3, 4, 5]


class ReadersFirst(ReadWriteLock):
    """Unsafe twin: a reader need not wait behind a writer."""

    def _writers_wait(self) -> bool:
        return False


def readers_before_the_writer(lock: ReadWriteLock, num_readers: int) -> int:
    """Readers come one after the other, each before the last has left: how many go in before a writer that waits."""
    inside, next_one, writer = Worker(), Worker(), Worker()
    assert inside.do(lambda: lock.acquire("read"))
    writer.begin(lambda: lock.acquire("write", WAIT))
    until(lambda: lock.num_waiting == 1)
    number = 0
    while number < num_readers and next_one.do(lambda: lock.acquire("read", 0)):
        inside.do(lambda: lock.release("read"))
        inside, next_one = next_one, inside
        number += 1
    inside.do(lambda: lock.release("read"))
    assert writer.done() is True
    return number


@shared_kinds
def test_a_stream_of_readers_does_not_starve_a_writer(kind: type[ReadWriteLock]) -> None:
    assert readers_before_the_writer(kind(), 50) == 0


def test_the_same_stream_starves_a_writer_where_readers_go_first() -> None:
    assert readers_before_the_writer(ReadersFirst(), 50) == 50


@shared_kinds
@pytest.mark.stress
def test_many_readers_and_writers_all_come_through_and_no_write_is_lost(kind: type[ReadWriteLock]) -> None:
    lock, value = kind(), [0]

    def work() -> None:
        for _ in range(50):
            with lock.read():
                assert value[0] >= 0
            with lock.write():
                before = value[0]
                threading.Event().wait(0)  # lets the others run between read and write
                value[0] = before + 1

    for thread in [Beside(work) for _ in range(16)]:
        thread.result()
    assert value[0] == 16 * 50


@every_kind
def test_a_try_does_not_wait_and_takes_nothing(kind: str) -> None:
    lock = KINDS[kind]("it")
    lock.acquire("write")
    assert Beside(lambda: lock.acquire("write", 0)).result() is False
    assert Beside(lambda: lock.acquire("write", 0.01)).result() is False
    lock.release("write")
    assert lock.acquire("write", 0) is True
    lock.release("write")


@every_kind
@pytest.mark.parametrize("seconds", [-1, -0.5, float("nan")])
def test_a_time_out_below_nothing_is_refused(kind: str, seconds: float) -> None:
    lock = KINDS[kind]("it")
    message = f"timeout_seconds must be at least 0, or None to wait for ever; got {seconds}."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        lock.acquire("write", seconds)


@every_kind
def test_a_time_out_beyond_what_the_system_can_count_waits(kind: str) -> None:
    lock = KINDS[kind]("it")
    lock.acquire("write")
    waiting = Beside(lambda: lock.acquire("write", float("inf")) and lock.release("write"))
    lock.release("write")
    waiting.result()


@pytest.mark.parametrize("kind", [ExclusiveLock, ReadWriteLock, UpgradableLock])
def test_a_thread_that_would_wait_for_itself_is_told(kind: type[Lock]) -> None:
    lock = kind("it")
    lock.acquire("write")
    with pytest.raises(AlreadyHeld):
        lock.acquire("write")
    lock.release("write")
    assert Beside(lambda: lock.acquire("write", 0)).result() is True


@shared_kinds
def test_a_second_read_by_the_same_thread_is_refused_before_it_can_wait_behind_a_writer(
    kind: type[ReadWriteLock],
) -> None:
    lock = kind("it")
    with lock.read():
        with pytest.raises(AlreadyHeld) as raised:
            lock.acquire("read")
        assert str(raised.value) == f"it: this thread holds it already, and lock='{kind.kind}' is not re-entrant."


def test_a_reentrant_lock_is_free_after_as_many_releases() -> None:
    lock = ReentrantLock()
    lock.acquire("write")
    assert not lock.nested
    lock.acquire("write")
    assert lock.nested
    lock.release("write")
    assert Beside(lambda: lock.acquire("write", 0)).result() is False
    lock.release("write")
    assert Beside(lambda: lock.acquire("write", 0)).result() is True


@shared_kinds
def test_only_who_has_an_access_can_give_it_back(kind: type[ReadWriteLock]) -> None:
    lock = kind("it")
    lock.acquire("write")
    with pytest.raises(RuntimeError) as raised:
        Beside(lambda: lock.release("write")).result()
    assert str(raised.value) == "it: this thread has no write access to give back."
    for access in ("read", "upgrade"):
        with pytest.raises(RuntimeError) as raised:
            lock.release(access)
        assert str(raised.value) == f"it: this thread has no {access} access to give back."
    lock.release("write")


@shared_kinds
def test_a_bare_section_says_that_time_is_up(kind: type[ReadWriteLock]) -> None:
    lock = kind("it")

    def read() -> None:
        with lock.read(timeout_seconds=0):
            raise AssertionError("inside")

    with lock.write(), pytest.raises(LockTimeout) as raised:
        Beside(read).result()
    assert str(raised.value) == "it: no read access within 0 s."


@shared_kinds
def test_a_writer_that_gives_up_lets_in_the_readers_behind_it(kind: type[ReadWriteLock]) -> None:
    lock, bells = kind(), Bells()
    lock.acquire("read")
    with bells.ring_instead_of_time():
        writer = Beside(lambda: lock.acquire("write", WAIT))
        until(lambda: lock.num_waiting == 1)
        reader = Beside(lambda: lock.acquire("read", WAIT))
        until(lambda: lock.num_waiting == 2)
        bells.time_is_up(lock._queue[0])
        assert writer.result() is False
        assert reader.result() is True


@shared_kinds
@pytest.mark.parametrize("access", ["read", "write"])
def test_ctrl_c_ends_a_wait_and_leaves_no_trace(kind: type[ReadWriteLock], access: Access) -> None:
    lock, bells = kind(), Bells(interrupt=KeyboardInterrupt())
    lock.acquire("write")
    with bells.ring_instead_of_time():
        waiting = Beside(lambda: lock.acquire(access))
        until(lambda: lock.num_waiting == 1)
        bells.time_is_up([*lock._queue, *lock._reader_queue][0])
        with pytest.raises(KeyboardInterrupt):
            waiting.result()
    assert lock.num_waiting == 0
    lock.release("write")
    assert lock.acquire("write", 0)


def test_upgrade_waits_for_readers_and_goes_before_a_writer() -> None:
    lock, order = UpgradableLock(), []
    with lock.read():
        ready = threading.Event()

        def upgrade() -> None:
            assert lock.acquire("upgrade")
            ready.set()
            assert lock.upgrade()
            order.append("upgraded")
            lock.release("write")

        upgrading = Beside(upgrade)
        passed(ready)
        writer = Beside(entering(lock, order, "writer"))
        until(lambda: lock.num_waiting == 2)
        order.append("reader leaves")
    upgrading.result()
    writer.result()
    assert order == ["reader leaves", "upgraded", "writer"]


def test_one_thread_at_a_time_has_upgrade_access_so_two_cannot_wait_for_each_other() -> None:
    lock = UpgradableLock()
    lock.acquire("upgrade")
    assert Beside(lambda: lock.acquire("upgrade", 0)).result() is False
    assert Beside(lambda: lock.acquire("read", 0)).result() is True
    assert lock.upgrade(timeout_seconds=0) is False


@pytest.mark.parametrize(
    ("kind", "held", "weaker"),
    [
        (ReadWriteLock, "write", "read"),
        (UpgradableLock, "write", "upgrade"),
        (UpgradableLock, "upgrade", "read"),
    ],
)
def test_downgrade_is_one_step_and_lets_in_who_fits(kind: type[ReadWriteLock], held: Access, weaker: Access) -> None:
    lock, reader = kind(), Worker()
    lock.acquire(held)
    reader.begin(lambda: lock.acquire("read"))
    assert lock.downgrade(held) == weaker
    assert reader.done() is True
    assert Beside(lambda: lock.acquire("write", 0)).result() is False
    lock.release(weaker)


@pytest.mark.parametrize(
    ("kind", "call", "message"),
    [
        (ReadWriteLock, lambda lock: lock.acquire("upgrade"), "it: lock='read_write' has no upgrade access."),
        (ReadWriteLock, lambda lock: lock.downgrade("read"), "it: lock='read_write' has no access weaker than read."),
        (ReadWriteLock, lambda lock: lock.upgrade(), "it: this thread has no upgrade access to upgrade from."),
        (UpgradableLock, lambda lock: lock.upgrade(), "it: this thread has no upgrade access to upgrade from."),
        (ExclusiveLock, lambda lock: lock.upgrade(), "it: lock='exclusive' has no upgrade access."),
        (ReentrantLock, lambda lock: lock.downgrade("write"), "it: lock='re_entrant' has no access weaker than write."),
    ],
)
def test_an_access_that_the_kind_lacks_is_refused(
    kind: type[Lock], call: Callable[[Lock], object], message: str
) -> None:
    with pytest.raises(NoSuchAccess) as raised:
        call(kind("it"))
    assert str(raised.value) == message


class Bells:
    """Puts the end of a wait into the test's hands: it ends when the thread is let in, or when the test says so."""

    def __init__(
        self,
        interrupt: BaseException | None = None,
        crossing: BaseException | None = None,
        may_cross: threading.Event | None = None,
        too_late: bool = False,
    ) -> None:
        """`interrupt` comes instead of a time-out; `crossing` and `too_late`, a time-out, just after being let in."""
        self.interrupt, self.crossing, self.may_cross, self.too_late = interrupt, crossing, may_cross, too_late

    class _Bell:
        def __init__(self, bells: Bells) -> None:
            self.bells = bells
            self.rung: SimpleQueue[bool] = SimpleQueue()

        def acquire(self, timeout: float) -> bool:
            let_in = self.rung.get(timeout=WAIT)
            if let_in and self.bells.crossing is not None:
                if self.bells.may_cross is not None:
                    passed(self.bells.may_cross)
                raise self.bells.crossing
            if not let_in and self.bells.interrupt is not None:
                raise self.bells.interrupt
            return let_in and not self.bells.too_late

        def release(self) -> None:
            self.rung.put(True)

    @contextmanager
    def ring_instead_of_time(self) -> Iterator[None]:
        bells = self

        class WaiterWithBell(read_write_lock._Waiter):
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **kwargs)
                self.woken = Bells._Bell(bells)  # type: ignore[assignment]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(read_write_lock, "_Waiter", WaiterWithBell)
            yield

    def time_is_up(self, waiter: Any) -> None:
        waiter.woken.rung.put(False)


@pytest.mark.parametrize("access", ["read", "upgrade", "write"])
def test_a_time_out_that_comes_just_after_the_thread_was_let_in_is_none(access: Access) -> None:
    lock = UpgradableLock()
    lock.acquire("write")
    with Bells(too_late=True).ring_instead_of_time():
        late = Worker()
        late.begin(lambda: lock.acquire(access, WAIT))
        until(lambda: lock.num_waiting == 1)
        lock.release("write")
        assert late.done() is True
    assert late.do(lambda: lock.release(access)) is None


def test_a_time_out_that_comes_just_after_an_upgrade_is_none() -> None:
    lock, reader, upgrader = UpgradableLock(), Worker(), Worker()
    reader.do(lambda: lock.acquire("read"))
    upgrader.do(lambda: lock.acquire("upgrade"))
    with Bells(too_late=True).ring_instead_of_time():
        upgrader.begin(lambda: lock.upgrade(WAIT))
        until(lambda: lock.num_waiting == 1)
        reader.do(lambda: lock.release("read"))
        assert upgrader.done() is True
    assert upgrader.do(lambda: lock.release("write")) is None


@pytest.mark.parametrize("access", ["read", "upgrade", "write"])
def test_ctrl_c_just_after_the_thread_was_let_in_gives_the_access_back(access: Access) -> None:
    lock = UpgradableLock()
    lock.acquire("write")
    with Bells(crossing=KeyboardInterrupt()).ring_instead_of_time():
        late = Beside(lambda: lock.acquire(access, WAIT))
        until(lambda: lock.num_waiting == 1)
        lock.release("write")
        with pytest.raises(KeyboardInterrupt):
            late.result()
    assert lock.acquire("write", 0)


def test_ctrl_c_just_after_a_writer_was_let_in_makes_it_the_readers_turn() -> None:
    lock, next_writer, reader, may_cross = UpgradableLock(), Worker(), Worker(), threading.Event()
    lock.acquire("write")
    with Bells(crossing=KeyboardInterrupt(), may_cross=may_cross).ring_instead_of_time():
        late = Beside(lambda: lock.acquire("write", WAIT))
        until(lambda: lock.num_waiting == 1)
    with Bells().ring_instead_of_time():
        next_writer.begin(lambda: lock.acquire("write", WAIT))
        until(lambda: lock.num_waiting == 2)
        lock.release("write")
        reader.begin(lambda: lock.acquire("read", WAIT))
        until(lambda: lock.num_waiting == 2)
    may_cross.set()
    with pytest.raises(KeyboardInterrupt):
        late.result()
    assert reader.done() is True
    reader.do(lambda: lock.release("read"))
    assert next_writer.done() is True


def test_ctrl_c_just_after_an_upgrade_takes_it_back_to_upgrade_access_and_lets_readers_in() -> None:
    lock, reader, late_reader, upgrader, writer = UpgradableLock(), Worker(), Worker(), Worker(), Worker()
    reader.do(lambda: lock.acquire("read"))
    upgrader.do(lambda: lock.acquire("upgrade"))

    def upgrade() -> bool:
        with pytest.raises(KeyboardInterrupt):
            lock.upgrade(WAIT)
        return True

    with Bells(crossing=KeyboardInterrupt()).ring_instead_of_time():
        upgrader.begin(upgrade)
        until(lambda: lock.num_waiting == 1)
    with Bells().ring_instead_of_time():
        writer.begin(lambda: lock.acquire("write", WAIT))
        until(lambda: lock.num_waiting == 2)
        late_reader.begin(lambda: lock.acquire("read", WAIT))
        until(lambda: lock.num_waiting == 3)
    reader.do(lambda: lock.release("read"))
    assert upgrader.done() is True
    assert late_reader.done() is True
    upgrader.do(lambda: lock.release("upgrade"))
    late_reader.do(lambda: lock.release("read"))
    assert writer.done() is True


@shared_kinds
def test_a_downgrade_lets_in_readers_who_wait_before_a_writer_who_waits(kind: type[ReadWriteLock]) -> None:
    lock, writer, reader = kind(), Worker(), Worker()
    lock.acquire("write")
    writer.begin(lambda: lock.acquire("write", WAIT))
    until(lambda: lock.num_waiting == 1)
    reader.begin(lambda: lock.acquire("read", WAIT))
    until(lambda: lock.num_waiting == 2)
    weaker = lock.downgrade("write")
    assert reader.done() is True
    reader.do(lambda: lock.release("read"))
    assert lock.num_waiting == 1
    lock.release(weaker)
    assert writer.done() is True


def test_who_comes_for_upgrade_access_goes_behind_a_waiting_writer() -> None:
    lock, writer, upgrader = UpgradableLock(), Worker(), Worker()
    lock.acquire("read")
    writer.begin(lambda: lock.acquire("write", WAIT))
    until(lambda: lock.num_waiting == 1)
    assert upgrader.do(lambda: lock.acquire("upgrade", 0)) is False
    lock.release("read")
    assert writer.done() is True


class Model:
    """Who is inside and who waits, by the rules and without threads."""

    def __init__(self) -> None:
        self.inside: dict[int, Access] = {}
        self.waiting: list[tuple[int, Access]] = []  # in the order of their coming
        self.upgrading: int | None = None

    def ask(self, who: int, access: Access) -> bool:
        taken, wanted = set(self.inside.values()), {access for _, access in self.waiting}
        if access == "read":
            free = "write" not in taken | wanted and self.upgrading is None
        else:
            free = taken <= ({"read"} if access == "upgrade" else set()) and wanted <= {"read"}
        if free:
            self.inside[who] = access
        return free

    def changed(self, was: Access | None) -> list[int]:
        """After somebody left, stepped down or gave up: who goes in, and has gone in. `was` is what it had."""
        came: list[int] = []
        if "write" in self.inside.values():
            return came
        if self.upgrading is not None:
            if list(self.inside) == [self.upgrading]:
                came.append(self.upgrading)
                self.inside[self.upgrading], self.upgrading = "write", None
            return came
        if was == "write" or all(access != "write" for _, access in self.waiting):
            came += [who for who, access in self.waiting if access == "read"]
        for who in came:
            self.inside[who] = "read"
        others = [(who, access) for who, access in self.waiting if access != "read"]
        if others:
            who, access = others[0]
            if set(self.inside.values()) <= ({"read"} if access == "upgrade" else set()):
                self.inside[who] = access
                came.append(who)
        self.waiting = [each for each in self.waiting if each[0] not in came]
        return came


NUM_WORKERS = 5
ACCESSES: tuple[Access, ...] = ("read", "upgrade", "write")


class Play:
    """The lock and the model side by side: every step is taken in both."""

    def __init__(self) -> None:
        self.lock, self.model, self.bells = UpgradableLock(), Model(), Bells()
        self.workers = [Worker() for _ in range(NUM_WORKERS)]

    def steps(self) -> list[Callable[[], list[int]]]:
        """Those that the rules allow now. Each returns whose acquisition or upgrade came through by it."""
        steps: list[Callable[[], list[int]]] = []
        waiting = {who for who, _ in self.model.waiting} | {self.model.upgrading}
        for who in range(NUM_WORKERS):
            held = self.model.inside.get(who)
            if who in waiting:
                steps.append(partial(self.give_up, who))
            elif held is None:
                steps += [partial(self.ask, who, access) for access in ACCESSES]
                steps += [partial(self.attempt, who, access) for access in ACCESSES]
            else:
                steps.append(partial(self.leave, who, held))
                if held == "upgrade":
                    steps.append(partial(self.upgrade, who))
                if held != "read":
                    steps.append(partial(self.downgrade, who, held))
        return steps

    def take(self, step: Callable[[], list[int]]) -> None:
        for who in step():
            assert self.workers[who].done() is True
        lock, model = self.lock, self.model
        until(lambda: lock.num_waiting == len(model.waiting) + (model.upgrading is not None))
        ident = {who: self.workers[who].ident for who in model.inside}
        assert lock._readers == {ident[who] for who, access in model.inside.items() if access == "read"}
        assert [lock._sole] == ([ident[who] for who, access in model.inside.items() if access != "read"] or [0])
        assert lock._writing == ("write" in model.inside.values())

    def ask(self, who: int, access: Access) -> list[int]:
        self.workers[who].begin(lambda: self.lock.acquire(access, WAIT))
        if self.model.ask(who, access):
            return [who]
        self.model.waiting.append((who, access))
        return []

    def attempt(self, who: int, access: Access) -> list[int]:
        assert self.workers[who].do(lambda: self.lock.acquire(access, 0)) is self.model.ask(who, access)
        return []

    def leave(self, who: int, held: Access) -> list[int]:
        self.workers[who].do(lambda: self.lock.release(held))
        del self.model.inside[who]
        return self.model.changed(held)

    def upgrade(self, who: int) -> list[int]:
        self.workers[who].begin(lambda: self.lock.upgrade(WAIT))
        self.model.upgrading = who
        return self.model.changed(None)

    def downgrade(self, who: int, held: Access) -> list[int]:
        self.model.inside[who] = "read" if held == "upgrade" else "upgrade"
        assert self.workers[who].do(lambda: self.lock.downgrade(held)) == self.model.inside[who]
        return self.model.changed(held)

    def give_up(self, who: int) -> list[int]:
        lock, model = self.lock, self.model
        waiters = [*lock._reader_queue, *lock._queue, lock._upgrading]
        ident = self.workers[who].ident
        self.bells.time_is_up(next(each for each in waiters if each is not None and each.thread == ident))
        assert self.workers[who].done() is False
        if model.upgrading == who:
            model.upgrading = None
        model.waiting = [each for each in model.waiting if each[0] != who]
        return model.changed(None)

    def end(self) -> None:
        """Everybody goes home, and nobody is left waiting."""
        while self.model.inside:
            who = next(each for each in self.model.inside if each != self.model.upgrading)
            self.take(partial(self.leave, who, self.model.inside[who]))
        assert not self.model.waiting
        for worker in self.workers:
            worker.end()


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 1000), max_size=40))
def test_the_lock_lets_in_whom_the_rules_let_in(choices: list[int]) -> None:
    play = Play()
    with play.bells.ring_instead_of_time():
        for choice in choices:
            steps = play.steps()
            play.take(steps[choice % len(steps)])
        play.end()

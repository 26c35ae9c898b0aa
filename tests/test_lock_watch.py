"""Locks watched in a free run: what is stuck for ever is told, with who, what and where, and nothing else ever is.

A deadlock leaves its threads behind, as it does in a run; they are daemons.
"""

from __future__ import annotations

import itertools
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from threading import Thread
from typing import Any

import pytest
from beside import WAIT, Worker, line_of, passed, until

from trainer.audit.records import ReplicaRecord, RunRecord
from trainer.schedule.locks import Barrier, Lock, RLock, SharedLock, shown_to
from trainer.state.layout import EMPTY
from trainer.state.synchronized import LockTimeout, Synchronized, acquire_locked
from trainer.strategies.deadlock import Deadlock
from trainer.strategies.hosting import RunBroken
from trainer.strategies.lock_watch import LockWatch, _common, _stuck
from trainer.strategies.replica_threads import ReplicaThreads

# Gives a section of the lock each time that it is called.
Section = Callable[[], AbstractContextManager[Any]]


def plain(name: str) -> Section:
    lock = Lock(name)
    return lambda: lock


def re_entrant(name: str) -> Section:
    lock = RLock(name)
    return lambda: lock


def synchronized(name: str) -> Section:
    return Synchronized([], name=name).lock


def written(name: str) -> Section:
    return SharedLock(name).write


every_kind = pytest.mark.parametrize("kind", [plain, re_entrant, synchronized, written])


def make(watch: LockWatch, kind: Callable[[str], Section], *names: str) -> list[Section]:
    with shown_to(watch.see):
        return [kind(name) for name in names]


def start(*bodies: Callable[[], object]) -> list[Thread]:
    """Each body in a replica's thread."""
    threads = [Thread(target=body, name=f"replica-{own}", daemon=True) for own, body in enumerate(bodies)]
    for thread in threads:
        thread.start()
    return threads


def told(watch: LockWatch) -> Deadlock:
    """The deadlock that there is to be."""
    deadline = time.monotonic() + WAIT
    while (found := watch.deadlock()) is None:
        assert time.monotonic() < deadline, "nothing was told"
        time.sleep(0.002)
    return found


LOOKS = 300


def ends_untold(watch: LockWatch, threads: Sequence[Thread], enough: threading.Event | None = None) -> None:
    """Look until all threads have ended; nothing may be told.

    Args:
        enough: set after `LOOKS` looks, where it takes that to end the threads.
    """
    deadline, looks = time.monotonic() + WAIT, 0
    while any(thread.is_alive() for thread in threads):
        found = watch.deadlock()
        assert found is None, found.told
        assert time.monotonic() < deadline, "it never came to an end"
        looks += 1
        if enough is not None and looks == LOOKS:
            enough.set()


def frame_at(mark: str) -> str:
    """The line of this file that has a mark, as a stack tells it."""
    file, _, line = line_of(__file__, mark).rpartition(":")
    return f'File "{file}", line {line}, in '


# What is told.


def nested(outer: Section, inner: Section, meet: Callable[[], object]) -> None:
    with outer():  # the outer one
        meet()
        with inner():  # the inner one
            pass


@every_kind
@pytest.mark.parametrize("number", [2, 3, 5])
def test_a_circle_is_told_with_every_wait_and_every_stack(kind: Callable[[str], Section], number: int) -> None:
    watch, meeting = LockWatch(), threading.Barrier(number)
    locks = make(watch, kind, *(f"lock {own}" for own in range(number)))
    following = [(own + 1) % number for own in range(number)]
    threads = start(
        *(
            lambda own=own: nested(locks[own], locks[following[own]], lambda: meeting.wait(WAIT))
            for own in range(number)
        )
    )
    found = told(watch)
    waits = [
        f"replica {own} waits for lock {following[own]}, which replica {following[own]} holds" for own in range(number)
    ]
    assert sorted(found.told.split("; ")) == waits
    assert found.threads == set(threads)
    assert found.held.count(frame_at("the outer one")) == number
    assert found.waits.count(frame_at("the inner one")) == number
    for own in range(number):
        assert f"replica {own} acquired lock {own} at\n" in found.held
        assert f"replica {own} waits for lock {following[own]} at\n" in found.waits


@every_kind
@pytest.mark.parametrize("number", [2, 3, 5])
def test_one_order_for_all_is_never_told(kind: Callable[[str], Section], number: int) -> None:
    """Safe twin: the same sections, the last thread's the other way round."""
    watch, enough = LockWatch(), threading.Event()
    locks = make(watch, kind, *(f"lock {own}" for own in range(number)))

    def body(own: int) -> None:
        first, second = sorted((own, (own + 1) % number))
        while not enough.is_set():
            nested(locks[first], locks[second], lambda: None)

    ends_untold(watch, start(*(lambda own=own: body(own) for own in range(number))), enough)


def test_accounts_locked_together_are_never_told() -> None:
    watch, enough = LockWatch(), threading.Event()
    with shown_to(watch.see):
        a, b = Synchronized(1), Synchronized(2)

    def body(*wanted: Synchronized[int]) -> None:
        while not enough.is_set():
            with acquire_locked(*wanted):
                pass

    ends_untold(watch, start(lambda: body(a, b), lambda: body(b, a)), enough)


@pytest.mark.parametrize("releases", [False, True])
def test_a_lock_whose_holder_has_ended_is_never_to_be_had(releases: bool) -> None:
    watch, acquired = LockWatch(), threading.Event()
    with shown_to(watch.see):
        lock = Lock("the lock")

    def holder() -> None:
        lock.acquire()  # and ends
        acquired.set()
        if releases:
            lock.release()

    def waiter() -> None:
        passed(acquired)
        lock.acquire()  # for ever
        lock.release()

    threads = start(holder, waiter)
    if releases:
        ends_untold(watch, threads)
        return
    found = told(watch)
    assert found.told == "replica 1 waits for the lock, which replica 0 holds and is through"
    assert found.threads == {threads[1]}
    assert found.held.startswith("replica 0 acquired the lock at\n")
    assert frame_at("and ends") in found.held
    assert frame_at("for ever") in found.waits
    lock.release()
    threads[1].join(WAIT)


@pytest.mark.parametrize("kind", [Lock, RLock])
def test_a_thread_that_waits_for_itself_is_told_and_one_that_may_go_in_again_is_not(kind: Callable[[str], Any]) -> None:
    watch = LockWatch()
    with shown_to(watch.see):
        lock = kind("the lock")

    def body() -> None:
        for _ in range(2):
            lock.acquire()
        for _ in range(2):
            lock.release()

    threads = start(body)
    if kind is RLock:
        ends_untold(watch, threads)
        with lock:
            pass
        return
    assert told(watch).told == "replica 0 waits for the lock, which it holds itself"


def test_who_waits_behind_a_circle_is_named_and_counted_among_the_stuck() -> None:
    watch, meeting, stuck = LockWatch(), threading.Barrier(2), threading.Event()
    a, b = make(watch, plain, "a", "b")

    def behind() -> None:
        passed(stuck)
        nested(a, b, lambda: None)

    threads = start(
        lambda: nested(a, b, lambda: meeting.wait(WAIT)), lambda: nested(b, a, lambda: meeting.wait(WAIT)), behind
    )
    assert "behind" not in told(watch).told
    stuck.set()
    until(lambda: len(watch._waits) == 3)
    watch.deadlock()
    found = told(watch)
    assert found.told.endswith("; replica 2 waits behind")
    assert found.threads == set(threads)


def test_a_writer_waits_for_a_reader_that_waits_for_it_and_two_readers_do_not() -> None:
    def circle(access: str) -> tuple[LockWatch, list[Thread]]:
        watch, meeting = LockWatch(), threading.Barrier(2)
        with shown_to(watch.see):
            shared, lock = SharedLock("the accounts"), Lock("the log")
        return watch, start(
            lambda: nested(shared.read, lambda: lock, lambda: meeting.wait(WAIT)),
            lambda: nested(lambda: lock, getattr(shared, access), lambda: meeting.wait(WAIT)),
        )

    assert sorted(told(circle("write")[0]).told.split("; ")) == [
        "replica 0 waits for the log, which replica 1 holds",
        "replica 1 waits for the accounts, which replica 0 holds",
    ]
    ends_untold(*circle("read"))


def test_a_lock_that_was_entered_twice_and_left_once_is_still_held() -> None:
    watch, meeting = LockWatch(), threading.Barrier(2)
    with shown_to(watch.see):
        a, b = RLock("a"), RLock("b")

    def body(own: Any, other: Any) -> None:
        with own:
            with own:
                pass
            meeting.wait(WAIT)
            with other:
                pass

    start(lambda: body(a, b), lambda: body(b, a))
    assert told(watch).told.count("waits for") == 2


# What is not.


class Probe:
    """A real lock that says what is noted whenever it is used."""

    def __init__(self, watch: LockWatch) -> None:
        self._lock, self._watch = threading.Lock(), watch
        self.lock: Any = None
        self.noted: list[tuple[str, bool, bool]] = []

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        if blocking:
            self._note("acquire")
        return self._lock.acquire(blocking, timeout)

    def release(self) -> None:
        self._note("release")
        self._lock.release()

    def _note(self, what: str) -> None:
        here = threading.current_thread()
        hold = self.lock._hold
        self.noted.append((what, here in self._watch._waits, hold is not None and hold.thread is here))


def test_a_wait_is_noted_before_and_a_hold_after_the_lock_is_acquired_and_gone_before_it_is_released() -> None:
    watch = LockWatch()
    probe = Probe(watch)
    lock = probe.lock = watch.see(probe, "the lock")
    end_waiting, at_the_end = watch.end_waiting, []

    def ends() -> None:
        at_the_end.append(lock._hold)
        end_waiting()

    watch.end_waiting = ends  # type: ignore[method-assign]
    worker = Worker()
    lock.acquire()
    worker.begin(lock.acquire)
    until(lambda: len(watch._waits) == 1)
    lock.release()
    assert worker.done() is True
    worker.do(lock.release)
    worker.end()
    # Each: what, whether the thread is noted as waiting, and as holding.
    assert probe.noted == [("acquire", True, False), ("release", False, False), ("release", False, False)]
    assert at_the_end == [None]


def test_a_reader_is_not_kept_out_by_another_reader() -> None:
    """It queues behind a writer whose time will be up: a circle that lasts for that long and no longer."""
    watch, meeting = LockWatch(), threading.Barrier(2)
    with shown_to(watch.see):
        shared, lock = SharedLock("the accounts"), Lock("the log")

    def writer() -> None:
        with suppress(LockTimeout), shared.write(1.0):
            raise AssertionError("inside")

    def reads_first() -> None:
        with shared.read():
            meeting.wait(WAIT)
            with lock:
                pass

    def reads_last() -> None:
        with lock:
            meeting.wait(WAIT)
            until(lambda: shared.real.num_waiting == 1)  # the writer
            with shared.read():
                pass

    first, last = start(reads_first, reads_last)
    until(lambda: shared._holds)
    ends_untold(watch, [first, last, *start(writer)])


def test_one_look_alone_tells_nothing() -> None:
    watch, meeting = LockWatch(), threading.Barrier(2)
    a, b = make(watch, plain, "a", "b")
    start(lambda: nested(a, b, lambda: meeting.wait(WAIT)), lambda: nested(b, a, lambda: meeting.wait(WAIT)))
    until(lambda: len(watch._waits) == 2)
    assert watch.deadlock() is None
    assert watch.deadlock() is not None


def test_a_circle_that_a_look_has_put_together_from_two_moments_is_not_told() -> None:
    """Each of two waits for what the other gets only when it waits no more, while the look is on its way."""
    watch = LockWatch()
    with shown_to(watch.see):
        a, b = Lock("a"), Lock("b")
    one, other, first = Worker(), Worker(), Worker()
    first.do(a.acquire)
    first.do(b.acquire)
    for number, (worker, lock) in enumerate(((one, a), (other, b)), 1):
        worker.begin(lock.acquire)
        until(lambda number=number: len(watch._waits) == number)
    keep_out = a.keep_out

    def meanwhile(wait: Any) -> Any:
        a.keep_out = keep_out
        for worker, lock in ((first, a), (first, b)):
            worker.do(lock.release)
        one.done(), other.done()
        for worker, order in ((one, a.release), (other, b.release), (one, b.acquire), (other, a.acquire)):
            worker.do(order)
        return keep_out(wait)

    a.keep_out = meanwhile
    seen = watch._look()
    assert len(_stuck(*seen)) == 2, "a single look is to be fooled, or this shows nothing"
    watch._before = seen
    assert watch.deadlock() is None
    assert watch.deadlock() is None
    one.do(b.release)
    other.do(a.release)
    for each in (one, other, first):
        each.end()


def test_a_holder_that_has_given_its_lock_back_and_ended_meanwhile_is_not_told() -> None:
    """It holds the lock at both looks, and is asked whether it has ended when it does not hold it any more."""
    watch, go_on = LockWatch(), threading.Event()
    with shown_to(watch.see):
        lock = Lock("the lock")
    holder, waiter = start(lambda: nested(lambda: lock, ExitStack, lambda: passed(go_on)), lambda: None)[0], Worker()
    until(lambda: lock._hold is not None)
    waiter.begin(lock.acquire)
    until(lambda: len(watch._waits) == 1)
    assert watch.deadlock() is None
    before, keep_out = watch._before, lock.keep_out

    def seen_and_then(wait: Any) -> Any:
        found = keep_out(wait)
        go_on.set()
        holder.join(WAIT)
        return found

    lock.keep_out = seen_and_then
    assert watch.deadlock() is None
    lock.keep_out = keep_out
    now, ended = watch._before
    assert _stuck(_common(before[0], now), ended), "who asks later whether it has ended is to be fooled"
    assert waiter.done() is True
    waiter.do(lock.release)
    waiter.end()


def test_a_wait_with_a_time_limit_ends_by_itself() -> None:
    watch, meeting = LockWatch(), threading.Barrier(2)
    with shown_to(watch.see):
        locks = [Lock("a"), Lock("b")]
    got: list[bool] = []

    def body(own: int) -> None:
        with locks[own]:
            meeting.wait(WAIT)
            got.append(locks[1 - own].acquire(timeout=0.2 + own))
            if got[-1]:
                locks[1 - own].release()

    ends_untold(watch, start(lambda: body(0), lambda: body(1)))
    assert not got[0]


def test_a_holder_that_waits_for_something_else_counts_as_running() -> None:
    watch, go_on = LockWatch(), threading.Event()
    (lock,) = make(watch, plain, "the lock")
    threads = start(lambda: nested(lock, lambda: ExitStack(), lambda: passed(go_on)))
    until(lambda: lock()._hold is not None)
    threads += start(lambda: nested(lock, lambda: ExitStack(), lambda: None))
    until(lambda: len(watch._waits) == 1)
    for _ in range(20):
        assert watch.deadlock() is None
    go_on.set()
    ends_untold(watch, threads)


def test_a_lock_that_another_thread_gives_back_is_a_signal() -> None:
    watch = LockWatch()
    with shown_to(watch.see):
        lock = Lock("the signal")
    waits, gives = Worker(), Worker()
    waits.do(lock.acquire)
    gives.do(lock.release)
    waits.do(lock.acquire)
    waits.begin(lock.acquire)  # it holds it itself
    until(lambda: len(watch._waits) == 1)
    for _ in range(20):
        assert watch.deadlock() is None
    gives.do(lock.release)
    assert waits.done() is True
    for each in (waits, gives):
        each.end()


def test_what_threads_make_while_they_run_is_not_watched() -> None:
    """A read-write lock makes one for each thread that has to wait, which that thread acquires and then waits for."""
    watch, enough = LockWatch(), threading.Event()

    def body(shared: Synchronized[Any]) -> None:
        while not enough.is_set():
            with shared.wlock():
                time.sleep(0)

    with shown_to(watch.see):
        shared: Synchronized[Any] = Synchronized([], "read_write")
        ends_untold(watch, start(*[lambda: body(shared)] * 3), enough)


def test_watched_locks_do_as_plain_ones_do() -> None:
    watch = LockWatch()
    with shown_to(watch.see):
        lock, again, barrier = Lock("a"), RLock("b"), Barrier(1)
    assert lock.acquire(timeout=0.01)
    assert lock.locked()
    assert not lock.acquire(blocking=False)
    assert not lock.acquire(timeout=0.01)
    lock.release()
    for each in (lock, again):
        with pytest.raises(RuntimeError):
            each.release()
    with pytest.raises(ValueError, match="timeout"):
        lock.acquire(blocking=False, timeout=1)
    with again, again:
        beside = Worker()
        with pytest.raises(RuntimeError):
            raised(beside, again.release)
        assert beside.do(lambda: again.acquire(blocking=False)) is False
        beside.end()
    barrier.wait()
    assert not lock.locked()


def raised(worker: Worker, order: Callable[[], object]) -> None:
    def caught() -> Exception | None:
        try:
            order()
        except Exception as error:
            return error
        return None

    error = worker.do(caught)
    assert isinstance(error, Exception)
    raise error


# Everything at once.


class Mix:
    """Threads that use many kinds of locks in many ways, each always in the order of their places here, or in any."""

    THREADS = 6

    def __init__(self, *, ordered: bool) -> None:
        self.watch, self.enough, self._ordered = LockWatch(), threading.Event(), ordered
        self.rounds = [0] * self.THREADS
        self._go_on = [True] * self.THREADS
        with shown_to(self.watch.see):
            self._locks = [Lock("a"), Lock("b"), RLock("c"), RLock("d")]
            self._sections: list[Section] = [
                *(lambda lock=lock: lock for lock in self._locks),
                Synchronized([], name="e").lock,
                Synchronized([], "re_entrant", name="f").lock,
                SharedLock("g").write,
            ]
            if ordered:
                # Of these not every wait is seen, so that they are no part of what is to be told.
                shared, turn = SharedLock("h"), itertools.count()
                self._sections += [
                    lambda: shared.read() if next(turn) % 3 else shared.write(),
                    Synchronized([], "read_write", name="i").wlock,
                ]
            self._meeting = Barrier(self.THREADS)

    def start(self) -> list[Thread]:
        return start(*(lambda own=own: self._body(own) for own in range(self.THREADS)))

    def _body(self, own: int) -> None:
        draw = random.Random(own)
        for number in itertools.count():
            self._nest(draw)
            self._try(draw)
            self.rounds[own] += 1
            if self._ordered and number % 10 == 0:
                # All see the same at one meeting: whether to go on to the next.
                self._go_on[own] = not self.enough.is_set()
                self._meeting.wait(WAIT)
                if not all(self._go_on):
                    break
                self._meeting.wait(WAIT)

    def _nest(self, draw: random.Random) -> None:
        wanted = draw.sample(self._sections, 3)
        if self._ordered:
            wanted.sort(key=self._sections.index)
        with ExitStack() as held:
            for each in wanted:
                for _ in range(2 if each in self._sections[2:4] else 1):  # re-entrant
                    held.enter_context(each())
                time.sleep(0)

    def _try(self, draw: random.Random) -> None:
        """In any order: who does not wait for ever may."""
        got = [
            lock
            for lock in draw.sample(self._locks, 3)
            if (lock.acquire(blocking=False) if draw.random() < 0.5 else lock.acquire(timeout=0.0005))
        ]
        for lock in got:
            lock.release()


@contextmanager
def switching_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


@pytest.mark.stress
def test_healthy_threads_are_never_told_however_often_one_looks() -> None:
    mix = Mix(ordered=True)
    with switching_often():
        ends_untold(mix.watch, mix.start(), mix.enough)
    assert min(mix.rounds) > 0


@pytest.mark.stress
def test_threads_that_are_told_have_taken_their_last_step() -> None:
    mix = Mix(ordered=False)
    with switching_often():
        mix.start()
        found = told(mix.watch)
    stuck = [int(thread.name.partition("-")[2]) for thread in found.threads]
    then = [mix.rounds[own] for own in stuck]
    time.sleep(0.3)
    assert [mix.rounds[own] for own in stuck] == then
    assert all(thread.is_alive() for thread in found.threads)
    assert len(stuck) >= 2


# In a run.


class NeverStops:
    def is_set(self) -> bool:
        return False


@pytest.mark.parametrize("releases", [False, True])
def test_replicas_in_deadlock_end_the_run_and_the_others_with_it(releases: bool, caplog: Any) -> None:
    watch, acquired, ended = LockWatch(), threading.Event(), threading.Event()
    with shown_to(watch.see):
        lock = Lock("the lock")
    record = RunRecord(EMPTY, 1, [ReplicaRecord.empty(own, 0, 3) for own in range(3)], trains=False)
    last: list[Thread] = []

    def body(own: int) -> None:
        if own == 0:
            lock.acquire()
            acquired.set()
            if releases:
                lock.release()
        elif own == 1:
            passed(acquired)
            lock.acquire()
            ended.set()
        else:
            last.append(threading.current_thread())
            passed(ended)

    threads = ReplicaThreads(
        record,
        body,
        ended,
        abort=lambda: None,
        report=lambda: None,
        stop=NeverStops(),
        stall_seconds=WAIT,
        locks=watch,
    )
    if releases:
        threads.run()
        return
    began = time.monotonic()
    with pytest.raises(RunBroken) as raised:
        threads.run()
    assert time.monotonic() - began < WAIT / 2  # 0.1 s; the watchdog would take WAIT
    broken = raised.value
    assert broken.kind == "deadlock"
    first, acquisition = broken.message.split("\n", 1)
    assert first == "replica 1 waits for the lock, which replica 0 holds and is through."
    assert acquisition.startswith("replica 0 acquired the lock at\n")
    assert "replica 1 waits for the lock at\n" in caplog.text
    assert not last[0].is_alive()
    lock.release()

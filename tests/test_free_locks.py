"""What free runs wait at, by itself: `FreeBarrier` and `FreeSharedLock`, in forced orders."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
from beside import WAIT, Beside, Worker, passed, until

from trainer.schedule.free_barrier import FreeBarrier
from trainer.schedule.free_shared_lock import FreeSharedLock
from trainer.schedule.locks import Barrier, SharedLock


class OpenBarrier(FreeBarrier):
    """Unsafe twin: nobody waits."""

    def wait(self) -> None:
        pass


def late_increments_seen(barrier: FreeBarrier) -> int:
    """What one of two threads, which came first, finds when it goes on; the other adds 1 before it comes."""
    value, found = [0], Worker()
    try:
        found.begin(lambda: (barrier.wait(), value[0])[1])
        if not isinstance(barrier, OpenBarrier):
            until(lambda: barrier.n_waiting == 1)
            value[0] += 1
            barrier.wait()
            return int(found.done())
        seen = int(found.done())
        value[0] += 1
        return seen
    finally:
        found.end()


def test_nobody_goes_on_before_all_have_come() -> None:
    assert late_increments_seen(FreeBarrier(2)) == 1


def test_without_waiting_the_first_goes_on_too_early() -> None:
    assert late_increments_seen(OpenBarrier(2)) == 0


def test_a_barrier_for_one_never_waits() -> None:
    barrier = FreeBarrier(1)
    for _ in range(3):
        barrier.wait()


def test_a_barrier_for_nobody_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^A barrier is for at least 1 thread; got 0\.$"):
        FreeBarrier(0)


@pytest.mark.parametrize("parties", [2, 3, 8])
def test_every_round_waits_for_all_again(parties: int) -> None:
    barrier, rounds = FreeBarrier(parties), 200
    done = [0] * parties  # each element has one writer
    least: list[int] = []

    def body(own: int) -> None:
        for _ in range(rounds):
            done[own] += 1
            barrier.wait()
            least.append(min(done) - done[own])
            barrier.wait()

    for each in [Beside(lambda own=own: body(own)) for own in range(parties)]:
        each.result()
    assert least == [0] * rounds * parties


def test_abort_wakes_who_waits_and_turns_away_who_comes() -> None:
    barrier = FreeBarrier(3)
    waiting = [Beside(barrier.wait) for _ in range(2)]
    until(lambda: barrier.n_waiting == 2)
    barrier.abort()
    for each in waiting:
        with pytest.raises(threading.BrokenBarrierError):
            each.result()
    with pytest.raises(threading.BrokenBarrierError):
        barrier.wait()
    assert barrier.n_waiting == 0


def test_a_time_out_breaks_the_barrier_for_everybody_and_a_round_in_time_does_not() -> None:
    barrier = FreeBarrier(2)
    with pytest.raises(threading.BrokenBarrierError):
        barrier.wait(0.01)
    with pytest.raises(threading.BrokenBarrierError):
        barrier.wait()
    whole, places = FreeBarrier(2), []
    threads = [threading.Thread(target=lambda: places.append(whole.wait(WAIT))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    assert (sorted(places), whole.broken) == ([0, 1], False)


def test_a_second_abort_is_no_mistake() -> None:
    barrier = FreeBarrier(2)
    barrier.abort()
    barrier.abort()
    assert barrier.broken


def test_free_runs_get_these() -> None:
    assert type(Barrier(2)) is FreeBarrier
    assert type(SharedLock(queues=False)) is FreeSharedLock


class Open:
    """Unsafe twin of the lock: lets everybody in."""

    def read(self) -> AbstractContextManager[None]:
        return nullcontext()

    def write(self) -> AbstractContextManager[None]:
        return nullcontext()


def writes_inside(lock: FreeSharedLock | Open, section: Callable[[], AbstractContextManager[None]]) -> list[str]:
    """What another thread's write does during a section, if it can get in, and after it."""
    told: list[str] = []
    begun = threading.Event()

    def write() -> None:
        begun.set()
        with lock.write():
            told.append("write")

    with section():
        writer = Beside(write)
        passed(begun)
        if isinstance(lock, Open):
            writer.result()
        else:
            # It holds the turn, and waits for readers to leave, or waits for the turn.
            until(lambda: lock._writer_waits or lock._turn.locked())
        told.append("section")
    writer.result()
    return told


@pytest.mark.parametrize("access", ["read", "write"])
def test_a_section_keeps_writers_out(access: str) -> None:
    lock = FreeSharedLock()
    assert writes_inside(lock, getattr(lock, access)) == ["section", "write"]


@pytest.mark.parametrize("access", ["read", "write"])
def test_without_a_lock_a_write_comes_in_between(access: str) -> None:
    lock = Open()
    assert writes_inside(lock, getattr(lock, access)) == ["write", "section"]


def test_readers_are_inside_together() -> None:
    lock, inside = FreeSharedLock(), threading.Barrier(3)

    def read() -> None:
        with lock.read():
            inside.wait(WAIT)

    for reader in [Beside(read) for _ in range(3)]:
        reader.result()


def test_a_writer_that_has_the_turn_goes_before_readers_that_come_later() -> None:
    lock, order = FreeSharedLock(), []

    def enter(role: str, section: Callable[[], AbstractContextManager[None]], begun: threading.Event) -> None:
        begun.set()
        with section():
            order.append(role)

    begun = [threading.Event() for _ in range(2)]
    with lock.read():
        writer = Beside(lambda: enter("writer", lock.write, begun[0]))
        until(lambda: lock._writer_waits)
        reader = Beside(lambda: enter("reader", lock.read, begun[1]))
        passed(begun[1])
        order.append("first reader")
    writer.result()
    reader.result()
    assert order == ["first reader", "writer", "reader"]


def test_the_last_of_several_readers_lets_the_writer_in() -> None:
    lock, order = FreeSharedLock(), []
    readers = [Worker() for _ in range(2)]
    try:
        for reader in readers:
            reader.do(lock.enter_reading)
        writer = Beside(lambda: (lock.enter_writing(), order.append("writer"), lock.leave_writing()))
        until(lambda: lock._writer_waits)
        readers[0].do(lock.leave_reading)
        assert lock._writer_waits
        assert order == []
        readers[1].do(lock.leave_reading)
        writer.result()
        assert order == ["writer"]
    finally:
        for reader in readers:
            reader.end()


def test_a_section_that_raises_is_left() -> None:
    lock = FreeSharedLock()
    for section in (lock.read, lock.write):
        with pytest.raises(KeyError), section():
            raise KeyError
    with lock.write():
        assert lock._readers == 0


@pytest.mark.stress
def test_increments_under_write_are_kept_beside_readers() -> None:
    lock, value, torn = FreeSharedLock(), [0, 0], []

    def write() -> None:
        for _ in range(2_000):
            with lock.write():
                before = value[0]
                value[0] = before + 1
                value[1] = before + 1

    def read() -> None:
        for _ in range(2_000):
            with lock.read():
                if value[0] != value[1]:
                    torn.append(tuple(value))

    for each in [Beside(body) for body in (write, read, write, read)]:
        each.result()
    assert value == [4_000, 4_000]
    assert torn == []

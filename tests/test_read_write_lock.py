"""The lock of `reader_writer`: who may be inside together, who is next, and that nobody waits for ever."""

from __future__ import annotations

import threading
from collections.abc import Callable

from trainer.updates.read_write_lock import ReadWriteLock

WAIT = 20.0


def started(body: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    return thread


def entering(lock: ReadWriteLock, order: list[str], role: str) -> Callable[[], None]:
    """A body that goes in as a reader or writer and notes when."""

    def enter() -> None:
        with lock.read() if role == "reader" else lock.write():
            order.append(role)

    return enter


def joined(thread: threading.Thread) -> None:
    thread.join(WAIT)
    assert not thread.is_alive()


def waiting(count: Callable[[], int], number: int) -> None:
    """Until so many wait at the lock."""
    until, pause = WAIT, threading.Event()
    while count() < number:
        pause.wait(0.002)
        until -= 0.002
        assert until > 0


def test_readers_are_inside_together() -> None:
    lock, inside = ReadWriteLock(), threading.Barrier(3)

    def read() -> None:
        with lock.read():
            inside.wait(WAIT)

    for thread in [started(read) for _ in range(3)]:
        joined(thread)


def test_a_writer_is_inside_alone() -> None:
    lock, order = ReadWriteLock(), []
    with lock.write():
        threads = [started(entering(lock, order, "writer")), started(entering(lock, order, "reader"))]
        waiting(lambda: lock._writers_waiting + lock._readers_waiting, 2)
        order.append("first")
    for thread in threads:
        joined(thread)
    assert order[0] == "first"
    assert sorted(order[1:]) == ["reader", "writer"]


def test_a_reader_that_comes_after_a_waiting_writer_goes_after_it() -> None:
    lock, order = ReadWriteLock(), []
    with lock.read():
        writer = started(entering(lock, order, "writer"))
        waiting(lambda: lock._writers_waiting, 1)
        reader = started(entering(lock, order, "reader"))
        waiting(lambda: lock._readers_waiting, 1)
    joined(writer)
    joined(reader)
    assert order == ["writer", "reader"]


def test_readers_that_waited_for_a_writer_go_before_the_next_one() -> None:
    lock, order = ReadWriteLock(), []
    with lock.write():
        reader = started(entering(lock, order, "reader"))
        waiting(lambda: lock._readers_waiting, 1)
        writer = started(entering(lock, order, "writer"))
        waiting(lambda: lock._writers_waiting, 1)
    joined(reader)
    joined(writer)
    assert order == ["reader", "writer"]


def test_many_readers_and_writers_all_come_through_and_no_write_is_lost() -> None:
    lock, value = ReadWriteLock(), [0]

    def work() -> None:
        for _ in range(50):
            with lock.read():
                assert value[0] >= 0
            with lock.write():
                before = value[0]
                threading.Event().wait(0)  # lets the others run between read and write
                value[0] = before + 1

    for thread in [started(work) for _ in range(16)]:
        joined(thread)
    assert value[0] == 16 * 50

"""Waiting for another process, piece by piece."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from trainer.strategies import exchange

OVER = "Operation timed out!"  # what torch says when the time given to a wait is


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Slow:
    """Work that is done, or has failed, in the moment after a piece of waiting for it is over."""

    def __init__(self, error: str = "") -> None:
        self.work, self.error, self.done = dist.all_reduce(torch.ones(2), async_op=True), error, False

    def is_completed(self) -> bool:
        return self.done

    def wait(self, *seconds: object) -> bool:
        if not self.done:
            self.done = True
            raise RuntimeError(OVER)
        if self.error:
            raise RuntimeError(self.error)
        return self.work.wait()


def test_work_that_is_done_right_after_a_piece_of_waiting_is_not_lost(group: None) -> None:
    exchange.wait(Slow(), threading.Event())  # type: ignore[arg-type]


def test_what_failed_says_why(group: None) -> None:
    with pytest.raises(RuntimeError, match="Connection closed by peer"):
        exchange.wait(Slow("Connection closed by peer"), threading.Event())  # type: ignore[arg-type]


def test_nobody_waits_for_a_run_that_is_over(group: None) -> None:
    class Never(Slow):
        def wait(self, *seconds: object) -> bool:
            raise RuntimeError(OVER)

    ended = threading.Event()
    ended.set()
    with pytest.raises(threading.BrokenBarrierError):
        exchange.wait(Never(), ended)  # type: ignore[arg-type]


def test_a_real_wait_that_is_over_says_what_it_is_taken_for_here() -> None:
    """Two processes, as threads see them: one that is there, and one that does not come in time."""
    store = dist.HashStore()
    groups: list[dist.ProcessGroupGloo] = []

    def join(rank: int) -> None:
        groups.append(dist.ProcessGroupGloo(dist.PrefixStore("pair", store), rank, 2))

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    one, other = groups
    ours, theirs = torch.ones(2), torch.full((2,), 2.0)
    work = one.allreduce([ours])
    with pytest.raises(RuntimeError, match=OVER):
        work.wait(exchange.POLL)
    assert not work.is_completed()
    late = threading.Timer(0.3, lambda: other.allreduce([theirs]).wait())
    late.start()
    exchange.wait(work, threading.Event())
    late.join()
    assert ours.tolist() == [3, 3]

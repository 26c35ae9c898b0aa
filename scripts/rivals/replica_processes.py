"""Replicas as processes, for the rivals that have one each: started together, measured together."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.multiprocessing as mp
from stopwatch import Stretch, as_line

LIMIT_SECONDS = 120.0


@dataclass(frozen=True)
class Peers:
    """What lets the replicas agree on a number, besides what they train with."""

    barrier: Any
    number: Any

    def agree(self, rank: int, value: float) -> float:
        """Rank 0's value, for all ranks, once all are there."""
        if rank == 0:
            self.number.value = value
        self.barrier.wait(LIMIT_SECONDS)
        found = float(self.number.value)
        # Before rank 0 writes the next one.
        self.barrier.wait(LIMIT_SECONDS)
        return found


def run(replicas: int, replica: Callable[..., Stretch], *arguments: Any) -> list[Stretch]:
    """Call `replica(rank, peers, *arguments)` in a process for each rank, and return what they measured.

    Raises:
        ProcessRaisedException: one of them raised; the others were ended.
    """
    context = mp.get_context("spawn")
    peers = Peers(context.Barrier(replicas), context.Value("d", 0.0))
    lines = context.SimpleQueue()
    mp.spawn(_call, (replica, peers, lines, arguments), nprocs=replicas)
    return [Stretch(**json.loads(lines.get())) for _ in range(replicas)]


def _call(rank: int, replica: Callable[..., Stretch], peers: Peers, lines: Any, arguments: tuple[Any, ...]) -> None:
    lines.put(as_line(replica(rank, peers, *arguments)))

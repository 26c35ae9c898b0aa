"""Orders drawn at random, for cases that are too large for all of them. Standard library only.

The two ways complement each other: a uniform random walk finds what needs many small turns, a few priorities find what
needs one replica to fall far behind.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from trainer.schedule.order import Choose, Order


def random_walk(seed: int, lengths: Sequence[int]) -> Choose:
    """Whoever goes next is drawn with a weight of how many operations it has left, so that every interleaving of
    replicas that never wait is equally likely.

    Args:
        lengths: operations of each replica, as counted in an earlier run.

    Source: Zhao et al. 2025 (uniform random walk).
    """
    numbers = random.Random(seed)

    def choose(order: Order) -> int:
        able = order.able()
        done = [0] * order.num_replicas
        for own in order.granted:
            done[own] += 1
        return numbers.choices(able, [max(1, lengths[own] - done[own]) for own in able])[0]

    return choose


def priorities(seed: int, lengths: Sequence[int], depth: int) -> Choose:
    """Probabilistic concurrency testing: whoever can go and has the highest priority goes; `depth - 1` times, at
    operations drawn beforehand, whoever is about to go falls behind all others.

    A fault that needs `depth` things in order is found in a run with a probability of at least
    1 / (replicas x operations ** (depth - 1)).

    Source: Burckhardt et al. 2010 (PCT).
    """
    numbers = random.Random(seed)
    ranks = [float(rank) for rank in numbers.sample(range(depth, depth + len(lengths)), len(lengths))]
    total = max(1, sum(lengths))
    falls = sorted(numbers.sample(range(total), min(depth - 1, total)))
    fallen = 0

    def choose(order: Order) -> int:
        nonlocal fallen
        able = order.able()
        first = max(able, key=ranks.__getitem__)
        while fallen < len(falls) and len(order.granted) >= falls[fallen]:
            fallen += 1
            ranks[first] = -float(fallen)
            first = max(able, key=ranks.__getitem__)
        return first

    return choose

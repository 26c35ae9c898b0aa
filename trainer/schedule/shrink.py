"""Orders with fewer switches that may show the same. Standard library only."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from trainer.schedule.order import Order


def follow(order: Order, granted: Sequence[int]) -> int:
    """Who goes next where `granted` is followed as far as it can be: who cannot go is passed over, and where nothing
    is said whoever went last goes on.
    """
    able, at = order.able(), len(order.granted)
    if at < len(granted) and granted[at] in able:
        return granted[at]
    return order.last if order.last in able else able[0]


def shorter(granted: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """The same operations with a switch less: each run of one replica's joined to its next or to its last one."""
    runs = [(own, len(list(group))) for own, group in itertools.groupby(granted)]
    for at, (own, count) in enumerate(runs):
        for other in (_before(runs, at), _after(runs, at)):
            if other is None:
                continue
            joined = list(runs)
            joined[other] = (own, joined[other][1] + count)
            del joined[at]
            yield tuple(each for replica, number in joined for each in [replica] * number)


def _before(runs: Sequence[tuple[int, int]], at: int) -> int | None:
    return next((each for each in range(at - 1, -1, -1) if runs[each][0] == runs[at][0]), None)


def _after(runs: Sequence[tuple[int, int]], at: int) -> int | None:
    return next((each for each in range(at + 1, len(runs)) if runs[each][0] == runs[at][0]), None)

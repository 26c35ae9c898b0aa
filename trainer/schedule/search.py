"""Every order of a small case, or every order within a preemption bound, by running each from the start.

The orders are the paths of a tree whose nodes are choices. Two prefixes that are equivalent (`Order.prefix`) lead to
the same state, so what follows is run once and counted for both: the counts are of orders, not of runs.

Source: stateless search, Godefroid 1997; preemption bounding, Musuvathi and Qadeer 2007; equivalence of prefixes,
Mazurkiewicz 1977. Standard library only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field

from trainer.schedule.order import Abandoned, Order

ORDERS = "orders"


class Unsteady(Exception):
    """The same choices led to other operations than before: the case depends on something else than its order."""


@dataclass
class _Node:
    """A choice on the current path.

    Attributes:
        key: equal for nodes from which the same follows.
        able: who could go next, the likeliest first; `at` is who goes in the current run.
        told: what each of them was about to do.
        found: what the runs through it have come to so far.
    """

    key: Hashable
    able: list[int]
    told: list[str]
    at: int = 0
    found: Counter[str] = field(default_factory=Counter)


class Search:
    """Chooses, run after run, until every order was covered.

        while search.unfinished:
            order = Order(num_replicas, search.choose)
            ...run it...
            search.complete(labels)         # or search.cut() where choose has raised Abandoned

    Args:
        preemptions: only orders with at most as many; None for every order.

    Attributes:
        runs: those begun, whether they were completed or cut.
        completed: those completed.
        hidden: whether equivalent prefixes were seen to lead to different states (`Order.state`), which are then run
            for themselves: replicas share something that is not announced.

    Thread-safety: one call at a time.
    """

    def __init__(self, preemptions: int | None = None) -> None:
        self.preemptions = preemptions
        self.runs = 0
        self.completed = 0
        self.hidden = False
        self.unfinished = True
        self._path: list[_Node] = []
        self._depth = 0
        self._seen: dict[Hashable, Counter[str]] = {}
        self._states: dict[Hashable, Hashable] = {}
        self._known: Counter[str] | None = None
        self._found: Counter[str] = Counter()

    def choose(self, order: Order) -> int:
        """Who goes next.

        Raises:
            Abandoned: what follows is known already.
            Unsteady: the run is not the one that it was the last time.
        """
        able = self._able(order)
        if len(able) == 1:
            return able[0]
        if self._depth == len(self._path):
            self._enter(order, able)
        node = self._path[self._depth]
        told = [_told(order, own) for own in able]
        if node.told != told:
            raise Unsteady(
                f"after {len(order.granted)} operations the replicas were about to {', '.join(told)}, and in an "
                f"earlier run with the same choices to {', '.join(node.told)}"
            )
        self._depth += 1
        return node.able[node.at]

    def complete(self, labels: Iterable[str] = ()) -> None:
        """The run went to its end, or into a deadlock, and has come to this."""
        self.completed += 1
        self._end(Counter([ORDERS, *set(labels)]))

    def cut(self) -> None:
        """The run was abandoned because what follows is known."""
        assert self._known is not None
        self._end(self._known)

    @property
    def found(self) -> Counter[str]:
        """The number of orders covered so far, under `ORDERS`, and of those with each label."""
        total = self._found.copy()
        for node in self._path:
            total.update(node.found)
        return total

    @property
    def share(self) -> float:
        """An estimate of how much is done, 0 to 1: as if what follows each choice were equally much."""
        if not self.unfinished:
            return 1.0
        done, part = 0.0, 1.0
        for node in self._path:
            part /= len(node.able)
            done += node.at * part
        return done

    def _able(self, order: Order) -> list[int]:
        """Who may go next within the bound, whoever went last first."""
        able, last = order.able(), order.last
        if last not in able:
            return able
        assert last is not None
        if self.preemptions is not None and order.preemptions >= self.preemptions:
            return [last]
        return [last, *(own for own in able if own != last)]

    def _enter(self, order: Order, able: list[int]) -> None:
        state: Hashable = order.state()
        if state is not None:
            state = (state, *(operation and operation.told for operation in order.pending))
            self.hidden |= self._states.setdefault(order.prefix, state) != state
        key: Hashable = (order.prefix, state)
        if self.preemptions is not None:
            key = (key, order.last, order.preemptions)
        self._known = self._seen.get(key)
        if self._known is not None:
            raise Abandoned
        self._path.append(_Node(key, able, [_told(order, own) for own in able]))

    def _end(self, found: Counter[str]) -> None:
        """Count what a run has come to, and go to the next choice that is left."""
        self.runs += 1
        self._depth = 0
        while self._path:
            node = self._path[-1]
            node.found.update(found)
            node.at += 1
            if node.at < len(node.able):
                return
            self._path.pop()
            found = self._seen[node.key] = node.found
        self._found.update(found)
        self.unfinished = False


def _told(order: Order, own: int) -> str:
    operation = order.pending[own]
    assert operation is not None
    return f"{own} {operation.told}"

"""Which lock is acquired while which is held, and whether all threads agree. Standard library only.

Two threads that acquire two locks in opposite orders deadlock if each gets its first before the other's second. They
rarely do, but that they could is seen as soon as both orders have been used once, in any threads, at any time, and
also when the circle has more locks than two.

Assumption: an order once seen counts for ever, so orders that never overlap in time are reported too.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from trainer.state.call_site import call_site


class LockOrderError(RuntimeError):
    """Locks are acquired in orders that can deadlock. The message has both sites of every acquisition involved."""


@dataclass(frozen=True)
class _Held:
    lock: int
    name: str
    site: str


@dataclass(frozen=True)
class _Edge:
    """`thread` acquired `second` while it held `first`."""

    first: _Held
    second: _Held
    thread: str


class LockOrder:
    """Checks the locks that share it, before they wait. Give the same one to every `Synchronized` to be compared.

    It knows a lock by its number and keeps what it saw as long as it lives: two sites and a name for each pair of
    locks held together. Every acquisition walks the stack for its site, so it is for tests and for hunting, not for
    every day. All accesses count alike: with a writer waiting for each, even two reads in opposite orders deadlock.

    Thread-safety: any thread.
    """

    def __init__(self, report: Callable[[LockOrderError], object] | None = None) -> None:
        """
        Args:
            report: gets each disagreement once, in the thread that is about to acquire, which then goes on. None
                raises it there instead, and nothing is acquired.
        """
        self._report = report
        self._guard = threading.Lock()  # over the edges
        self._edges: dict[int, dict[int, _Edge]] = {}
        self._held = threading.local()  # each thread's stack of `_Held`

    def acquiring(self, lock: int, name: str, again: bool = False) -> str:
        """To call before waiting for a lock. Returns the call's site, to hand to `acquired`.

        Args:
            lock: a number that no other lock has or will have.
            again: the thread holds it already and is about to wait for it all the same: to upgrade, or to have it back
                after waiting for a condition.

        Raises:
            LockOrderError: there is a circle, and no `report`.
        """
        held = self._stack()
        wanted = _Held(lock, name, call_site())
        # A lock that the thread holds is given to it at once, so that no order can matter.
        if not again and any(each.lock == lock for each in held):
            return wanted.site
        found = []
        with self._guard:
            for each in held:
                if each.lock == lock or lock in self._edges.get(each.lock, ()):
                    continue
                edge = _Edge(each, wanted, threading.current_thread().name)
                circle = self._path(lock, each.lock)
                if circle:
                    found.append(LockOrderError(_told(edge, circle)))
                    if self._report is None:
                        raise found[0]
                self._edges.setdefault(each.lock, {})[lock] = edge
        # Not under the guard: what `report` does is its own affair, and may be to acquire.
        if self._report is not None:
            for error in found:
                self._report(error)
        return wanted.site

    def acquired(self, lock: int, name: str, site: str) -> None:
        self._stack().append(_Held(lock, name, site))

    def released(self, lock: int) -> None:
        held = self._stack()
        for index in reversed(range(len(held))):
            if held[index].lock == lock:
                del held[index]
                return

    def _stack(self) -> list[_Held]:
        try:
            held: list[_Held] = self._held.stack
        except AttributeError:
            held = self._held.stack = []
        return held

    def _path(self, start: int, goal: int) -> list[_Edge]:
        """The fewest edges that lead from `start` to `goal`; none if nothing does."""
        reached: dict[int, list[_Edge]] = {start: []}
        to_visit = deque([start])
        while to_visit:
            lock = to_visit.popleft()
            for following, edge in self._edges.get(lock, {}).items():
                if following not in reached:
                    reached[following] = [*reached[lock], edge]
                    to_visit.append(following)
        return reached.get(goal, [])


def _told(edge: _Edge, circle: list[_Edge]) -> str:
    now = (
        f"Lock order: thread {edge.thread} acquires {edge.second.name} at {edge.second.site} "
        f"while it holds {edge.first.name} from {edge.first.site}"
    )
    before = [
        f"thread {each.thread} acquired {each.second.name} at {each.second.site} "
        f"while it held {each.first.name} from {each.first.site}"
        for each in circle
    ]
    return f"{now}, but {', and '.join(before)}. Acquire them in one order, or together with acquire_locked()."

"""The model of a run under control: what each replica is about to do, who can go next, and what has been done.

Invariant: one replica runs at a time, from the operation that it was granted to its next announcement; so what is
granted is done before anything else is, and versions can be counted here.

Locks and barriers are modelled, not used: a replica that waits for a lock is one whose next operation cannot be granted
yet. Hence who can go is known exactly, and replicas of which none can go are in deadlock.

Two prefixes in which every two conflicting operations come in the same order lead to the same state (Mazurkiewicz
1977). `Order.prefix` is the same for such prefixes and for no others.

Standard library only. Thread-safety: none; a host calls from whichever replica's turn it is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter_ns

from trainer.schedule.clocks import Clocks, Prefix
from trainer.schedule.operations import (
    ACQUIRE,
    BARRIER,
    BEGIN,
    LOCK,
    REENTRANT,
    SHARE,
    TIMED,
    TRY,
    UPDATE,
    Event,
    History,
    Operation,
)

START = Operation("start", "", (), LOCK)
DONE = Operation("done", "", (), LOCK)
# Kinds of operations that cannot always be granted.
WAITING = frozenset((ACQUIRE, SHARE, BARRIER, DONE.kind))


class Abandoned(BaseException):
    """This order is not to be finished. Raised in every replica; no `Exception`, so that nothing stops it."""


class Deadlock(Exception):
    """No replica can go on.

    Attributes:
        waits: for each that is not done, the operation that it waits for.
        stacks: where each of them is, as far as its host knows.
    """

    def __init__(self, told: str, waits: dict[int, Operation]) -> None:
        super().__init__(told)
        self.told, self.waits = told, waits
        self.stacks: dict[int, str] = {}


@dataclass
class _Lock:
    owner: int | None = None
    depth: int = 0
    readers: dict[int, int] = field(default_factory=dict)


# Picks who goes next, of two replicas or more that can. May raise Abandoned.
Choose = Callable[["Order"], int]


class Order:
    """One order in the making.

    Attributes:
        history: what was done.
        pending: what each replica is about to do; None while it runs, `DONE` once it is through.
        last: who was granted the last operation; None before the first and after a barrier.
        granted: every replica that was granted an operation, in order: what a token keeps. Barriers, starts and
            operations that nobody else could have come before are in it, too.
        preemptions: times that a replica was passed over which had just run and could go on.
        switches: times that another replica than the last was granted an operation.
        tried: whether the lock that was asked for last was free, or that was released last was held.
        told: the name of every granted operation, in order.
        state: a digest of what replicas hold (`fingerprint.py`), where somebody may share what is not announced.
    """

    def __init__(self, num_replicas: int, choose: Choose, *, joint: bool = False, copies: bool = False) -> None:
        self.num_replicas = num_replicas
        self.history = History(num_replicas, joint=joint, copies=copies)
        self.pending: list[Operation | None] = [START] * num_replicas
        self.last: int | None = None
        self.granted: list[int] = []
        self.told: list[str] = []
        self.preemptions = 0
        self.switches = 0
        self.tried = False
        self.state: Callable[[], bytes | None] = lambda: None
        self._choose = choose
        self._steps = [-1] * num_replicas
        self._locks: dict[str, _Lock] = {}
        self._versions: dict[str, int] = {}
        self._read: list[dict[str, int]] = [{} for _ in range(num_replicas)]
        # Replicas that run to their next announcement without that being a choice: at the start, and after a barrier.
        self._released: deque[int] = deque(range(num_replicas))
        self._clocks = Clocks(num_replicas)

    # What a host asks.

    def next(self) -> int | None:
        """Grant the next operation and say to whom; None when every replica is through.

        Raises:
            Deadlock: none can go on.
            Abandoned: the chooser wants no more of this order.
        """
        if self._released:
            own = self._released.popleft()
            self.pending[own] = None
            return own
        if self._pass_barrier():  # at once: where others can go on as well, they may come before or after it
            return self.next()
        able = self.able()
        if not able:
            if all(operation is DONE for operation in self.pending):
                return None
            able = self._out_of_time()
        if not able:
            raise self._deadlock()
        chosen = able[0] if len(able) == 1 else self._choose(self)
        if self.last is not None and chosen != self.last:
            self.switches += 1
            self.preemptions += self.last in able
        self._grant(chosen)
        return chosen

    def release_all(self) -> list[int]:
        """All that a start or a barrier lets go, at once."""
        released = list(self._released)
        self._released.clear()
        for own in released:
            self.pending[own] = None
        return released

    def able(self) -> list[int]:
        """The replicas whose next operation can be granted, by number."""
        return [
            own
            for own, operation in enumerate(self.pending)
            if operation is not None and (operation.kind not in WAITING or self._is_free(own, operation))
        ]

    @property
    def prefix(self) -> Prefix:
        """The same for two prefixes that differ in the order of operations only which do not conflict."""
        return self._clocks.prefix

    # What replicas tell.

    def announce(self, own: int, operation: Operation) -> None:
        """Take note of what a replica is about to do."""
        self.pending[own] = operation
        self.history.announced[own] = operation, perf_counter_ns()

    def mark(self, own: int, kind: str, value: str = "") -> None:
        """Put a mark in the history; nobody waits for one."""
        if kind == BEGIN:
            self._steps[own] += 1
            self._read[own].clear()
        self.history.add(Event(own, self._steps[own], Operation(kind, "", (), LOCK, value)), perf_counter_ns())

    def holds(self, own: int, name: str) -> bool:
        """Whether a replica has a lock, alone or shared."""
        lock = self._locks.get(name)
        return lock is not None and (lock.owner == own or own in lock.readers)

    def is_held(self, name: str) -> bool:
        lock = self._locks.get(name)
        return lock is not None and (lock.owner is not None or bool(lock.readers))

    # Granting.

    def _is_free(self, own: int, operation: Operation) -> bool:
        """Whether the lock is to be had; what is done or at a barrier waits for none."""
        if operation.kind not in (ACQUIRE, SHARE, TRY):
            return False
        lock = self._locks.get(operation.name)
        if lock is None:
            return True
        if REENTRANT in operation.value and lock.owner == own:
            return True
        if operation.kind == SHARE:
            return lock.owner is None
        return lock.owner is None and not lock.readers

    def _grant(self, own: int) -> None:
        operation = self.pending[own]
        assert operation is not None
        self.pending[own] = None
        self.last = own
        self.granted.append(own)
        self.told.append(operation.told)
        self._clocks.count(own, operation)
        versions, bases = self._perform(own, operation)
        self.history.add(Event(own, self._steps[own], operation, versions, bases), perf_counter_ns())

    def _perform(self, own: int, operation: Operation) -> tuple[tuple[int, ...], tuple[int, ...]]:
        read, current = self._read[own], self._versions
        match operation.kind:
            case "read":
                versions = tuple(current.get(place, 0) for place in operation.places)
                read.update(zip(operation.places, versions, strict=True))
                return versions, ()
            case "write" | "update":
                bases = tuple(
                    current.get(place, 0) if operation.kind == UPDATE else read.get(place, -1)
                    for place in operation.places
                )
                for place in operation.places:
                    current[place] = read[place] = current.get(place, 0) + 1
                return tuple(current[place] for place in operation.places), bases
            case _:
                self._lock(own, operation)
                return (), ()

    def _lock(self, own: int, operation: Operation) -> None:
        lock = self._locks.setdefault(operation.name, _Lock())
        match operation.kind:
            case "acquire" | "try":
                self.tried = self._is_free(own, operation)
                if self.tried:
                    lock.owner, lock.depth = own, lock.depth + 1
            case "release":
                # Of two that release a plain lock at the same time, the second does it too late.
                self.tried = lock.depth > 0
                lock.depth = max(0, lock.depth - 1)
                if not lock.depth:
                    lock.owner = None
            case "share":
                lock.readers[own] = lock.readers.get(own, 0) + 1
            case "unshare":
                lock.readers[own] -= 1
                if not lock.readers[own]:
                    del lock.readers[own]

    def _pass_barrier(self) -> bool:
        """Let all go on who wait at a barrier at which its number of parties waits; False where there is none."""
        waiting: dict[str, list[int]] = {}
        for own, operation in enumerate(self.pending):
            if operation is not None and operation.kind == BARRIER:
                waiting.setdefault(operation.name, []).append(own)
        for name, replicas in waiting.items():
            operation = self.pending[replicas[0]]
            assert operation is not None
            if len(replicas) < int(operation.value):
                continue
            replicas = replicas[: int(operation.value)]
            self._clocks.meet(replicas, name)
            now = perf_counter_ns()
            for own in replicas:
                self.granted.append(own)
                self.told.append(operation.told)
                self.history.add(Event(own, self._steps[own], operation), now)
            self._released.extend(replicas)
            self.last = None  # whoever goes next interrupts nobody
            return True
        return False

    def _out_of_time(self) -> list[int]:
        """Who waits for a lock with a time-out, the first of them, where nobody can go on: its time is up."""
        waiting = enumerate(self.pending)
        timed = (own for own, each in waiting if each is not None and each.kind == ACQUIRE and TIMED in each.value)
        return list(timed)[:1]

    def _deadlock(self) -> Deadlock:
        waits = {own: each for own, each in enumerate(self.pending) if each is not None and each is not DONE}
        return Deadlock(self._told_cycle(waits), waits)

    def _told_cycle(self, waits: dict[int, Operation]) -> str:
        """Who waits for whom: a cycle where there is one, else everybody who waits."""
        for first in waits:
            path: list[int] = []
            own = first
            while own in waits and own not in path:
                path.append(own)
                holder = self._holder(own, waits[own])
                if holder is None:
                    break
                own = holder
            else:
                if own in path:
                    return "; ".join(self._told_wait(each, waits[each]) for each in path[path.index(own) :])
        return "; ".join(self._told_wait(own, operation) for own, operation in waits.items())

    def _holder(self, own: int, operation: Operation) -> int | None:
        lock = self._locks.get(operation.name)
        if operation.kind == BARRIER or lock is None:
            return None
        others = [*([] if lock.owner is None else [lock.owner]), *lock.readers]
        return next((each for each in others if each != own), own if others else None)

    def _told_wait(self, own: int, operation: Operation) -> str:
        if operation.kind == BARRIER:
            return f"replica {own} waits at {operation.name}, which {operation.value} replicas have to reach"
        holder = self._holder(own, operation)
        if holder == own:
            return f"replica {own} waits for {operation.name}, which it holds itself"
        through = " and is through" if holder is not None and self.pending[holder] is DONE else ""
        return f"replica {own} waits for {operation.name}, which replica {holder} holds{through}"

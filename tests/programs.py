"""Small programs of operations, run in every order one wants: a model of replicas to hold the checker of histories to.

Values count: each variable holds a number for each transaction, how often its update went in, and each write is based
on numbers that were really read before. So what is lost, torn or kept is known by arithmetic, without versions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from trainer.schedule.operations import (
    ABORT,
    ACQUIRE,
    COMPUTE,
    LOCK,
    READ,
    RELEASE,
    UPDATE,
    WRITE,
    Event,
    History,
    Operation,
)

BLIND = "blind"  # a write that is based on nothing
_WRITES = (WRITE, UPDATE, BLIND)


class Do(NamedTuple):
    """One operation of a program."""

    kind: str
    name: str = ""
    step: int = 0


Program = tuple[Do, ...]
Transaction = tuple[int, int]
Counts = dict[Transaction, int]


def program(text: str, step: int = 0) -> Program:
    """`acquire L, read a, read b, compute, write a, release L`."""
    each = (part.split() for part in text.split(",") if part.strip())
    return tuple(Do(kind, *name, step=step) for kind, *name in each)


def steps(text: str, number: int) -> Program:
    """The same again in every step."""
    return tuple(do for step in range(number) for do in program(text, step))


@dataclass
class Run:
    """What a program did in one order.

    Attributes:
        values: variable -> how often each transaction's update is in it at the end.
        snapshots: transaction -> variable -> the values that its gradient was computed from.
    """

    history: History
    values: dict[str, Counts] = field(default_factory=dict)
    snapshots: dict[Transaction, dict[str, Counts]] = field(default_factory=dict)

    @property
    def writers(self) -> dict[str, list[Transaction]]:
        """Who wrote each variable, in order."""
        found: dict[str, list[Transaction]] = {}
        for event in self.history.events:
            if event.operation.kind in (WRITE, UPDATE):
                found.setdefault(event.operation.name, []).append((event.replica, event.step))
        return found

    @property
    def torn(self) -> bool:
        """Whether some snapshot has an update of another replica in one variable and not in another.

        Exact where a transaction writes all variables and every snapshot comes before its own writes.
        """
        return any(
            len({counts.get(writer, 0) for counts in snapshot.values()}) > 1
            for snapshot in self.snapshots.values()
            for writer in {writer for counts in snapshot.values() for writer in counts}
        )

    @property
    def overtaken(self) -> bool:
        """Whether two transactions wrote two variables in opposite orders."""
        before = {
            (one, other)
            for writers in self.writers.values()
            for index, one in enumerate(writers)
            for other in writers[index + 1 :]
            if one != other
        }
        return any((other, one) in before for one, other in before)


def orders(programs: Sequence[Program]) -> Iterator[tuple[int, ...]]:
    """Every order in which the programs can go on to their ends, as who goes next. Marks are no decisions."""
    counted = [[do for do in each if do.kind not in (COMPUTE, ABORT)] for each in programs]
    at = [0] * len(programs)
    held: dict[str, int] = {}
    order: list[int] = []

    def able(own: int) -> bool:
        if at[own] == len(counted[own]):
            return False
        do = counted[own][at[own]]
        return do.kind != ACQUIRE or do.name not in held

    def explore() -> Iterator[tuple[int, ...]]:
        could = [own for own in range(len(programs)) if able(own)]
        if not could and all(at[own] == len(each) for own, each in enumerate(counted)):
            yield tuple(order)
        for own in could:
            do = counted[own][at[own]]
            if do.kind == ACQUIRE:
                held[do.name] = own
            elif do.kind == RELEASE:
                del held[do.name]
            at[own] += 1
            order.append(own)
            yield from explore()
            order.pop()
            at[own] -= 1
            if do.kind == ACQUIRE:
                del held[do.name]
            elif do.kind == RELEASE:
                held[do.name] = own

    return explore()


def run(programs: Sequence[Program], order: Sequence[int]) -> Run:
    """Run the programs in an order; marks are made as soon as what stands before them was done."""
    machine = _Machine(len(programs))
    at = [0] * len(programs)

    def marks(own: int) -> None:
        while at[own] < len(programs[own]) and programs[own][at[own]].kind in (COMPUTE, ABORT):
            machine.do(own, programs[own][at[own]])
            at[own] += 1

    for own in range(len(programs)):
        marks(own)
    for own in order:
        machine.do(own, programs[own][at[own]])
        at[own] += 1
        marks(own)
    return machine.run


class _Machine:
    def __init__(self, num_replicas: int) -> None:
        self.run = Run(History(num_replicas))
        self._versions: dict[str, int] = {}
        # Per replica and variable: the version and the values that it read last in its step.
        self._read: list[dict[str, tuple[int, Counts]]] = [{} for _ in range(num_replicas)]
        self._step = [0] * num_replicas

    def do(self, own: int, do: Do) -> None:
        if do.step != self._step[own]:
            self._step[own] = do.step
            self._read[own].clear()
        by, name, values = (own, do.step), do.name, self.run.values
        if do.kind == READ:
            version = self._versions.get(name, 0)
            self._read[own][name] = (version, dict(values.get(name, {})))
            self._note(own, do, READ, (version,))
        elif do.kind in _WRITES:
            current = (self._versions.get(name, 0), values.get(name, {}))
            nothing: tuple[int, Counts] = (-1, {})
            base, before = {UPDATE: current, WRITE: self._read[own].get(name, nothing), BLIND: nothing}[do.kind]
            values[name] = {**before, by: before.get(by, 0) + 1}
            self._versions[name] = self._versions.get(name, 0) + 1
            self._read[own][name] = (self._versions[name], dict(values[name]))
            self._note(own, do, WRITE if do.kind == BLIND else do.kind, (self._versions[name],), (base,))
        else:
            if do.kind == COMPUTE:
                self.run.snapshots[by] = {name: counts for name, (_, counts) in self._read[own].items()}
            self.run.history.events.append(Event(own, do.step, Operation(do.kind, name, (name,), LOCK)))

    def _note(self, own: int, do: Do, kind: str, versions: tuple[int, ...], bases: tuple[int, ...] = ()) -> None:
        self.run.history.events.append(Event(own, do.step, Operation(kind, do.name, (do.name,)), versions, bases))

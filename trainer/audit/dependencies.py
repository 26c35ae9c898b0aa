"""The direct serialization graph over a history's transactions, and the shortest cycles in it. Standard library only.

An edge says that one transaction comes before another in any one order that explains what both did:

    ww: the second wrote the version after the first's.
    wr: the second read what the first wrote.
    rw: the first read a version, and the second wrote the next one (anti-dependency).

Aborted transactions are not in it. An edge through a read that is a snapshot and nothing else is kept apart, since a
gradient from an older snapshot is late, not wrong.

Between two transactions only the strongest edge is kept: a cycle goes by the strongest name that fits it.

Source: Adya 1999 and Adya, Liskov and O'Neil 2000 for the graph; Kingsbury and Alvaro 2020 (Elle) for short cycles in
it as witnesses.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from trainer.audit.lineage import Lineage, Read, Transaction, Version

WW, WR, RW = "ww", "wr", "rw"

# Strongest first. Through a base read comes before through a snapshot, but any wr is stronger than any rw.
_RANKS = {(WW, False): 0, (WR, False): 1, (WR, True): 2, (RW, False): 3, (RW, True): 4}


class Edge(NamedTuple):
    """`source` comes before `target`.

    Attributes:
        snapshot: whether it goes through a read that is a snapshot only.
        events: indices of the source's and the target's operation.
        versions: the versions that these two read or wrote.
    """

    kind: str
    source: Transaction
    target: Transaction
    place: str
    snapshot: bool
    events: tuple[int, int]
    versions: tuple[int, int]


def joined(cycle: list[Edge]) -> list[Edge]:
    """The same cycle with writes of one place that follow each other told as one: the first came before the last."""
    turns = (cycle[at:] + cycle[:at] for at in range(len(cycle)))
    begun = next((turn for turn in turns if not _follows(turn[-1], turn[0])), cycle)
    found = begun[:1]
    for edge in begun[1:]:
        last = found[-1]
        if _follows(last, edge):
            events, versions = (last.events[0], edge.events[1]), (last.versions[0], edge.versions[1])
            found[-1] = last._replace(target=edge.target, events=events, versions=versions)
        else:
            found.append(edge)
    return found


def _follows(last: Edge, edge: Edge) -> bool:
    return last.kind == edge.kind == WW and last.place == edge.place


class Kind(NamedTuple):
    """What a cycle is made of.

    Attributes:
        anti_dependencies: rw edges: 0, 1, or 2 for two and more.
        read: whether a wr edge is in it; always True where there are rw edges.
        snapshot: whether it needs an edge through a snapshot.
    """

    anti_dependencies: int
    read: bool
    snapshot: bool


Neighbours = dict[Transaction, dict[Transaction, Edge]]
# Where a way has come to, and what it is made of so far.
_State = tuple[Transaction, Kind]


class Graph:
    """For each two transactions the strongest edge from one to the other.

    Attributes:
        base: edges through base reads and writes only.
        full: those and the ones through snapshots.
    """

    def __init__(self, lineage: Lineage) -> None:
        self.base: Neighbours = {}
        self.full: Neighbours = {}
        self._lineage = lineage
        for versions in lineage.versions.values():
            self._add_writes(versions)
        for read in lineage.reads:
            self._add_read(read)

    def _add_writes(self, versions: list[Version]) -> None:
        aborted, whole = self._lineage.aborted, self._lineage.whole
        before: Version | None = None
        for version in versions:
            if version.number == 0 or version.by in aborted:
                continue
            if before is not None:
                self._add(WW, whole(before.by), whole(version.by), before, version, snapshot=False)
            before = version

    def _add_read(self, read: Read) -> None:
        lineage = self._lineage
        if read.by in lineage.aborted or read.place not in lineage.versions:
            return
        versions = lineage.versions[read.place]
        reader, snapshot = lineage.whole(read.by), not read.base
        if read.version > 0 and versions[read.version].by not in lineage.aborted:
            written = versions[read.version]
            self._add(WR, lineage.whole(written.by), reader, written, read, snapshot=snapshot)
        for following in versions[read.version + 1 :]:
            if following.by not in lineage.aborted:
                self._add(RW, reader, lineage.whole(following.by), read, following, snapshot=snapshot)
                return

    def _add(
        self,
        kind: str,
        source: Transaction,
        target: Transaction,
        first: Version | Read,
        second: Version | Read,
        *,
        snapshot: bool,
    ) -> None:
        if source == target:
            return
        numbers = (
            first.number if isinstance(first, Version) else first.version,
            second.number if isinstance(second, Version) else second.version,
        )
        edge = Edge(kind, source, target, first.place, snapshot, (first.event, second.event), numbers)
        rank = _RANKS[kind, snapshot]
        for neighbours in (self.full,) if snapshot else (self.full, self.base):
            targets = neighbours.setdefault(source, {})
            known = targets.get(target)
            if known is None or rank < _RANKS[known.kind, known.snapshot]:
                targets[target] = edge


def shortest_cycles(neighbours: Neighbours) -> dict[Kind, list[Edge]]:
    """The shortest cycle of each kind that a graph has, as edges each of which begins where the last one ended.

    A graph that has any cycle has one here. A kind is missing where its shortest closed walk meets a transaction twice:
    that walk falls into two cycles of other kinds, which are here.

    Complexity: transactions in cycles x edges between them; nearly always far less, since no way is followed that is as
    long as the cycles that it could become.
    Thread-safety: pure.
    """
    inside = _in_cycles(neighbours)
    if not inside:
        return {}
    search = _Search(neighbours, inside)
    for start in inside:
        search.look_from(start)
    return search.found


def _in_cycles(neighbours: Neighbours) -> list[Transaction]:
    """Transactions that stay when those without an edge from or to what stays are taken away one after another."""
    inside = set(neighbours)
    while True:
        reached = {target for source in inside for target in neighbours[source] if target in inside}
        staying = {source for source in reached if any(target in reached for target in neighbours[source])}
        if len(staying) == len(inside):
            return sorted(inside)
        inside = staying


class _Search:
    """Breadth first, from one transaction after another, through (transaction, what the way there is made of).

    Attributes:
        shortest: kind -> edges of its shortest closed walk so far.
    """

    def __init__(self, neighbours: Neighbours, inside: list[Transaction]) -> None:
        self.found: dict[Kind, list[Edge]] = {}
        self.shortest: dict[Kind, int] = {}
        self._neighbours = neighbours
        self._allowed = set(inside)
        labels = {(edge.kind, edge.snapshot) for source in inside for edge in neighbours[source].values()}
        self._become = _become(frozenset(labels))

    def look_from(self, start: Transaction) -> None:
        """Look at all cycles through a transaction, and take it out of the graph."""
        origin = (start, Kind(0, False, False))
        came_by: dict[_State, tuple[_State, Edge] | None] = {origin: None}
        length, states = 1, [origin]
        while states:
            following: list[_State] = []
            for state in states:
                if self._is_too_long(length, state[1]):
                    continue
                for target, edge in self._neighbours[state[0]].items():
                    if target not in self._allowed:
                        continue
                    kind = _grown(state[1], edge.kind, edge.snapshot)
                    if target == start:
                        self._close(kind, length, _way(state, came_by), edge)
                    elif (target, kind) not in came_by:
                        came_by[target, kind] = (state, edge)
                        following.append((target, kind))
            length, states = length + 1, following
        self._allowed.discard(start)

    def _is_too_long(self, length: int, kind: Kind) -> bool:
        """Whether no cycle of this length that a way could become would be the shortest of its kind."""
        return all(length >= self.shortest.get(each, length + 1) for each in self._become[kind])

    def _close(self, kind: Kind, length: int, way: list[Edge], edge: Edge) -> None:
        if length < self.shortest.get(kind, length + 1):
            self.shortest[kind] = length
            if len({each.source for each in (*way, edge)}) == length:
                self.found[kind] = [*way, edge]


@cache
def _become(labels: frozenset[tuple[str, bool]]) -> dict[Kind, frozenset[Kind]]:
    """What a way of each kind can still become, over edges with these labels."""

    def reached(kind: Kind) -> frozenset[Kind]:
        kinds = {kind}
        while more := {_grown(each, *label) for each in kinds for label in labels} - kinds:
            kinds |= more
        return frozenset(kinds)

    return {kind: reached(kind) for kind in reached(Kind(0, False, False))}


@cache
def _grown(kind: Kind, edge: str, snapshot: bool) -> Kind:
    """What a way is made of with one more edge."""
    if edge == WW:
        return kind
    return Kind(min(2, kind.anti_dependencies + (edge == RW)), True, kind.snapshot or snapshot)


def _way(state: _State, came_by: dict[_State, tuple[_State, Edge] | None]) -> list[Edge]:
    edges: list[Edge] = []
    while (step := came_by[state]) is not None:
        state, edge = step
        edges.append(edge)
    return edges[::-1]

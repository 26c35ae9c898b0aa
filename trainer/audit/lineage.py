"""Who wrote which version of a variable from what, and whose updates every version holds. Standard library only.

A transaction is one replica's step, (replica, step). Its reads have roles, which nobody announces: of each place, the
last read before the transaction's last COMPUTE mark is its **snapshot**, what the gradient was computed from; what an
earlier attempt read is thrown away. What is read after it, what an update adds to and what a write is based on are
**base** reads. One read can be both. A transaction that writes nothing has no base reads: if it does not compute
either, all that it reads is its snapshot.

Source: version orders and transactions are Adya's (1999); that versions are known because the harness records them,
where Elle (Kingsbury and Alvaro 2020) must infer them from values.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple

from trainer.schedule.operations import (
    ABORT,
    COMPUTE,
    CONTRIBUTION,
    LOCK,
    READ,
    UPDATE,
    VARIABLE,
    WRITE,
    Event,
    History,
)

Transaction = tuple[int, int]

# Who wrote version 0, and the replica of a transaction that all replicas make together.
NOBODY: Transaction = (-1, -1)
ALL = -1

_COPY = re.compile(r"^\d+:")


class Version(NamedTuple):
    """One version of one place.

    Attributes:
        event: index of the write or update that installed it; -1 for version 0.
        by: whose step wrote it.
        base: the version it was made from; -1 for nothing.
        holds: the transactions whose updates are in it, a bit each by `Lineage.bits`.
    """

    place: str
    number: int
    event: int
    by: Transaction
    base: int
    holds: int


class Read(NamedTuple):
    """One read of one place that counts, and in which roles. An update's own read has the update's index."""

    event: int
    place: str
    version: int
    by: Transaction
    snapshot: bool
    base: bool


@dataclass
class Lineage:
    """Versions, contributions and reads of a history's variables.

    Attributes:
        versions: place -> its versions, 0 first.
        reads: those that count, a transaction's together.
        aborted: transactions whose writes are not to count.
        computed: transaction -> index of its last COMPUTE mark.
        last_written: transaction as a whole (`whole`) -> place -> the last version that it wrote there.
        apart: indices of the operations on what is neither variable nor lock, by what it is.
        bits: transaction -> its bit in `Version.holds`.
        wrote: place -> the transactions that wrote it, as bits.

    Thread-safety: pure once built.
    """

    history: History
    versions: dict[str, list[Version]] = field(default_factory=dict)
    reads: list[Read] = field(default_factory=list)
    aborted: set[Transaction] = field(default_factory=set)
    computed: dict[Transaction, int] = field(default_factory=dict)
    last_written: dict[Transaction, dict[str, Version]] = field(default_factory=dict)
    apart: dict[str, list[int]] = field(default_factory=dict)
    bits: dict[Transaction, int] = field(default_factory=dict)
    wrote: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _Builder(self).build()

    def whole(self, by: Transaction) -> Transaction:
        """The transaction that a step is part of: where updates are joint, the same step of all replicas."""
        return (ALL, by[1]) if self.history.joint else by

    def kept(self, place: str) -> frozenset[Transaction]:
        """The transactions whose updates the last version of the place holds."""
        return self.transactions(self.versions[place][-1].holds)

    def lost(self, place: str) -> frozenset[Transaction]:
        """The transactions whose updates the last version should hold and does not."""
        return self.transactions(self.expected(place) & ~self.versions[place][-1].holds)

    def expected(self, place: str) -> int:
        """The transactions whose updates the last version should hold, as bits.

        Whoever wrote the place, or another copy of it, and did not abort. Once somebody that computed a gradient wrote
        it, whoever computed one: a step's batch is to be in every variable that steps update.
        """
        writers = self.wrote.get(place, 0)
        if self.history.copies:
            name = variable_in_copy(place)
            for other, bits in self.wrote.items():
                writers |= bits if variable_in_copy(other) == name else 0
        computed = self.mask(self.computed)
        return (writers | (computed if writers & computed else 0)) & ~self.mask(self.aborted)

    def mask(self, transactions: dict[Transaction, int] | set[Transaction]) -> int:
        """The transactions as bits."""
        bits = 0
        for transaction in transactions:
            bits |= self.bit(transaction)
        return bits

    def bit(self, transaction: Transaction) -> int:
        found = self.bits.get(transaction)
        if found is None:
            found = self.bits[transaction] = 1 << len(self.bits)
        return found

    def transactions(self, bits: int) -> frozenset[Transaction]:
        return frozenset(transaction for transaction, bit in self.bits.items() if bits & bit)


def variable_in_copy(place: str) -> str:
    """A place without the copy that it is in: `kernel` for `1:kernel`."""
    return _COPY.sub("", place)


class _Builder:
    """Goes through a history once."""

    def __init__(self, lineage: Lineage) -> None:
        self.lineage = lineage
        # What each transaction read, in order: (index, place, version).
        self.seen: dict[Transaction, list[tuple[int, str, int]]] = {}
        # The reads that writes were based on, where the recorder names none the write itself.
        self.based: dict[Transaction, set[tuple[int, str]]] = {}
        # Under joint updates: when each gradient was there, and whose each transaction read, where that is recorded.
        self.first_computed: dict[Transaction, int] = {}
        self.handed_over: dict[str, list[Transaction]] = {}
        self.taken: dict[Transaction, int] = {}

    def build(self) -> None:
        lineage = self.lineage
        if lineage.history.joint:
            self._find_first_computed()
        for index, event in enumerate(lineage.history.events):
            operation = event.operation
            of = operation.of
            kind = operation.kind
            if kind == COMPUTE:
                lineage.computed[event[:2]] = index
            elif kind == ABORT:
                lineage.aborted.add(event[:2])
            elif of == VARIABLE:
                if kind == READ:
                    seen = self.seen.setdefault(event[:2], [])
                    for place, version in zip(operation.places, event.versions, strict=True):
                        seen.append((index, place, version))
                elif kind in (WRITE, UPDATE):
                    self._install(index, event)
            elif of == CONTRIBUTION:
                self._hand_over(event)
            elif of != LOCK:
                lineage.apart.setdefault(of, []).append(index)
        self._give_roles()

    def _find_first_computed(self) -> None:
        for index, event in enumerate(self.lineage.history.events):
            if event.operation.kind == COMPUTE:
                self.first_computed.setdefault(event[:2], index)

    def _install(self, index: int, event: Event) -> None:
        lineage, by, operation = self.lineage, event[:2], event.operation
        own = self._contributions(index, by)
        written = lineage.last_written.setdefault(lineage.whole(by), {})
        for place, number, base in zip(operation.places, event.versions, event.bases, strict=True):
            versions = lineage.versions.get(place)
            if versions is None:
                versions = lineage.versions[place] = [Version(place, 0, -1, NOBODY, -1, 0)]
            if number != len(versions) or not -1 <= base < number:
                raise ValueError(
                    f"event {index} ({operation.told}) installs version {number} of {place} from {base}, "
                    f"where {len(versions)} is the next."
                )
            holds = own | versions[base].holds if base >= 0 else own
            version = Version(place, number, index, by, base, holds)
            versions.append(version)
            written[place] = version
            lineage.wrote[place] = lineage.wrote.get(place, 0) | lineage.bit(by)
            if base >= 0:
                self._base_on(index, operation.kind, place, base, by)

    def _contributions(self, index: int, by: Transaction) -> int:
        """Whose updates a write adds.

        A joint one adds those whose contributions its writer read; where nobody says what it read, those of all
        replicas, but for those that computed their gradients only afterwards.
        """
        lineage = self.lineage
        if not lineage.history.joint:
            return lineage.bit(by)
        bits = lineage.bit(by)
        if by in self.taken:
            return bits | self.taken[by]
        for replica in range(lineage.history.num_replicas):
            each = (replica, by[1])
            if self.first_computed.get(each, -1) < index:
                bits |= lineage.bit(each)
        return bits

    def _hand_over(self, event: Event) -> None:
        by = event[:2]
        for place, version in zip(event.operation.places, event.versions, strict=True):
            writers = self.handed_over.setdefault(place, [])
            if event.operation.kind != READ:
                writers.append(by)
            elif version > 0:
                self.taken[by] = self.taken.get(by, 0) | self.lineage.bit(writers[version - 1])

    def _base_on(self, index: int, kind: str, place: str, base: int, by: Transaction) -> None:
        """Note which read a write is based on: an update's its own, a write's the last of that version."""
        if kind == WRITE:
            for read in reversed(self.seen.get(by, ())):
                if read[1] == place and read[2] == base:
                    self.based.setdefault(by, set()).add((read[0], place))
                    return
        self.lineage.reads.append(Read(index, place, base, by, snapshot=False, base=True))

    def _give_roles(self) -> None:
        lineage = self.lineage
        for by, seen in self.seen.items():
            based = self.based.get(by, ())
            computed = lineage.computed.get(by)
            # The whole transaction: under joint updates replicas that only wait have written, too.
            writes = lineage.whole(by) in lineage.last_written
            if computed is None:
                lineage.reads += [Read(*read, by, snapshot=not writes, base=writes) for read in seen]
                continue
            snapshot = {read[1]: read[0] for read in seen if read[0] < computed}
            for index, place, version in seen:
                is_snapshot = snapshot.get(place) == index
                is_base = (writes and index > computed) or (index, place) in based
                if is_snapshot or is_base:
                    lineage.reads.append(Read(index, place, version, by, is_snapshot, is_base))

"""Anomalies of a history, by their names in the literature, each with its smallest witness. Standard library only.

What goes wrong through reads that updates are based on breaks `no_lost_updates` or `atomic_updates`; what goes wrong
only through snapshots breaks `no_torn_reads` or `fresh_gradients`. A correct `locked`, whose gradient is of an older
version than its update, is not serializable as Adya has it, and shows nothing here but gradients that are not fresh.

Sources: Adya 1999 and Adya, Liskov and O'Neil 2000 (G0, G1, G-single, G2), Berenson et al. 1995 (lost update, write
skew), Bailis et al. 2014 (fractured read), Kingsbury and Alvaro 2020, Elle (internal inconsistency, the because
sentences), Niu et al. 2011, Hogwild! (staleness).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from trainer.audit import holder_anomalies
from trainer.audit.dependencies import RW, WW, Edge, Graph, Kind, joined, shortest_cycles
from trainer.audit.found import Found, found, told, who
from trainer.audit.lineage import Lineage, Read, Transaction, Version, variable_in_copy
from trainer.schedule.operations import ABORT, READ, History, variable_of

__all__ = ["Found", "anomalies", "guarantees_broken"]


def anomalies(history: History) -> list[Found]:
    """Everything found in a history: one finding for each update lost and each step that read amiss.

    Of cycles, the shortest of each kind.

    Raises:
        ValueError: the history's versions do not follow one another.
    Thread-safety: pure.
    """
    lineage = Lineage(history)
    seen: list[Found] = []
    if lineage.versions:
        for finder in _OF_VARIABLES:
            seen += finder(lineage)
        seen += cycles(lineage, Graph(lineage))
    if lineage.apart:
        seen += holder_anomalies.anomalies(history, lineage.apart)
    return seen


def guarantees_broken(history: History) -> dict[str, list[Found]]:
    """The guarantees that a history breaks, each with what breaks it. Empty for a history with nothing in it."""
    broken: dict[str, list[Found]] = {}
    for each in anomalies(history):
        broken.setdefault(each.guarantee, []).append(each)
    return broken


def lost_updates(lineage: Lineage) -> Iterator[Found]:
    """Updates that are not in the last version of a place, one finding for each update.

    Source: P4 of Berenson et al. 1995, over the whole history.
    """
    missing: dict[Transaction, str] = {}
    for place, versions in lineage.versions.items():
        # Without a set for each place: nearly always nothing is missing.
        bits = lineage.expected(place) & ~versions[-1].holds
        for transaction in lineage.transactions(bits) if bits else ():
            written = lineage.wrote[place] & lineage.bit(transaction)
            if transaction not in missing or (written and _is_dropped(lineage, transaction, missing[transaction])):
                missing[transaction] = place
    for transaction, place in sorted(missing.items()):
        dropped = _is_dropped(lineage, transaction, place)
        yield (_dropped if dropped else _overwritten)(lineage, transaction, place)


def _is_dropped(lineage: Lineage, transaction: Transaction, place: str) -> bool:
    return not lineage.wrote[place] & lineage.bit(transaction)


def _overwritten(lineage: Lineage, loser: Transaction, place: str) -> Found:
    """The write that left the update out: the first after it that a later version goes back to."""
    history, versions = lineage.history, lineage.versions[place]
    lost = next(version for version in reversed(versions) if version.by == loser)
    kept = versions[-1]
    while kept.base > lost.number:
        kept = versions[kept.base]
    events = [lost.event, kept.event]
    writer, owner = who(history, kept.event), told(*loser)
    so = f"so version {kept.number} does not hold replica {loser[0]}'s update"
    if kept.base < 0:
        because = f"{writer} wrote {place} without reading it, over version {lost.number} by {owner}, {so}"
    else:
        read = _read_of(lineage, kept)
        events += [read] if read is not None else []
        because = (
            f"{writer} wrote {place} from version {kept.base}, which it read before {owner} wrote version "
            f"{lost.number}, {so}"
        )
    return found(history, "lost_update", "no_lost_updates", place, events, because)


def _read_of(lineage: Lineage, version: Version) -> int | None:
    """Index of the read that a version is based on."""
    reads = (
        read.event
        for read in lineage.reads
        if (read.by, read.place, read.version) == (version.by, version.place, version.base)
        and read.base
        and read.event < version.event
    )
    return max(reads, default=None)


def _dropped(lineage: Lineage, loser: Transaction, place: str) -> Found:
    """A gradient that never went into a place which other replicas' gradients went into."""
    history, write = lineage.history, lineage.versions[place][-1]
    own = lineage.last_written.get(lineage.whole(loser), {})
    if history.joint and place in own:
        write = own[place]
        because = f"{told(*write.by)} wrote {place} for all without {told(*loser)}, so version {write.number}"
    else:
        because = f"{told(*loser)} never wrote {place}, so version {write.number} of it, the last,"
    computed = lineage.computed.get(loser)
    witness = max(version.event for version in own.values()) if computed is None else computed
    because += f" does not hold replica {loser[0]}'s update"
    return found(history, "dropped_update", "no_lost_updates", place, (witness, write.event), because)


def dirty_reads(lineage: Lineage) -> Iterator[Found]:
    """Reads of what was aborted (G1a) or was not the writer's last word (G1b), one finding a reader and kind.

    An aborted version that is a place's last counts as read: what is left at the end is what the run made.

    Source: Adya, Liskov and O'Neil 2000, G1a and G1b.
    """
    told_of: set[tuple[Transaction, str, bool]] = set()
    # Base reads first: of a reader that did both, the worse is told.
    for read in sorted(lineage.reads, key=lambda read: not read.base):
        if read.version == 0 or read.by in lineage.aborted:
            continue
        version = lineage.versions[read.place][read.version]
        if version.by == read.by:
            continue
        final = lineage.last_written[lineage.whole(version.by)][read.place]
        if version.by in lineage.aborted:
            kind, then = "aborted_read", ", and aborted"
        elif final.number != version.number and lineage.whole(read.by) != lineage.whole(version.by):
            kind, then = "intermediate_read", f" before its last word, version {final.number}"
        else:
            continue
        if (read.by, kind, read.base) not in told_of:
            told_of |= {(read.by, kind, False), (read.by, kind, read.base)}
            yield _dirty(lineage, read, version, kind, then, final)
    yield from _aborted_at_the_end(lineage)


def _dirty(lineage: Lineage, read: Read, version: Version, kind: str, then: str, final: Version) -> Found:
    because = (
        f"{told(*read.by)} {_verb(lineage, read)} {read.place} version {version.number}, which {told(*version.by)} "
        f"wrote{then}"
    )
    events = [version.event, read.event]
    if kind == "intermediate_read":
        events.append(final.event)
    elif (abort := _abort_of(lineage, version.by)) is not None:
        events.append(abort)
    guarantee = "atomic_updates" if read.base else "no_torn_reads"
    return found(lineage.history, kind, guarantee, read.place, events, because)


def _verb(lineage: Lineage, read: Read) -> str:
    return "read" if lineage.history.events[read.event].operation.kind == READ else "updated"


def _abort_of(lineage: Lineage, transaction: Transaction) -> int | None:
    return next(
        (
            index
            for index, event in enumerate(lineage.history.events)
            if event.operation.kind == ABORT and event[:2] == transaction
        ),
        None,
    )


def _aborted_at_the_end(lineage: Lineage) -> Iterator[Found]:
    if not lineage.aborted:
        return
    for place, versions in lineage.versions.items():
        last = versions[-1]
        if last.by in lineage.aborted:
            because = f"{told(*last.by)} aborted, but {place} ends at version {last.number}, which it wrote"
            abort = _abort_of(lineage, last.by)
            events = (last.event, last.event if abort is None else abort)
            yield found(lineage.history, "aborted_read", "atomic_updates", place, events, because)


def fractured_reads(lineage: Lineage) -> Iterator[Found]:
    """Reads that show one transaction's update at one place and not yet at another, one finding a reader and kind.

    Between two pieces of one variable: a torn tensor. Of a step that computed a gradient, its snapshot is looked at; of
    one that did not, all that it read. What updates are based on needs no look of its own: where base reads are
    fractured, there is a cycle through them.

    Source: Bailis et al. 2014 (read atomic isolation).
    """
    events = lineage.history.events
    groups: dict[Transaction, list[Read]] = {}
    for read in lineage.reads:
        if (read.snapshot or read.by not in lineage.computed) and events[read.event].operation.kind == READ:
            groups.setdefault(read.by, []).append(read)
    for by, reads in groups.items():
        if by not in lineage.aborted:
            yield from _fractures(lineage, by, reads)


def _fractures(lineage: Lineage, by: Transaction, reads: list[Read]) -> Iterator[Found]:
    """The first fractured read and the first torn tensor."""
    oldest: dict[str, Read] = {}
    for read in reads:
        if read.place not in oldest or read.version < oldest[read.place].version:
            oldest[read.place] = read
    told_of: set[str] = set()
    for read, new in _of_others(lineage, by, reads):
        writer = lineage.whole(new.by)
        for place, final in lineage.last_written[writer].items():
            old = oldest.get(place)
            if old is None or old.version >= final.number or place == read.place:
                continue
            if lineage.whole(lineage.versions[place][old.version].by) == writer:
                continue  # an intermediate read
            kind = "torn_tensor" if variable_of(place) == variable_of(read.place) else "fractured_read"
            if kind not in told_of:
                told_of.add(kind)
                yield _fractured(lineage, kind, (new, read), (old, final))


def _of_others(lineage: Lineage, by: Transaction, reads: list[Read]) -> Iterator[tuple[Read, Version]]:
    """Reads of what another transaction wrote and did not abort."""
    for read in reads:
        if read.version > 0:
            version = lineage.versions[read.place][read.version]
            if version.by not in lineage.aborted and lineage.whole(version.by) != lineage.whole(by):
                yield read, version


def _fractured(lineage: Lineage, kind: str, after: tuple[Version, Read], before: tuple[Read, Version]) -> Found:
    (new, read), (old, final) = after, before
    because = (
        f"{told(*read.by)} read {new.place} version {new.number}, which {told(*new.by)} wrote, but {old.place} version "
        f"{old.version}, older than version {final.number}, which {told(*final.by)} wrote"
    )
    events = (new.event, read.event, old.event, final.event)
    return found(lineage.history, kind, "no_torn_reads", new.place, events, because)


def internal_inconsistencies(lineage: Lineage) -> Iterator[Found]:
    """Reads of another's version where the reader had written its own before, one finding a reader.

    Source: "internal" of Kingsbury and Alvaro 2020 (Elle).
    """
    told_of: set[Transaction] = set()
    for read in lineage.reads:
        own = lineage.last_written.get(lineage.whole(read.by), {}).get(read.place)
        if own is None or read.by in told_of or lineage.history.events[read.event].operation.kind != READ:
            continue
        versions = lineage.versions[read.place]
        earlier = [each for each in versions if each.by == read.by and each.event < read.event]
        if earlier and versions[read.version].by != read.by:
            told_of.add(read.by)
            because = (
                f"{told(*read.by)} wrote {read.place} version {earlier[-1].number} and then read version "
                f"{read.version}, which {told(*versions[read.version].by)} wrote"
            )
            events = (earlier[-1].event, versions[read.version].event, read.event)
            yield found(lineage.history, "internal_inconsistency", "no_torn_reads", read.place, events, because)


def stale_gradients(lineage: Lineage) -> Iterator[Found]:
    """Steps whose snapshot of a place was no longer its version when they wrote it, one finding a step: the stalest.

    Source: bounded-delay model, Niu et al. 2011 (Hogwild!).
    """
    stalest: dict[Transaction, tuple[Read, Version, list[Version]]] = {}
    for read in lineage.reads:
        if not read.snapshot or read.by in lineage.aborted:
            continue
        own = lineage.last_written.get(lineage.whole(read.by), {}).get(read.place)
        if own is None or own.number <= read.version + 1:
            continue
        between = [
            version
            for version in lineage.versions[read.place][read.version + 1 : own.number]
            if lineage.whole(version.by) != lineage.whole(read.by) and version.by not in lineage.aborted
        ]
        if len(between) > (len(stalest[read.by][2]) if read.by in stalest else 0):
            stalest[read.by] = (read, own, between)
    for by, (read, own, between) in stalest.items():
        number = "1 version" if len(between) == 1 else f"{len(between)} versions"
        because = (
            f"{told(*by)} computed its gradient from {read.place} version {read.version} and wrote version "
            f"{own.number}: {number} by others came between, the first by {told(*between[0].by)}"
        )
        events = (read.event, between[0].event, own.event)
        yield found(
            lineage.history, "stale_gradient", "fresh_gradients", read.place, events, because, versions=len(between)
        )


def diverged_copies(lineage: Lineage) -> Iterator[Found]:
    """Copies of one variable that end with different updates in them, one finding a variable."""
    if not lineage.history.copies:
        return
    first: dict[str, Version] = {}
    told_of: set[str] = set()
    for place, versions in lineage.versions.items():
        name, last = variable_in_copy(place), versions[-1]
        other = first.setdefault(name, last)
        if other.holds == last.holds or name in told_of:
            continue
        told_of.add(name)
        apart = sorted(lineage.transactions(other.holds ^ last.holds))[0]
        one, without = (other, last) if other.holds & lineage.bit(apart) else (last, other)
        because = f"{one.place} ends with the update of {told(*apart)} in it and {without.place} ends without"
        yield found(lineage.history, "divergence", "replicas_identical", name, (one.event, without.event), because)


def joint_information_flow(lineage: Lineage) -> Iterator[Found]:
    """Snapshots that show a joint update which the gradient computed from them is to be part of (G1c), one a reader.

    Seen by itself because the graph takes all replicas' same steps for one transaction.
    """
    told_of: set[Transaction] = set()
    for read in lineage.reads if lineage.history.joint else ():
        if not read.snapshot or read.version == 0 or read.by in told_of:
            continue
        version = lineage.versions[read.place][read.version]
        if version.by != read.by and lineage.whole(version.by) == lineage.whole(read.by):
            told_of.add(read.by)
            because = (
                f"{told(*read.by)} read {read.place} version {version.number}, which {told(*version.by)} wrote for all "
                f"before replica {read.by[0]} had computed its part"
            )
            events = (version.event, read.event)
            yield found(lineage.history, "circular_information_flow", "no_torn_reads", read.place, events, because)


def cycles(lineage: Lineage, graph: Graph) -> Iterator[Found]:
    """The shortest cycle of each kind, through base reads, and where it takes them through snapshots.

    Source: Adya, Liskov and O'Neil 2000 for the kinds; Berenson et al. 1995, A5B, for write skew.
    """
    if not (full := shortest_cycles(graph.full)):
        return
    for kind, edges in shortest_cycles(graph.base).items():
        yield _cycle(lineage, kind, edges)
    for kind, edges in full.items():
        if kind.snapshot:
            yield _cycle(lineage, kind, edges)


def _cycle(lineage: Lineage, kind: Kind, edges: list[Edge]) -> Found:
    edges = joined(edges)
    clauses = [_clause(lineage, edge) for edge in edges]
    so = "the other" if len(edges) == 2 else "the next, and the last before the first"
    because = f"{', '.join(clauses[:-1])}, and {clauses[-1]}: so each comes before {so}"
    events = [event for edge in edges for event in edge.events]
    return found(lineage.history, _name(lineage, kind, edges), _guarantee(kind), edges[0].place, events, because)


def _name(lineage: Lineage, kind: Kind, edges: list[Edge]) -> str:
    if kind.anti_dependencies == 0:
        return "circular_information_flow" if kind.read else "write_cycle"
    if kind.anti_dependencies == 1:
        return "single_anti_dependency"
    skew = len(edges) == 2 and not (
        set(lineage.last_written.get(edges[0].source, ())) & set(lineage.last_written.get(edges[1].source, ()))
    )
    return "write_skew" if skew else "anti_dependency_cycle"


def _guarantee(kind: Kind) -> str:
    if kind.anti_dependencies == 0:
        return "no_torn_reads" if kind.snapshot else "atomic_updates"
    return "fresh_gradients" if kind.snapshot else "no_lost_updates"


def _clause(lineage: Lineage, edge: Edge) -> str:
    before, after = (who(lineage.history, event) for event in edge.events)
    first, second = edge.versions
    if edge.kind == WW:
        return f"{after} wrote {edge.place} version {second} after {before} wrote version {first}"
    if edge.kind == RW:
        return f"{before} read {edge.place} version {first} before {after} wrote version {second}"
    return f"{after} read {edge.place} version {first}, which {before} wrote"


_OF_VARIABLES: tuple[Callable[[Lineage], Iterator[Found]], ...] = (
    lost_updates,
    dirty_reads,
    fractured_reads,
    internal_inconsistencies,
    stale_gradients,
    diverged_copies,
    joint_information_flow,
)

"""What a variable that replicas have counted in says about each guarantee: every element is looked at. NumPy only."""

from __future__ import annotations

import numpy as np

from trainer.audit.findings import Finding, told_copies
from trainer.audit.verdict import Anomaly
from trainer.workloads.counter.ended import Ended, span
from trainer.workloads.counter.found_of_gradients import of_gradients
from trainer.workloads.counter.roles import Reads
from trainer.workloads.counter.ways import GRADIENT, way_of


def find(ended: Ended) -> dict[str, Finding]:
    """What was found, by guarantee."""
    gradient = way_of(ended.config).base == GRADIENT
    return {
        **(of_gradients(ended) if gradient else _of_counts(ended)),
        "no_torn_reads": torn(ended),
        "replicas_identical": differing_copies(ended),
        **waiting(ended),
    }


def _of_counts(ended: Ended) -> dict[str, Finding]:
    why = "an increment is computed from no gradient"
    names = ("fresh_gradients", "joint_gradient", "invariants_kept")
    return {"no_lost_updates": lost_increments(ended), **{name: Finding(why, applies=False) for name in names}}


def lost_increments(ended: Ended) -> Finding:
    """Hold every place of every element of every copy to the number of increments that were made."""
    counted, expected = ended.counted, ended.expected
    copies, elements, places = counted.shape
    finding = Finding(
        f"{ended.kept:,} of {ended.made:,} increments kept"
        + (f" in each of {elements:,} elements" if elements > 1 else "")
        + (f" of {told_copies(copies)}" if copies > 1 else "")
    )
    off = counted != expected
    if not off.any():
        return finding
    at = np.unravel_index(np.abs(counted - expected).argmax(), counted.shape)
    copy, element, place = (int(index) for index in at)
    shows = counted[at]
    # What TensorFlow does not pass on to a copy was never there; what threads lose another one has written over.
    too_few = "dropped_update" if copies > 1 else "overwritten_update"
    kind = "multiplied_update" if shows > expected else too_few
    where = [f"replica {own}: {kept:,} of {expected:,} kept" for own, kept in enumerate(ended.kept_by_place)]
    if places == 1:
        where = [f"{int(off.sum()):,} of {elements:,} elements, which show {span(counted)}"] if elements > 1 else []
    told = f"{shows:,.0f}" if np.isfinite(shows) else "an overflow"
    witness = f"element {element}" + (f" of copy {copy}" if copies > 1 else "")
    witness += f" shows {told} increments" + (f" by replica {place}" if places > 1 else "") + f" after {expected:,}"
    lost = ended.made - sum(ended.kept_by_place)
    finding.anomalies.append(Anomaly(kind, lost, ended.made, ", ".join(where), witness))
    return finding


def torn(ended: Ended) -> Finding:
    """Look for snapshots whose elements show different increments; what is left at the end is the last snapshot."""
    if ended.values.shape[1] < 2:
        return Finding("one element cannot tear", applies=False)
    reads = list(ended.left.reads) if ended.left is not None else []
    last = Reads()
    for copy in ended.values:
        last.add(copy)
    made, found = sum(each.made for each in reads) + last.made, sum(each.torn for each in reads) + last.torn
    told = f"{found:,} of {made:,} snapshots showed elements of different versions"
    if reads:
        beside = sum(each.beside for each in reads)
        told += (
            f": {found - last.torn:,} of {made - last.made:,} by readers, who began {beside:,} of them while others "
            f"counted, and {last.torn:,} of {last.made:,} at the end"
        )
    finding = Finding(told)
    if found:
        firsts = [f"reader {own}, read {each.first}" for own, each in enumerate(reads) if each.first]
        witness = [*firsts, f"copy {last.first} at the end"][0]
        where = ", ".join(f"reader {number}: {each.torn:,}" for number, each in enumerate(reads))
        finding.anomalies.append(
            Anomaly("torn_tensor", found, made, ", ".join(filter(None, [where, f"at the end: {last.torn}"])), witness)
        )
    return finding


def differing_copies(ended: Ended) -> Finding:
    """Compare the copies bit for bit."""
    values = ended.values
    if len(values) == 1:
        return Finding("all replicas share one copy", applies=False)
    off = sum(copy.tobytes() != values[0].tobytes() for copy in values)
    finding = Finding(f"{len(values) - off} of {told_copies(len(values))} with copy 0's bits")
    if off:
        copy, element, place = (int(index) for index in np.argwhere(values != values[0])[0])
        here, there = values[copy, element, place], values[0, element, place]
        counts = f"{here:,.10g} in copy {copy}, {there:,.10g} in copy 0"
        witness = (
            f"element {element}" + (f", increments by replica {place}" if values.shape[2] > 1 else "") + f": {counts}"
        )
        finding.anomalies.append(Anomaly("divergence", off, len(values), "", witness))
    return finding


def waiting(ended: Ended) -> dict[str, Finding]:
    """Whether the replica that waits for zero has come to its end; nothing where the schedule itself tells."""
    if ended.left is None or ended.config.workload.counts != "down":
        return {} if ended.config.controlled else {"no_deadlock": Finding("nobody waits for the count", applies=False)}
    finding = Finding("whoever waits for zero was woken")
    if ended.left.waits_for_ever:
        left, own = ended.values.max(), ended.config.num_replicas - 1
        finding.evidence = f"all {ended.made:,} jobs are counted, {left:,.0f} are left, and nobody is left to count"
        witness = f"replica {own} waits for zero, and the count stays at {left:,.0f}"
        remedy = "update_mode=locked loses no count"
        finding.anomalies.append(Anomaly("deadlock", 1, 1, f"replica {own}", witness, remedy=remedy))
    return {"no_deadlock": finding}

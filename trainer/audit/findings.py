"""What a run's record says about each guarantee: counts and the smallest witness. NumPy only.

A finding is what was seen, whoever claimed what; `judge` sets it against the claims.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from trainer.audit import copies
from trainer.audit.conservation import unconserved
from trainer.audit.gradients import gradient_rows
from trainer.audit.precision import precision_was_off
from trainer.audit.records import FRACTURED, TORN_TENSOR, WHOLE, Floats, RunRecord
from trainer.audit.verdict import Anomaly

# How far an all-reduced gradient may be from the joint one, relative to the latter's norm: the order of additions
# differs, and under mixed precision every layer's rounding does too.
JOINT_TOLERANCE = {"float32": 1e-4, "mixed_bfloat16": 5e-2, "mixed_float16": 1e-2}
# Deep models round more. Then the joint gradient in float32 tells how much: what was applied is about as far from that.
ROUNDINGS = 3
END = ("head", "tail")


@dataclass
class Finding:
    """What was found about one guarantee.

    Attributes:
        checked: whether the run could be asked at all.
        applies: whether the question makes sense for the run.
        anomalies: what was seen against it; none when it held.
    """

    evidence: str
    checked: bool = True
    applies: bool = True
    anomalies: list[Anomaly] = field(default_factory=list)


def not_checked(why: str) -> Finding:
    return Finding(why, checked=False)


def lost_updates(record: RunRecord) -> Finding:
    """Count every replica's updates in the canaries of every variable and copy; with `audit=full` sum every element."""
    if record.copies is None:
        return not_checked("the run did not reach its end")
    expected, layout = record.steps, record.layout
    # [copies, segments, ends, replicas]; a canary that overflowed was multiplied.
    counts = np.nan_to_num(record.copies[:, layout.canaries[layout.transacted]], nan=np.inf, posinf=np.inf)
    kept = copies.kept(record)
    finding = Finding(
        f"{int(kept.sum()):,} of {expected * record.num_replicas:,} updates kept, by the canaries of "
        f"{counts.shape[1]} variables in {told_copies(len(record.copies))}"
    )
    multiplied = counts.max(axis=(0, 1, 2)) > expected
    lost = ~multiplied & (kept < expected)
    never_seen = lost & (_seen(record) == 0)
    for kind, affected in (
        ("multiplied_update", multiplied),
        ("dropped_update", never_seen),
        ("overwritten_update", lost & ~never_seen),
    ):
        if affected.any():
            finding.anomalies.append(_miscounted(record, kind, counts, kept, affected))
    _add_conservation(record, finding)
    return finding


def _seen(record: RunRecord) -> Floats:
    """Per replica, the least of what any copy ever showed of its updates: 0 where one never received any."""
    assert record.copies is not None
    ends = record.copies[:, record.layout.canaries[record.layout.transacted]].max(axis=(1, 2))
    if len(ends) == 1:
        snapshots = [replica.versions[: replica.steps_done].max(axis=0, initial=0) for replica in record.replicas]
        seen: Floats = np.maximum(ends[0], np.max(snapshots, axis=0))
        return seen
    own = np.stack([replica.versions[: replica.steps_done].max(axis=0, initial=0) for replica in record.replicas])
    # Under mirrored a copy for each replica; else for each process, which several replicas read.
    snapshots = own.reshape(len(ends), -1, record.num_replicas).max(axis=1)
    least: Floats = np.maximum(ends, snapshots).min(axis=0)
    return least


def _miscounted(record: RunRecord, kind: str, counts: Floats, kept: Floats, affected: NDArray[np.bool_]) -> Anomaly:
    """The updates of the `affected` replicas that are not kept, and the canary that is furthest off."""
    expected, of = record.steps, record.steps * record.num_replicas
    apart = np.where(affected, np.abs(counts - expected), -1)
    copy, segment, end, replica = (int(index) for index in np.unravel_index(apart.argmax(), counts.shape))
    found = counts[copy, segment, end, replica]
    name = [each.name for each in record.layout.segments if each.kind not in record.layout.apart][segment]
    return Anomaly(
        kind,
        int((expected - kept[affected]).sum()),
        of,
        ", ".join(f"replica {own}: {int(number):,} of {expected:,} kept" for own, number in enumerate(kept)),
        f"after {expected:,} updates by replica {replica}, its {END[end]} canary in "
        f"{name} shows {f'{int(found):,}' if np.isfinite(found) else 'an overflow'}"
        + (f" in copy {copy}" if len(counts) > 1 else ""),
    )


def _add_conservation(record: RunRecord, finding: Finding) -> None:
    off = unconserved(record)
    if off is None:
        return
    if off.of:
        finding.evidence += f"; {off.count:,} of {off.of:,} elements off the sum of all updates by more than rounding"
    if off.untold:
        finding.evidence += f"; {off.untold:,} elements are not finite, nor is the sum of all updates to them"
    if off.count:
        where = ", ".join(f"{name}: {count:,}" for name, count in off.where.items())
        witness = f"element {off.element} of {off.variable} in copy {off.copy} is off by {off.off:.3g}"
        finding.anomalies.append(Anomaly("unconserved_element", off.count, off.of, where, witness))


def torn_reads(record: RunRecord) -> Finding:
    """Look for snapshots whose canaries are not all of one version.

    A mix that a mode wrote back into the shared values shows in every snapshot after it, and counts in each.
    """
    states = np.concatenate([replica.read_state[: replica.steps_done] for replica in record.replicas])
    mixed = int((states != WHOLE).sum())
    finding = Finding(f"{mixed:,} of {len(states):,} snapshots mixed versions, by their canaries")
    for kind, state in (("fractured_read", FRACTURED), ("torn_tensor", TORN_TENSOR)):
        count = int((states == state).sum())
        if count:
            where = ", ".join(
                f"replica {replica.replica_id}: {int((replica.read_state[: replica.steps_done] == state).sum()):,}"
                for replica in record.replicas
            )
            finding.anomalies.append(Anomaly(kind, count, len(states), where, _torn_witness(record)))
    return finding


def _torn_witness(record: RunRecord) -> str:
    """The earliest mixed snapshot: two places in it that show different counts of one replica's updates."""
    witnesses = [(replica.torn_witness, replica.replica_id) for replica in record.replicas if replica.torn_witness]
    (step, canaries), reader = min(witnesses, key=lambda witness: witness[0][0])
    writer = int(np.argmax((canaries != canaries[:1, :1]).any(axis=(0, 1))))
    names = [segment.name for segment in record.layout.read_segments if segment.kind not in record.layout.apart]

    def place(flat: np.intp) -> tuple[str, int]:
        segment, end = np.unravel_index(flat, canaries.shape[:2])
        return f"{END[int(end)]} of {names[int(segment)]}", int(canaries[segment, end, writer])

    least, most = place(canaries[:, :, writer].argmin()), place(canaries[:, :, writer].argmax())
    return (
        f"replica {reader}, step {step}: {least[1]:,} updates by replica {writer} at the {least[0]}, "
        f"{most[1]:,} at the {most[0]}"
    )


def update_order(record: RunRecord, *, own_copies: bool) -> Finding:
    """Look for two snapshots that saw two replicas' updates in opposite orders.

    With one order of updates, the versions that snapshots show form a chain: of any two, one has at least as many of
    everybody's updates as the other. That holds only while counts never fall, so not where updates were overwritten.
    """
    if record.copies is None:
        return not_checked("the run did not reach its end")
    groups = [[replica] for replica in record.replicas] if own_copies else [record.replicas]
    if not own_copies and (record.copies[0][_read_canaries(record)].min(axis=(0, 1)) < record.steps).any():
        return not_checked("counts cannot tell the order of updates once some are overwritten")
    num_snapshots = 0
    for group in groups:
        rows = [
            replica.versions[: replica.steps_done][replica.read_state[: replica.steps_done] == WHOLE]
            for replica in group
        ]
        rows += [replica.torn_witness[1].reshape(-1, record.num_replicas) for replica in group if replica.torn_witness]
        seen = np.unique(np.concatenate(rows), axis=0)
        num_snapshots += sum(len(row) for row in rows)
        seen = seen[np.argsort(seen.sum(axis=1), kind="stable")]
        falls = (np.diff(seen, axis=0) < 0).any(axis=1)
        if falls.any():
            at = int(np.argmax(falls))
            one, other = (tuple(int(count) for count in seen[row]) for row in (at, at + 1))
            witness = f"updates seen of each replica: {one} in one place, {other} in another; neither came first"
            anomaly = Anomaly("write_cycle", int(falls.sum()), len(seen), "snapshots' versions", witness)
            return Finding("two snapshots saw updates in opposite orders", anomalies=[anomaly])
    return Finding(
        f"the versions of {num_snapshots:,} snapshots form {'one chain each copy' if own_copies else 'one chain'}"
    )


def _read_canaries(record: RunRecord) -> NDArray[np.int64]:
    layout = record.layout
    found: NDArray[np.int64] = layout.read_canaries[layout.transacted[: len(layout.read_segments)]]
    return found


def staleness(record: RunRecord) -> Finding:
    """Count updates whose gradient was no longer of the current version when it was written."""
    values = recorded_staleness(record)
    if not len(values):
        return not_checked("no update was made")
    late = int((values > 0).sum())
    spread = f"staleness mean {values.mean():.2f}, max {values.max()}"
    finding = Finding(f"{late:,} of {len(values):,} updates came after others' ({spread})")
    if late:
        worst = max(record.replicas, key=lambda replica: int(replica.staleness[: replica.steps_done].max(initial=-1)))
        step = int(worst.staleness[: worst.steps_done].argmax())
        finding.anomalies.append(
            Anomaly(
                "stale_gradient",
                late,
                len(values),
                spread,
                f"replica {worst.replica_id}, step {step}: {int(worst.staleness[step])} updates by others landed "
                "between its snapshot and its write",
            )
        )
    return finding


def recorded_staleness(record: RunRecord) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    """Staleness of every update of every replica, where recorded."""
    values = np.concatenate([replica.staleness[: replica.steps_done] for replica in record.replicas])
    found: np.ndarray[tuple[int], np.dtype[np.int32]] = values[values >= 0]
    return found


def joint_gradient(record: RunRecord, precision: str) -> Finding:
    """Hold what was applied to the joint batch's gradient, computed after the run at the same weights."""
    left_out = _without_joint(record)
    rows = [row for row in gradient_rows(record) if row.step not in left_out]
    errors = [(error, row.step, own) for row in rows for own, error in row.errors.items()]
    if not errors:
        why = "every step that was kept overflowed or computed in another precision" if left_out else "none was kept"
        return not_checked(f"no gradient to hold it to: {why}")
    tolerance = JOINT_TOLERANCE[precision]
    rounding = {(row.step, own): value for row in rows for own, value in row.rounding.items()}
    allowed = {place: max(tolerance, ROUNDINGS * value) for place, value in rounding.items()}
    off = [found for found in errors if not found[0] <= allowed.get(found[1:], tolerance)]
    finding = Finding(
        f"largest relative error {max(errors)[0]:.1e} over {len(errors)} references, tolerance {tolerance:.0e}"
        + (
            f", or {ROUNDINGS} times the joint gradient's own rounding, {max(rounding.values()):.1e}"
            if rounding
            else ""
        )
        + told_skipped(record)
    )
    if off:
        error, step, own = max(off)
        witness = f"replica {own}, step {step}: relative error {error:.2g}{_told_multiple(record, off, tolerance)}"
        finding.anomalies.append(Anomaly("not_joint", len(off), len(errors), "applied gradients", witness))
    return finding


def _told_multiple(record: RunRecord, off: Sequence[tuple[float, int, int]], tolerance: float) -> str:
    """That all applied gradients which are off are the joint one times one number, where they are."""
    rows = {row.step: row for row in gradient_rows(record)}
    multiples = [rows[step].multiples[own] for _, step, own in off if own in rows[step].multiples]
    factors = [factor for factor, _ in multiples]
    alike = max(factors, default=0.0) - min(factors, default=0.0) <= tolerance * abs(max(factors, default=0.0))
    if len(multiples) < len(off) or not alike or any(distance > tolerance for _, distance in multiples):
        return ""
    return f"; every one is {np.mean(factors):.3g} times the joint gradient"


def _without_joint(record: RunRecord) -> set[int]:
    """Steps whose joint gradient nothing can be held to, among those that were kept.

    Some replica computed in another precision than asked, or was asked for another one than the others, as a first call
    is; or its gradients overflowed, so that the update was skipped.
    """
    kept = {each.step for each in record.references}
    steps = {each.step for each in record.references if precision_was_off(record, each)}
    steps |= {step for step in kept if len({each.asked for each in record.references if each.step == step}) > 1}
    return steps | {step for step in kept if any(replica.loss_scale[step, 1] > 0 for replica in record.replicas)}


def diverged_copies(record: RunRecord) -> Finding:
    """Compare the copies bit for bit, optimizer slots included."""
    if record.copies is None:
        return not_checked("the run did not reach its end")
    kinds = copies.transacted(record)
    found, apart = copies.digests(record, kinds), copies.divergence(record, kinds)
    off = sum(digest != found[0] for digest in found)
    finding = Finding(
        f"{len(found) - off} of {told_copies(len(found))} with copy 0's digest, largest difference {apart:.3g}"
        + _told_before(record)
    )
    if record.digests_off:
        finding.anomalies.append(_early_divergence(record))
    if off:
        witness = "; ".join(f"copy {index}: sha256 {digest[:12]}" for index, digest in enumerate(found[:4]))
        finding.anomalies.append(Anomaly("divergence", off, len(found), f"copies differ by up to {apart:.3g}", witness))
    return finding


def _told_before(record: RunRecord) -> str:
    """What processes have seen of each other's copies before the end."""
    said = ""
    if record.digests_compared:
        alike = record.digests_compared - len(record.digests_off)
        said += f"; alike {alike:,} of {record.digests_compared:,} times before, by their digests"
    if record.averages:
        largest, relative = apart_at_averages(record)
        said += (
            f"; claimed at the {len(record.averages):,} averages only: just before one, a process was up to "
            f"{largest:.3g} off the mean, {relative:.3g} of what that had moved"
        )
    return said


def apart_at_averages(record: RunRecord) -> tuple[float, float]:
    """The largest difference before any average, and the largest relative one."""
    return max(each.largest for each in record.averages), max(each.relative for each in record.averages)


def _early_divergence(record: RunRecord) -> Anomaly:
    first = record.digests_off[0]
    off = [rank for rank, digest in enumerate(first.found) if digest != first.found[0]]
    who = ", ".join(f"process {rank}" for rank in off)
    witness = f"before step {first.step} process 0 has digest {first.found[0]}, process {off[0]} {first.found[off[0]]}"
    count, of = len(record.digests_off), record.digests_compared
    return Anomaly("digest_off", count, of, f"{who} first, before step {first.step}", witness)


def differing_outcomes(outcomes: Sequence[str]) -> Finding:
    """Compare the digests in which the run and its repetitions ended."""
    if len(outcomes) < 2:
        return not_checked("the run was made once; audit.repeat=2 makes it again")
    distinct = len(set(outcomes))
    finding = Finding(f"{distinct} distinct outcome{'s' if distinct > 1 else ''} of {len(outcomes)} runs")
    if distinct > 1:
        off = sum(outcome != outcomes[0] for outcome in outcomes)
        witness = f"sha256 {outcomes[0][:12]} and {next(each for each in outcomes if each != outcomes[0])[:12]}"
        finding.anomalies.append(Anomaly("different_bits", off, len(outcomes), "the copies at the end", witness))
    return finding


def told_copies(number: int) -> str:
    return "1 copy" if number == 1 else f"{number} copies"


def told_skipped(record: RunRecord) -> str:
    skipped = record.references_skipped
    return f"; {skipped:,} more steps were beyond audit.reference_mebibytes" if skipped else ""

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
from trainer.audit.precision import gradient_dtypes
from trainer.audit.records import FRACTURED, TORN_TENSOR, WHOLE, Floats, RunRecord
from trainer.audit.verdict import Anomaly, PrecisionRow

# How far an all-reduced gradient may be from the joint one, relative to the latter's norm: the order of additions
# differs, and under bfloat16 every layer's rounding does too.
JOINT_TOLERANCE = {"float32": 1e-4, "mixed_bfloat16": 5e-2}
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


def _not_checked(why: str) -> Finding:
    return Finding(why, checked=False)


def lost_updates(record: RunRecord) -> Finding:
    """Count every replica's updates in the canaries of every variable and copy; with `audit=full` sum every element."""
    if record.copies is None:
        return _not_checked("the run did not reach its end")
    expected, layout = record.steps, record.layout
    # [copies, segments, ends, replicas]; a canary that overflowed was multiplied.
    counts = np.nan_to_num(record.copies[:, layout.canaries], nan=np.inf, posinf=np.inf)
    kept = copies.kept(record)
    finding = Finding(
        f"{int(kept.sum()):,} of {expected * record.num_replicas:,} updates kept, by the canaries of "
        f"{len(layout.segments)} variables in {_copies(len(record.copies))}"
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
    ends = record.copies[:, record.layout.canaries].max(axis=(1, 2))
    if len(ends) == 1:
        snapshots = [replica.versions[: replica.steps_done].max(axis=0, initial=0) for replica in record.replicas]
        seen: Floats = np.maximum(ends[0], np.max(snapshots, axis=0))
        return seen
    own = [replica.versions[: replica.steps_done].max(axis=0, initial=0) for replica in record.replicas]
    least: Floats = np.min([np.maximum(end, snapshot) for end, snapshot in zip(ends, own, strict=True)], axis=0)
    return least


def _miscounted(record: RunRecord, kind: str, counts: Floats, kept: Floats, affected: NDArray[np.bool_]) -> Anomaly:
    """The updates of the `affected` replicas that are not kept, and the canary that is furthest off."""
    expected, of = record.steps, record.steps * record.num_replicas
    apart = np.where(affected, np.abs(counts - expected), -1)
    copy, segment, end, replica = (int(index) for index in np.unravel_index(apart.argmax(), counts.shape))
    found = counts[copy, segment, end, replica]
    return Anomaly(
        kind,
        int((expected - kept[affected]).sum()),
        of,
        ", ".join(f"replica {own}: {int(number):,} of {expected:,} kept" for own, number in enumerate(kept)),
        f"after {expected:,} updates by replica {replica}, its {END[end]} canary in "
        f"{record.layout.segments[segment].name} shows {f'{int(found):,}' if np.isfinite(found) else 'an overflow'}"
        + (f" in copy {copy}" if len(counts) > 1 else ""),
    )


def _add_conservation(record: RunRecord, finding: Finding) -> None:
    off = unconserved(record)
    if off is None:
        return
    finding.evidence += f"; {off.count:,} of {off.of:,} elements off the sum of all updates by more than rounding"
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
    names = [segment.name for segment in record.layout.read_segments]

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
        return _not_checked("the run did not reach its end")
    groups = [[replica] for replica in record.replicas] if own_copies else [record.replicas]
    if not own_copies and (record.copies[0][record.layout.read_canaries].min(axis=(0, 1)) < record.steps).any():
        return _not_checked("counts cannot tell the order of updates once some are overwritten")
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


def staleness(record: RunRecord) -> Finding:
    """Count updates whose gradient was no longer of the current version when it was written."""
    values = recorded_staleness(record)
    if not len(values):
        return _not_checked("no update was made")
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
    errors = [(error, row.step, own) for row in gradient_rows(record) for own, error in row.errors.items()]
    if not errors:
        return _not_checked("no reference was kept")
    tolerance = JOINT_TOLERANCE[precision]
    off = [found for found in errors if not found[0] <= tolerance]
    worst, step, own = max(errors)
    finding = Finding(
        f"largest relative error {worst:.1e} over {len(errors)} references, tolerance {tolerance:.0e}"
        + _skipped(record)
    )
    if off:
        witness = f"replica {own}, step {step}: relative error {worst:.2g}"
        finding.anomalies.append(Anomaly("not_joint", len(off), len(errors), "applied gradients", witness))
    return finding


def mixed_gradients(record: RunRecord) -> Finding:
    """Compare each reference's gradient with itself computed again, bit for bit."""
    done = [reference for reference in record.references if reference.recomputed is not None]
    if not done:
        return _not_checked("no gradient was computed again")
    off = [
        reference
        for reference in done
        if not np.array_equal(_bits(reference.recomputed), _bits(reference.contribution))
    ]
    finding = Finding(
        f"{len(done) - len(off)} of {len(done)} gradients had the same bits when computed again" + _skipped(record)
    )
    if off:
        assert off[0].recomputed is not None
        apart = float(np.abs(off[0].recomputed - off[0].contribution).max())
        witness = f"replica {off[0].replica_id}, step {off[0].step}: differs by up to {apart:.2g}"
        finding.anomalies.append(Anomaly("mixed_gradient", len(off), len(done), "references", witness))
    return finding


def diverged_copies(record: RunRecord) -> Finding:
    """Compare the copies bit for bit, optimizer slots included."""
    if record.copies is None:
        return _not_checked("the run did not reach its end")
    found, apart = copies.digests(record), copies.divergence(record)
    off = sum(digest != found[0] for digest in found)
    finding = Finding(
        f"{len(found) - off} of {_copies(len(found))} with copy 0's digest, largest difference {apart:.3g}"
    )
    if off:
        witness = "; ".join(f"copy {index}: sha256 {digest[:12]}" for index, digest in enumerate(found[:4]))
        finding.anomalies.append(Anomaly("divergence", off, len(found), f"copies differ by up to {apart:.3g}", witness))
    return finding


def differing_outcomes(outcomes: Sequence[str]) -> Finding:
    """Compare the digests in which the run and its repetitions ended."""
    if len(outcomes) < 2:
        return _not_checked("the run was made once; audit.repeat=2 makes it again")
    distinct = len(set(outcomes))
    finding = Finding(f"{distinct} distinct outcome{'s' if distinct > 1 else ''} of {len(outcomes)} runs")
    if distinct > 1:
        off = sum(outcome != outcomes[0] for outcome in outcomes)
        witness = f"sha256 {outcomes[0][:12]} and {next(each for each in outcomes if each != outcomes[0])[:12]}"
        finding.anomalies.append(Anomaly("different_bits", off, len(outcomes), "the copies at the end", witness))
    return finding


def computed_precision(record: RunRecord, asked: str) -> tuple[Finding, list[PrecisionRow]]:
    """Set the dtype read off activations and kernels' gradients against the one that was asked for."""
    rows = [
        PrecisionRow(
            replica.replica_id,
            asked,
            dict(replica.computed),
            replica.steps_done,
            sum(steps for dtype, steps in replica.computed.items() if dtype not in (asked, "undetermined")),
        )
        for replica in record.replicas
    ]
    read = sum(steps for row in rows for dtype, steps in row.computed.items() if dtype != "undetermined")
    if not read:
        return _not_checked("no activation could be read"), rows
    gradients = [
        (reference, name, dtype)
        for reference in record.references
        for name, dtype in gradient_dtypes(record.layout, reference).items()
        if dtype != "undetermined"
    ]
    steps_off, wrong = sum(row.steps_off for row in rows), [found for found in gradients if found[2] != asked]
    finding = Finding(
        f"{asked} in {read - steps_off:,} of {read:,} steps' activations and "
        f"{len(gradients) - len(wrong):,} of {len(gradients):,} kernel gradients"
    )
    if steps_off:
        off = next(row for row in rows if row.steps_off)
        computed = ", ".join(f"{dtype} in {steps} steps" for dtype, steps in off.computed.items())
        witness = f"replica {off.replica} computed in {computed}"
        where = ", ".join(f"replica {row.replica}: {row.steps_off}" for row in rows)
        finding.anomalies.append(Anomaly("precision_off", steps_off, read, where, witness))
    if wrong:
        reference, name, dtype = wrong[0]
        witness = f"replica {reference.replica_id}, step {reference.step}: gradient of {name} computed in {dtype}"
        finding.anomalies.append(
            Anomaly("gradient_precision_off", len(wrong), len(gradients), "kernel gradients", witness)
        )
    return finding, rows


def _bits(vector: Floats | None) -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
    assert vector is not None
    return np.ascontiguousarray(vector).view(np.uint32)


def _copies(number: int) -> str:
    return "1 copy" if number == 1 else f"{number} copies"


def _skipped(record: RunRecord) -> str:
    skipped = record.references_skipped
    return f"; {skipped:,} more steps were beyond audit.reference_mebibytes" if skipped else ""

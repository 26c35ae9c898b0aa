"""What a run's record says about the precision that replicas computed in, and about first calls. NumPy only."""

from __future__ import annotations

from collections import Counter

import numpy as np
from numpy.typing import NDArray

from trainer.audit.findings import Finding, not_checked
from trainer.audit.precision import gradient_dtypes
from trainer.audit.records import DTYPES, Reference, ReplicaRecord, RunRecord
from trainer.audit.verdict import Anomaly, PrecisionRow


def computed_precision(record: RunRecord) -> tuple[Finding, list[PrecisionRow]]:
    """Set the dtypes read off activations and gradients against those that were asked for, step by step."""
    rows = [_precision_row(replica) for replica in record.replicas]
    read = sum(steps for row in rows for dtype, steps in row.computed.items() if dtype != "undetermined")
    if not read:
        return not_checked("no activation could be read"), rows
    gradients = [_gradients_off(replica) for replica in record.replicas]
    wrong_gradients, read_gradients = (int(sum(each)) for each in zip(*gradients, strict=True))
    kept = [
        (reference, name, dtype)
        for reference in record.references
        for name, dtype in gradient_dtypes(record, reference).items()
        if dtype != "undetermined" and reference.contribution.any() and not _mixed(record, reference)
    ]
    wrong_kept = [found for found in kept if found[2] != found[0].asked]
    steps_off = sum(row.steps_off for row in rows)
    finding = Finding(
        f"as asked in {read - steps_off:,} of {read:,} steps' activations, {read_gradients - wrong_gradients:,} of "
        f"{read_gradients:,} steps' last kernel's gradients and {len(kept) - len(wrong_kept):,} of {len(kept):,} "
        "kernels' gradients that were kept whole" + (f"; {record.frozen}" if record.frozen else "")
    )
    if steps_off:
        off = next(row for row in rows if row.steps_off)
        computed = ", ".join(f"{dtype} in {steps} steps" for dtype, steps in off.computed.items())
        witness = f"replica {off.replica}, asked for {off.asked}, computed in {computed}{_modes(off)}"
        where = ", ".join(f"replica {row.replica}: {row.steps_off}" for row in rows)
        finding.anomalies.append(Anomaly("precision_off", steps_off, read, where, witness))
    if wrong_gradients or wrong_kept:
        finding.anomalies.append(_gradient_anomaly(record, wrong_gradients, read_gradients, wrong_kept))
    if record.mode_left is not None:
        witness = f"{record.mode_left} is on in the main thread after everybody has left their scopes"
        finding.anomalies.append(Anomaly("mode_left_on", 1, 1, "after the run", witness))
    return finding, rows


def _precision_row(replica: ReplicaRecord) -> PrecisionRow:
    done = replica.computed.total()
    computed, asked = replica.computed_in[:done], replica.column("asked")
    off = (computed != asked) & (computed != 0)
    # A first call is asked for float32; what a replica is asked for is what most of its steps are.
    usual = int(np.bincount(asked).argmax()) if done else 1
    return PrecisionRow(
        replica.replica_id,
        DTYPES[usual],
        dict(replica.computed),
        replica.steps_done,
        int(off.sum()),
        gradients=_count(_gradients_in(replica)),
        mode_at_entry=_count(replica.column("entry"), none="none"),
        mode_at_exit=_count(replica.column("exit"), none="none"),
    )


def _count(codes: NDArray[np.generic], none: str = "undetermined") -> dict[str, int]:
    counts = Counter(codes.tolist())
    return {DTYPES[code] if code else none: number for code, number in sorted(counts.items())}


def _modes(row: PrecisionRow) -> str:
    entry, left = (", ".join(modes) for modes in (row.mode_at_entry, row.mode_at_exit))
    return (
        f"; mode at entry {entry}, at exit {left}" if entry != left or entry != "none" else "; no mode was on at entry"
    )


def _gradients_off(replica: ReplicaRecord) -> tuple[int, int]:
    """Steps whose gradient was computed in another dtype than asked, and steps whose gradient tells."""
    found = _gradients_in(replica)
    return int(((found != replica.column("asked")) & (found != 0)).sum()), int((found != 0).sum())


def _gradients_in(replica: ReplicaRecord) -> NDArray[np.generic]:
    """Codes of the dtypes read off gradients; none off one that another's was added to: a sum has other bits."""
    done = replica.computed.total()
    return np.where(replica.column("mixed")[:done] == 1, 0, replica.gradients_in[:done])


def _mixed(record: RunRecord, reference: Reference) -> bool:
    return bool(record.replicas[reference.replica_id].column("mixed")[reference.step] == 1)


def _gradient_anomaly(
    record: RunRecord, wrong: int, read: int, wrong_kept: list[tuple[Reference, str, str]]
) -> Anomaly:
    if wrong:
        replica = next(each for each in record.replicas if _gradients_off(each)[0])
        found, asked = _gradients_in(replica), replica.column("asked")
        step = int(np.argmax((found != asked) & (found != 0)))
        witness = (
            f"replica {replica.replica_id}, step {step}: asked for {DTYPES[asked[step]]}, gradient of the last kernel"
        )
        return Anomaly(
            "gradient_precision_off", wrong, read, "last kernel", f"{witness} computed in {DTYPES[found[step]]}"
        )
    reference, name, dtype = wrong_kept[0]
    witness = f"replica {reference.replica_id}, step {reference.step}: gradient of {name} computed in {dtype}"
    return Anomaly("gradient_precision_off", len(wrong_kept), len(wrong_kept), "gradients kept whole", witness)


def first_calls(record: RunRecord) -> Finding:
    """Count how often the first call was made."""
    made = {replica.replica_id: int((replica.column("first_call") == 1).sum()) for replica in record.replicas}
    total = record.first_calls + sum(made.values())
    by = "by the main thread" if record.first_calls else "by replicas"
    each = " of each process" if record.num_processes > 1 and record.first_calls else ""
    finding = Finding(f"the first call was made {total} time{'' if total == 1 else 's'}, {by}{each}")
    if total != 1:
        who = ", ".join(f"replica {own}" for own, times in made.items() if times)
        anomaly = Anomaly("repeated_first_call", max(1, total - 1), record.num_replicas, who, f"{who} made it")
        finding.anomalies.append(anomaly)
    return finding

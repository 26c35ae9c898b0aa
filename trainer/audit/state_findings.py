"""What a run's record says about the state holders but precision: counts and the smallest witness. NumPy only."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trainer.audit.findings import Finding, not_checked, told_copies, told_skipped
from trainer.audit.precision import precision_was_off
from trainer.audit.records import Floats, Reference, ReplicaRecord, RunRecord
from trainer.audit.verdict import Anomaly
from trainer.state.loss_scale import NEVER, next_state


def _not_applicable(why: str) -> Finding:
    return Finding(why, applies=False)


# Gradients.


def mixed_gradients(record: RunRecord, *, repeatable: bool) -> Finding:
    """Compare gradients with themselves computed again, bit for bit; and those that were read back with those put.

    Args:
        repeatable: whether the step can be made again: not once the random numbers that it drew are gone.
    """
    finding = _read_back(record)
    if not repeatable:
        why = "the random numbers of a step are gone, so it cannot be computed again"
        return finding or not_checked(why)
    done = [
        reference
        for reference in record.references
        if reference.recomputed is not None and not precision_was_off(record, reference)
    ]
    if not done:
        return finding or not_checked("no gradient was computed again")
    off = [reference for reference in done if not _same(record, reference)]
    again = f"{len(done) - len(off)} of {len(done)} gradients had the same bits when computed again" + told_skipped(
        record
    )
    if finding is not None:
        finding.evidence += f"; {again}"
        return finding
    finding = Finding(again)
    if off:
        assert off[0].recomputed is not None
        apart = float(np.abs(off[0].recomputed - off[0].contribution).max())
        witness = f"replica {off[0].replica_id}, step {off[0].step}: differs by up to {apart:.2g}"
        finding.anomalies.append(Anomaly("mixed_gradient", len(off), len(done), "references", witness))
    return finding


def _read_back(record: RunRecord) -> Finding | None:
    """Every step of a shared buffer, where what each replica put there is known."""
    columns = [replica.column("mixed") for replica in record.replicas]
    known = sum(int((column >= 0).sum()) for column in columns)
    if not known:
        return None
    off = [int((column == 1).sum()) for column in columns]
    finding = Finding(f"{known - sum(off):,} of {known:,} gradients were read back from .grad as they were put there")
    if sum(off):
        own = next(own for own, count in enumerate(off) if count)
        where = ", ".join(f"replica {own}: {count:,}" for own, count in enumerate(off))
        step = int(np.argmax(columns[own] == 1))
        witness = f"replica {own}, step {step}: .grad held something else than this replica's gradient when it was read"
        finding.anomalies.append(Anomaly("mixed_gradient", sum(off), known, where, witness))
    return finding


def _same(record: RunRecord, reference: Reference) -> bool:
    """Whether a reference computed again has the same bits, as far as it went the update mode's way."""
    assert reference.recomputed is not None
    return all(
        np.array_equal(_bits(reference.recomputed[span]), _bits(reference.contribution[span]))
        for segment in record.layout.read_segments
        if segment.kind not in record.layout.apart
        for span in [slice(segment.start, segment.end)]
    )


# What is written beside the weights.


def kept_statistics(record: RunRecord) -> Finding:
    """Count every replica's changes of batch statistics in their canaries, in every copy."""
    if not record.layout.of_kind("statistic"):
        return _not_applicable("the model keeps no batch statistics")
    return _kept_apart(record, "statistic", "lost_statistics", "changes of batch statistics")


def _kept_apart(record: RunRecord, kind: str, anomaly: str, things: str) -> Finding:
    if record.copies is None:
        return not_checked("the run did not reach its end")
    rows = [index for index, segment in enumerate(record.layout.segments) if segment.kind == kind]
    counts = np.nan_to_num(record.copies[:, record.layout.canaries[rows]], nan=-1, posinf=-1)
    least = counts.min(axis=(0, 1, 2))
    kept = np.where((counts.max(axis=(0, 1, 2)) <= record.steps) & (least >= 0), least, 0)
    of = record.steps * record.num_replicas
    finding = Finding(
        f"{int(kept.sum()):,} of {of:,} {things} kept, by the canaries of {len(rows)} "
        f"variable{'' if len(rows) == 1 else 's'} in {told_copies(len(record.copies))}"
    )
    if kept.sum() < of:
        apart = np.abs(counts - record.steps)
        copy, row, end, own = (int(index) for index in np.unravel_index(apart.argmax(), apart.shape))
        found, name = int(counts[copy, row, end, own]), record.layout.segments[rows[row]].name
        where = ", ".join(f"replica {own}: {int(each):,} of {record.steps:,} kept" for own, each in enumerate(kept))
        witness = f"after {record.steps:,} updates by replica {own}, its canary in {name} shows {found:,}"
        copy_told = f" in copy {copy}" if len(record.copies) > 1 else ""
        finding.anomalies.append(Anomaly(anomaly, of - int(kept.sum()), of, where, witness + copy_told))
    return finding


def kept_loss_scale(record: RunRecord, *, joint: bool, growth_steps: int) -> Finding:
    """Count the decisions about the loss scale in its canaries; where replicas update together, replay them.

    Args:
        joint: whether replicas make one update together, so that all have to use one scale and skip the same steps.
    """
    if growth_steps in (0, NEVER):
        return _not_applicable("the precision has no loss scale")
    finding = _kept_apart(record, "loss_scale", "lost_scale_decision", "decisions about the loss scale")
    if not joint or record.copies is None:
        return finding
    steps = min(replica.computed.total() for replica in record.replicas)
    used = np.stack([replica.loss_scale[:steps, 0] for replica in record.replicas])
    overflowed = np.stack([replica.loss_scale[:steps, 1] for replica in record.replicas]) > 0
    skipped = int(overflowed.any(axis=0).sum())
    finding.evidence += f"; {skipped:,} of {steps:,} steps overflowed in some replica"
    apart = "loss_scale" in record.layout.apart
    split = overflowed.any(axis=0) & ~overflowed.all(axis=0) & apart
    if split.any():
        step = int(np.argmax(split))
        some = ", ".join(f"replica {own}" for own in np.flatnonzero(overflowed[:, step]))
        witness = f"step {step}: {some} overflowed and skipped; the others applied theirs"
        finding.anomalies.append(Anomaly("split_skip", int(split.sum()), steps, "joint updates", witness))
    expected = _replayed(record, np.asarray(overflowed.any(axis=0)), growth_steps)
    wrong = (used != expected).any(axis=0)
    if wrong.any():
        step = int(np.argmax(wrong))
        found = ", ".join(f"replica {own} {scale:g}" for own, scale in enumerate(used[:, step]))
        witness = f"step {step}: {found}; one decision a step would have made it {expected[step]:g}"
        finding.anomalies.append(Anomaly("scale_off", int(wrong.sum()), steps, "joint updates", witness))
    return finding


def _replayed(record: RunRecord, overflowed: NDArray[np.bool_], growth_steps: int) -> Floats:
    """The scale that each step was to use, had every step before it decided once for all: float32 [steps]."""
    assert record.initial is not None
    assert record.layout.loss_scale is not None
    scale, good = record.initial[record.layout.loss_scale]
    scales = np.empty(len(overflowed), np.float32)
    for step, skipped in enumerate(overflowed):
        scales[step] = scale
        scale, good = next_state(scale, good, np.float32(skipped), growth_steps)
    return scales


# Random numbers and samples.


def random_numbers(record: RunRecord, *, derived: bool) -> Finding:
    """Hold the first random words of every step to what they were to be, and look for words that were used before."""
    if not record.draws:
        return _not_applicable("the model draws no random numbers")
    owners, steps = zip(*(_drawn(replica) for replica in record.replicas), strict=True)
    own, step = np.concatenate(owners), np.concatenate(steps)
    if not len(own):
        return not_checked("no random numbers were recorded")
    words = np.concatenate([replica.random_words[at] for replica, at in zip(record.replicas, steps, strict=True)])

    def told(row: int) -> str:
        return f"replica {own[row]} at step {step[row]}"

    finding = Finding("")
    firsts, repeats = _repeats(words)
    if len(repeats):
        witness = f"{told(firsts[0])} and {told(repeats[0])} drew the same numbers"
        anomaly = Anomaly("repeated_random_numbers", len(repeats), len(own), "first draw of each step", witness)
        finding.anomalies.append(anomaly)
    fresh = f"{len(own) - len(repeats):,} of {len(own):,} steps drew numbers that no other step had drawn"
    if record.expected_words is None:
        finding.evidence = fresh
        return finding
    off = (words != record.expected_words[own, step]).any(axis=1)
    right = "derived from (seed, step, sample)" if derived else "of the replica's turn"
    finding.evidence = f"{len(own) - int(off.sum()):,} of {len(own):,} steps drew the numbers {right}; {fresh}"
    if off.any():
        kind = "underived_random_numbers" if derived else "reordered_random_numbers"
        witness = f"{told(int(np.argmax(off)))} drew other numbers than those {right}"
        finding.anomalies.append(Anomaly(kind, int(off.sum()), len(own), "first draw of each step", witness))
    return finding


def _drawn(replica: ReplicaRecord) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The steps at which a replica drew, and as often its number."""
    steps = np.flatnonzero(replica.random_words[: replica.computed.total(), 0] >= 0)
    return np.full(len(steps), replica.replica_id), steps


def _repeats(words: Floats) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows that equal an earlier one, and for each the first that it equals."""
    both = words[:, 0].astype(np.int64) << 24 | words[:, 1].astype(np.int64)
    _, firsts, inverse = np.unique(both, return_index=True, return_inverse=True)
    first_of = firsts[inverse]
    again = np.flatnonzero(first_of != np.arange(len(words)))
    return first_of[again], again


def samples_once(record: RunRecord) -> Finding:
    """Count how often each batch of the plan was used, and hold the samples that steps saw to it."""
    if record.planned is None:
        return not_checked("the run did not reach its end")
    taken = np.concatenate([replica.column("batch") for replica in record.replicas])
    seen = np.concatenate([replica.first_samples[: len(replica.column("batch"))] for replica in record.replicas])
    of, size = len(record.planned), record.batch_size
    times = np.bincount(taken, minlength=of)
    # A step counts as having used a batch only if it really saw its samples.
    wrong = int((record.planned[taken % of] != seen).sum())
    finding = Finding(
        f"{int((times == 1).sum()) * size:,} of {of * size:,} samples were seen exactly once in their epoch"
    )
    again, never = int(times.sum() - (times > 0).sum()), int((times[:of] == 0).sum())
    if again:
        number = int(np.argmax(times > 1))
        witness = f"batch {number} was used {times[number]} times, {_users(record, number)}"
        finding.anomalies.append(Anomaly("repeated_samples", again * size, of * size, "seen before", witness))
    if never:
        number = int(np.argmax(times == 0))
        witness = f"batch {number}, from sample {record.planned[number]} on, was used by nobody"
        finding.anomalies.append(Anomaly("missed_samples", never * size, of * size, "never seen", witness))
    if wrong:
        witness = f"{wrong:,} steps saw another first sample than that of the batch that they were given"
        finding.anomalies.append(Anomaly("wrong_samples", wrong * size, of * size, "steps", witness))
    return finding


def _users(record: RunRecord, number: int) -> str:
    users = [
        f"by replica {replica.replica_id} at step {int(step)}"
        for replica in record.replicas
        for step in np.flatnonzero(replica.column("batch") == number)
    ]
    return ", ".join(users[:3])


# Compiled steps.


def compiled_steps(record: RunRecord, tolerance: float) -> Finding:
    """Hold every compiled library that was run to the step that it was looked up for.

    Args:
        tolerance: how far its results may be from the step's, relative to them.
    """
    if not record.compiled:
        return Finding(f"steps run by {record.engine or 'nothing'} are not kept, so none is found", applies=False)
    steps, found = record.compiled, [each for each in record.compiled if each.found]
    finding = Finding(
        f"{len(found)} of {len(steps)} compiled steps were found, {sum(each.seconds for each in found):.3g} s of "
        f"compiling saved; results of the first batch at most {max(each.distance for each in steps):.1e} off the "
        "steps' own, relative to them"
    )
    foreign = [each for each in steps if each.content != each.wanted or not each.distance <= tolerance]
    if foreign:
        first = foreign[0]
        witness = (
            f"under {first.id} was the step {first.content[:8]}, and {first.wanted[:8]} was looked up; what it "
            f"computes of the first batch is {first.distance:.1e} off, relative to the step's own"
        )
        finding.anomalies.append(Anomaly("foreign_step", len(foreign), len(steps), "compiled steps", witness))
    return finding


# Settings.


def settings(record: RunRecord) -> Finding:
    """Tell the framework settings under which replicas ran and for which nobody had asked."""
    if not record.settings:
        return not_checked("no replica has looked at its settings")
    count = len(record.settings_asked)
    finding = Finding(f"{count} settings compared in {len(record.settings)} replicas at their first and last step")
    for own, differences in sorted(record.settings.items()):
        for each in differences:
            witness = f"replica {own}: {each.name} ({each.scope}) is {each.found}, asked was {each.asked}"
            finding.anomalies.append(Anomaly("setting_off", 1, count, f"{each.name} in replica {own}", witness))
    return finding


def _bits(vector: Floats) -> NDArray[np.uint32]:
    return np.ascontiguousarray(vector).view(np.uint32)

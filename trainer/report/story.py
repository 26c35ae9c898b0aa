"""What a sweep came to, in sentences: which mode hurt, where, by how much, against the safe one.

Names and numbers stand between backticks where a page sets them apart. Standard library and rich only.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence

from trainer.report import words
from trainer.report.groups import Group, Job, numbers
from trainer.report.rows import Row
from trainer.report.series import ABOUT, measured, replicas_of
from trainer.updates.mechanisms import MODES

# Anomalies of one group that are named before the rest is counted.
KINDS = 6
# Of a list of replicas.
CHARACTERS = 120
# Ratios nearer to 1 than this are told as `about as fast`.
NEAR = 0.1


def opening(rows: Sequence[Row], planned: int | None) -> list[str]:
    """How many runs came to what, and how many never came to anything."""
    found = Counter(_word(row) for row in rows)
    told = [
        f"{number} {'with an anomaly' if word == 'anomaly' else word}"
        for word, number in sorted(found.items(), key=lambda item: -item[1])
    ]
    lines = [f"{_some(len(rows), 'run')}: {', '.join(told)}."]
    missing = 0 if planned is None else planned - len(rows)
    unfinished = sum(row.error.get("kind") in ("interrupted", "killed") or row.word == "none" for row in rows)
    if missing > 0 or (unfinished and planned is not None):
        parts = [f"{missing} of {_some(planned, 'run')} {_are(missing)} missing, since they never began"] * (
            missing > 0
        )
        parts += [f"{unfinished} of those that began did not come to {_its(unfinished)} end"] * (unfinished > 0)
        lines.append(f"The sweep was cut short: {'; '.join(parts)}.")
    return lines


def findings(groups: Sequence[Group]) -> list[str]:
    """A paragraph for each group that hurt, then one for those that were silent and one for those that held."""
    hurt = [each for each in groups if each.kinds]
    told = [" ".join(_hurt(each, _safe(each, groups))) for each in hurt]
    silent = [each for each in groups if each not in hurt and _words(each) & {"inconclusive"}]
    if silent:
        told.append(
            f"{_names(silent)} showed nothing, which proves nothing: something claimed was not checked, or nothing is "
            "claimed that could be upheld."
        )
    held = [each for each in groups if each not in hurt and _words(each) == {"upheld"}]
    if held:
        tried = {guarantee.covers.kind for each in held for job in each.ended for guarantee in job.row.guarantees}
        only = "; other orders were not tried" if "this_run" in tried else ""
        told.append(f"{_names(held)} upheld everything that was checked of what {_they(held)} claimed{only}.")
    if not hurt and any(each.ended for each in groups):
        told.insert(0, "No run that ended by itself showed an anomaly.")
    return told


def _hurt(group: Group, safe: Group | None) -> Iterator[str]:
    yield f"`{group.name}` {_violated(group)}: {_kinds(group)}."
    kept = _by_replicas(group, "kept_share")
    if any(low < 1 for _, low, _ in kept.values()):
        by_count = ", ".join(
            f"{_spread(mean, low, high)} with {_some(count, 'replica')}" for count, (mean, low, high) in kept.items()
        )
        yield f"Updates kept: {by_count}."
    if (where := _worst(group)) is not None:
        yield where
    if safe is not None:
        yield from _against(group, safe)


def _violated(group: Group) -> str:
    broken = sorted({each.name for job in group.ended for each in job.row.guarantees if each.status == "violated"})
    return f"broke what it was held to ({', '.join(broken)})" if broken else "went wrong"


def _kinds(group: Group) -> str:
    told = []
    for kind in group.kinds[:KINDS]:
        seen = group.with_kind(kind)
        runs = len({job.name for job, _ in seen})
        job, most = max(seen, key=lambda one: one[1].count / (one[1].of or 1))
        unit = " orders" if job.row.metrics.get("orders") else ""
        often = f"{words.share(most.count, most.of)}{unit}"
        if len(group.ended) == 1:
            told.append(f"`{kind}` in {often}")
        else:
            at_most = "" if runs == 1 else "up to "
            told.append(f"`{kind}` in {runs} of {len(group.ended)} runs ({at_most}{often})")
    if (more := len(group.kinds) - KINDS) > 0:
        told.append(_some(more, "other kind"))
    first = min((replicas_of(job.row) or 1 for kind in group.kinds for job, _ in group.with_kind(kind)), default=1)
    from_on = f", from {first} replicas on" if group.num_replicas and group.num_replicas[0] < first else ""
    return ", ".join(told) + from_on


def _worst(group: Group) -> str | None:
    """Where it was worst: of the commonest anomaly the run with the largest share."""
    job, anomaly = max(group.with_kind(group.kinds[0]), key=lambda one: one[1].count / (one[1].of or 1))
    if job.row.metrics.get("orders") or not anomaly.where:
        return None
    return f"Worst in run {job.name} with {_some(replicas_of(job.row), 'replica')}: {_short(anomaly.where)}."


def _short(where: str) -> str:
    """The first of a long list of replicas."""
    return where if len(where) <= CHARACTERS else f"{where[:CHARACTERS].rpartition(', ')[0]}, …"


def _safe(group: Group, groups: Sequence[Group]) -> Group | None:
    """What to compare a group with: its mode's remedy, or else another that upheld what was checked; same strategy."""
    remedy = MODES[group.mode].remedy if group.mode in MODES else ""
    named = re.match(r"update_mode=(\w+)", remedy)
    same = [each for each in groups if each.strategy == group.strategy]
    held = [each for each in same if _words(each) == {"upheld"} and _both(group, each)]
    # The same mode held another way is nearer than another mode.
    wanted = (group.mode, named[1] if named else "")
    return min(held, key=lambda each: wanted.index(each.mode) if each.mode in wanted else len(wanted), default=None)


def _against(group: Group, safe: Group) -> Iterator[str]:
    """The safe group's numbers beside the group's, of runs that went wrong and their like."""
    if any(job.row.metrics.get("orders") for job in (*group.ended, *safe.ended)):
        return
    both = _both(group, safe)
    ours, theirs = ([job for job in each.ended if _like(job) in both] for each in (group, safe))
    counts = {replicas_of(job.row) for job in ours}
    losses = [numbers((job.row for job in jobs), "loss") for jobs in (ours, theirs)]
    speeds = [numbers((job.row for job in jobs), "micro_steps_per_second") for jobs in (ours, theirs)]
    mine, kept = (
        [found[0] for job in jobs if (found := measured(job.row, "kept_share")) is not None] for jobs in (ours, theirs)
    )
    parts = ["kept every update"] if kept and min(kept) == 1 and mine and min(mine) < 1 else []
    if all(losses):
        bad, good = map(_mean, losses)
        parts.append(f"ended at the same loss, {good}" if good == bad else f"ended at a loss of {good}, not {bad}")
    if all(speeds) and (slow := math.fsum(speeds[0]) / len(speeds[0])):
        ratio = math.fsum(speeds[1]) / len(speeds[1]) / slow
        fast = "was about as fast" if abs(ratio - 1) < NEAR else f"ran at {ratio:.2g} times the speed"
        parts.append(fast)
    if parts:
        listed = " and ".join((", ".join(parts[:-1]), parts[-1])) if len(parts) > 1 else parts[0]
        with_ = " and ".join(str(count) for count in sorted(count for count in counts if count is not None))
        yield f"With {with_} replica{'' if counts == {1} else 's'}, `{safe.name}` {listed}."


def _both(group: Group, safe: Group) -> set[tuple[str, ...]]:
    """What runs are like that went wrong and have their like in the safe group."""
    wrong = {job.name for kind in group.kinds for job, _ in group.with_kind(kind)}
    return {_like(job) for job in group.ended if job.name in wrong} & {_like(job) for job in safe.ended}


def _like(job: Job) -> tuple[str, ...]:
    """What two runs have to have in common for their numbers to be compared."""
    return tuple(repr(job.row.run.get(name)) for name in ("num_replicas", "threads_per_replica", *ABOUT))


def _with(group: Group, counts: set[int]) -> list[Job]:
    return [job for job in group.ended if replicas_of(job.row) in counts]


def _by_replicas(group: Group, measure: str) -> dict[int, tuple[float, float, float]]:
    """Number of replicas -> mean, least and largest of the runs; nothing where orders were searched."""
    found = {}
    for count in group.num_replicas:
        jobs = [job for job in _with(group, {count}) if not job.row.metrics.get("orders")]
        values = [value[0] for job in jobs if (value := measured(job.row, measure)) is not None]
        if values:
            found[count] = math.fsum(values) / len(values), min(values), max(values)
    return found


def _spread(mean: float, low: float, high: float) -> str:
    between = "" if _percent(low) == _percent(high) else f" ({_percent(low)} to {_percent(high)})"
    return f"{_percent(mean)}{between}"


def _percent(share: float) -> str:
    # What was lost is not rounded away.
    return f"{math.floor(1e4 * share) / 100:g}%" if 0.99 < share < 1 else f"{share:.0%}"


def _mean(values: Sequence[float]) -> str:
    return words.number(math.fsum(values) / len(values), 3)


def _words(group: Group) -> set[str]:
    return {job.row.word for job in group.ended}


def _word(row: Row) -> str:
    if row.word == "none":
        return "without a verdict"
    kind = row.error.get("kind")
    return str(kind) if kind == "refused" else f"broken ({kind})" if kind else row.word


def _names(groups: Sequence[Group]) -> str:
    named = [f"`{each.name}`" for each in groups]
    return " and ".join((", ".join(named[:-1]), named[-1])) if len(named) > 1 else named[0]


def _they(groups: Sequence[Group]) -> str:
    return "they" if len(groups) > 1 else "it"


def _some(count: object, thing: str) -> str:
    return f"{words.number(count)} {thing}{'' if count == 1 else 's'}"


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def _its(count: int) -> str:
    return "its" if count == 1 else "their"

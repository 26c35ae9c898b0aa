"""What the plot of several runs shows: points over the number of replicas, by update mode. Standard library only."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from trainer.audit.verdict import WORDS
from trainer.report.rows import Row
from trainer.updates.mechanisms import MODES

MEASURES = ("kept_share", "throughput", "staleness", "loss")
# What a run is told by, besides its strategy, its update mode and its number of replicas.
ABOUT = ("workload", "model", "data", "optimizer", "precision", "schedule", "audit", "steps", "batch_size", "seed")


@dataclass(frozen=True)
class Point:
    """The runs of one update mode with one number of replicas.

    Attributes:
        mean: mean over the runs.
        low: least of the runs.
        high: largest of the runs; of the staleness, the largest of any update.
    """

    num_replicas: int
    mean: float
    low: float
    high: float
    num_runs: int = 1


@dataclass(frozen=True)
class Series:
    """The runs of one update mode under one strategy.

    Attributes:
        keeps: whether the mode claims that no update is lost.
        points: measure -> points by number of replicas; none where it was not measured.
    """

    strategy: str
    update_mode: str
    keeps: bool
    points: dict[str, tuple[Point, ...]]


@dataclass(frozen=True)
class Ideal:
    """What throughput would be if replicas did not slow each other down until every core is busy.

    Attributes:
        throughput: of the fastest mode with one replica, micro-steps per second.
        threads: of that replica.
        cores: that each run could use.
    """

    throughput: float
    threads: int
    cores: int

    def of(self, num_replicas: float) -> float:
        return self.throughput * min(num_replicas, self.cores)


@dataclass(frozen=True)
class Chart:
    """Everything that is drawn.

    Attributes:
        series: by strategy, then in the order of the table of update modes, the user's own after them.
        num_runs: runs drawn.
        uncounted: those of them that measured their throughput, but counted no updates.
        left_out: why a run is not drawn -> how many.
        common: what all the runs drawn have in common, by the names of `ABOUT`.
        varied: what the runs of some point differ in, likewise -> their values; of `state`, the holders, none.
        ideal: None where there is no run with one replica, or runs had different cores, or do not say how many.
    """

    series: tuple[Series, ...] = ()
    num_runs: int = 0
    uncounted: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    common: dict[str, Any] = field(default_factory=dict)
    varied: dict[str, tuple[str, ...]] = field(default_factory=dict)
    ideal: Ideal | None = None

    @property
    def num_replicas(self) -> tuple[int, ...]:
        """Every number of replicas for which there is a point."""
        return tuple(
            sorted({point.num_replicas for each in self.series for own in each.points.values() for point in own})
        )

    @property
    def strategies(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(each.strategy for each in self.series))

    def name(self, series: Series) -> str:
        """A series' name, with its strategy where there are several."""
        return series.update_mode if len(self.strategies) == 1 else f"{series.update_mode}, {series.strategy}"

    @property
    def most_runs(self) -> int:
        """Runs behind the point that has most."""
        return max((point.num_runs for each in self.series for own in each.points.values() for point in own), default=0)


def chart(rows: Iterable[Row]) -> Chart:
    """Gather the runs that ended by themselves and measured anything."""
    left_out: Counter[str] = Counter()
    drawn: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        if why := _why_not(row):
            left_out[why] += 1
        else:
            drawn[str(row.run.get("strategy")), str(row.run.get("update_mode"))].append(row)
    everyone = [row for own in drawn.values() for row in own]
    series = tuple(_series(*which, drawn[which]) for which in sorted(drawn, key=_order))
    return Chart(
        series,
        len(everyone),
        sum(measured(row, "kept_share") is None for row in everyone),
        dict(left_out),
        {name: values[0] for name in ABOUT if len(values := _values(everyone, name)) == 1 and values[0] is not None},
        _varied(drawn.values()),
        _ideal(series, everyone),
    )


def _order(which: tuple[str, str]) -> tuple[str, int, str]:
    strategy, mode = which
    modes = list(MODES)
    # `threads` hosts most modes and is the default: it comes first.
    return "" if strategy == "threads" else strategy, modes.index(mode) if mode in modes else len(modes), mode


def _why_not(row: Row) -> str:
    if row.word == "none":
        return "without a verdict"
    if row.word not in WORDS:
        return "with a verdict that cannot be read"
    if row.error or row.word == "broken":
        kind = row.error.get("kind")
        return "refused" if kind == "refused" else f"broken ({kind})" if kind else "broken"
    if replicas_of(row) is None or all(measured(row, measure) is None for measure in MEASURES):
        return "without numbers"
    return ""


def _series(strategy: str, mode: str, rows: Sequence[Row]) -> Series:
    by_replicas: dict[int, list[Row]] = defaultdict(list)
    for row in rows:
        if (replicas := replicas_of(row)) is not None:
            by_replicas[replicas].append(row)
    points = {
        measure: tuple(
            point
            for replicas in sorted(by_replicas)
            if (point := _point(replicas, [measured(row, measure) for row in by_replicas[replicas]])) is not None
        )
        for measure in MEASURES
    }
    return Series(strategy, mode, any("no_lost_updates" in row.claimed for row in rows), points)


def _ideal(series: Sequence[Series], rows: Sequence[Row]) -> Ideal | None:
    alone = [point.mean for each in series for point in each.points["throughput"] if point.num_replicas == 1]
    cores, threads = (
        _values([row for row in rows if not only_one or replicas_of(row) == 1], name)
        for name, only_one in (("cores", False), ("threads_per_replica", True))
    )
    if not alone or any(len(values) != 1 or _number(values[0]) is None for values in (cores, threads)):
        return None
    return Ideal(max(alone), int(threads[0]), int(cores[0]))


def _point(replicas: int, found: Sequence[tuple[float, float] | None]) -> Point | None:
    known = [each for each in found if each is not None]
    if not known:
        return None
    values = [value for value, _ in known]
    return Point(replicas, math.fsum(values) / len(values), min(values), max(high for _, high in known), len(known))


def measured(row: Row, measure: str) -> tuple[float, float] | None:
    """What a run measured, and the largest that it stands for; None where it did not measure it."""
    kept, expected = (_number(row.metrics.get(f"updates_{name}")) for name in ("kept", "expected"))
    value = {
        "kept_share": kept / expected if kept is not None and expected else None,
        "throughput": _number(row.metrics.get("micro_steps_per_second")),
        "staleness": _number(row.metrics.get("staleness_mean")),
        "loss": _number(row.metrics.get("loss")),
    }[measure]
    if value is None:
        return None
    largest = _number(row.metrics.get("staleness_max")) if measure == "staleness" else None
    return value, max(value, largest or 0)


def replicas_of(row: Row) -> int | None:
    """Its number of replicas, where that is one."""
    replicas = _number(row.run.get("num_replicas"))
    return int(replicas) if replicas is not None and replicas >= 1 else None


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


def _varied(groups: Iterable[Sequence[Row]]) -> dict[str, tuple[str, ...]]:
    found: dict[str, dict[str, None]] = defaultdict(dict)
    for rows in groups:
        by_replicas: dict[int | None, list[Row]] = defaultdict(list)
        for row in rows:
            by_replicas[replicas_of(row)].append(row)
        for name in ABOUT:
            for own in by_replicas.values():
                if len(values := _values(own, name)) > 1:
                    found[name].update((str(value), None) for value in values)
            if any(len(_values(own, "state")) > 1 for own in by_replicas.values()):
                # Who holds what is too long to be told.
                found["state"] = {}
    return {name: tuple(values) for name, values in found.items()}


def _values(rows: Sequence[Row], name: str) -> list[Any]:
    """The distinct values that runs have under a name."""
    return list({repr(row.run.get(name)): row.run.get(name) for row in rows}.values())

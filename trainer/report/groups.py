"""Runs that differ in nothing but seed, size and number of replicas: what a report says something about.

Standard library and rich only.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from trainer.audit.verdict import Anomaly
from trainer.report import table
from trainer.report.rows import Row
from trainer.report.series import replicas_of
from trainer.updates.mechanisms import MODES

# Keys in which the runs of a group may differ: they say how much was done and checked, not what was shared and how.
ALIKE = ("train.", "audit.", "audit", "fail_on", "require", "num_replicas")


class Job(NamedTuple):
    """A row and what it is called in the report."""

    name: str
    row: Row


@dataclass(frozen=True)
class Group:
    """Runs that say something about one update mode, held one way, under one strategy.

    Attributes:
        name: the mode, with what tells the group from others of the mode.
        jobs: its runs, refused and broken ones included.
    """

    name: str
    strategy: str
    mode: str
    jobs: tuple[Job, ...]

    @property
    def ended(self) -> tuple[Job, ...]:
        """The runs that ended by themselves."""
        return tuple(job for job in self.jobs if not job.row.error and job.row.word != "broken")

    @property
    def num_replicas(self) -> tuple[int, ...]:
        return tuple(sorted({count for job in self.ended if (count := replicas_of(job.row)) is not None}))

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of anomalies that were seen, the commonest first."""
        runs: dict[str, int] = defaultdict(int)
        for job in self.ended:
            for kind in {each.kind for each in job.row.witnesses}:
                runs[kind] += 1
        order = {each.kind: at for at, each in reversed(list(enumerate(self._seen)))}
        return tuple(sorted(runs, key=lambda kind: (-runs[kind], order[kind])))

    def with_kind(self, kind: str) -> list[tuple[Job, Anomaly]]:
        """The runs that showed an anomaly, the one of the fewest replicas and steps first."""
        found = [(job, each) for job in self.ended for each in job.row.witnesses if each.kind == kind]
        return sorted(found, key=lambda one: (replicas_of(one[0].row) or 0, _steps(one[0].row), one[1].count))

    @property
    def _seen(self) -> list[Anomaly]:
        return [each for job in self.ended for each in job.row.witnesses]


def group(rows: Sequence[Row]) -> list[Group]:
    """The runs whose verdicts say what they were, by strategy and then in the order of the table of modes."""
    names, _ = table.jobs_of(list(rows))
    varied = {key: cells for key, cells in table.varied(list(rows)).items() if not key.startswith(ALIKE)}
    several = len({row.run.get("strategy") for row in rows if row.run}) > 1
    found: dict[tuple[str, str, tuple[str, ...]], list[Job]] = defaultdict(list)
    for at, row in enumerate(rows):
        if row.run.get("strategy"):
            told = tuple(f"{key}={cells[at]}" for key, cells in varied.items() if cells[at] != "-")
            found[str(row.run["strategy"]), table.mode_of(row), told].append(Job(names[at], row))
    return [
        Group(", ".join((mode, *((strategy,) if several else ()), *told)), strategy, mode, tuple(jobs))
        for (strategy, mode, told), jobs in sorted(found.items(), key=lambda item: _order(item[0]))
    ]


def _order(which: tuple[str, str, tuple[str, ...]]) -> tuple[str, int, str, tuple[str, ...]]:
    strategy, mode, told = which
    modes = list(MODES)
    at = modes.index(mode) if mode in modes else len(modes)
    return "" if strategy == "threads" else strategy, at, mode, told


def numbers(rows: Iterable[Row], name: str) -> list[float]:
    """A metric of those rows that have it."""
    found = (row.metrics.get(name) for row in rows)
    return [value for value in found if isinstance(value, int | float) and not isinstance(value, bool)]


def _steps(row: Row) -> int:
    steps = row.run.get("steps")
    return steps if isinstance(steps, int) else 0

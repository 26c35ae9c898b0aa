"""Guarantees by update mode: what the runs of each group came to, and what that speaks of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trainer.audit.guarantees import GUARANTEES
from trainer.audit.verdict import Covers, Guarantee
from trainer.report import words
from trainer.report.groups import Group

# As a cell lists them, worst first.
ORDER = ("violated", "anomaly", "not_checked", "not_seen", "upheld", "not_applicable")
SIGNS = {
    "violated": "✗",
    "anomaly": "!",
    "not_checked": "?",
    "not_seen": "·",
    "upheld": "✓",
    "not_applicable": "-",
}
# What a status says, for the legend.
MEANING = {
    "upheld": "claimed or required, checked, nothing seen",
    "violated": "claimed or required, and broken",
    "anomaly": "not claimed, and seen",
    "not_seen": "not claimed, and not seen",
    "not_checked": "this run could not tell",
    "not_applicable": "makes no sense here",
}


@dataclass(frozen=True)
class Part:
    """Runs of a group that came to the same.

    Attributes:
        often: `2 of 6 runs`, where the others came to something else.
        covers: what the status speaks of.
        evidence: that of one of these runs.
    """

    status: str
    often: str
    covers: str
    evidence: str

    @property
    def sign(self) -> str:
        return SIGNS[self.status]


@dataclass(frozen=True)
class Line:
    """A group's cells, one for each column: a part for each status, worst first; none where no verdict speaks of it.

    Attributes:
        covers: what all statuses of the line speak of, where that is one thing.
    """

    group: Group
    cells: tuple[tuple[Part, ...], ...]
    covers: str


@dataclass(frozen=True)
class Matrix:
    """A line for each group of which a run ended by itself, a column for each guarantee.

    Attributes:
        covers: what all statuses speak of, where that is one thing.
    """

    columns: tuple[str, ...]
    lines: tuple[Line, ...]
    covers: str


def matrix(groups: Sequence[Group]) -> Matrix:
    """Every guarantee that at least one run looked at or was held to."""
    known = [each for group in groups for job in group.ended for each in job.row.guarantees]
    wanted = {each.name for each in words.told(known)}
    columns = tuple(sorted(wanted, key=lambda name: list(GUARANTEES).index(name) if name in GUARANTEES else 99))
    lines = tuple(_line(each, columns) for each in groups if each.ended)
    return Matrix(columns, lines, _one([each for line in lines for cell in line.cells for each in cell]))


def _line(group: Group, columns: Sequence[str]) -> Line:
    cells = tuple(_cell(group, name) for name in columns)
    return Line(group, cells, _one([each for cell in cells for each in cell]))


def _one(parts: Sequence[Part]) -> str:
    """What all of them cover, where that is one thing."""
    covered = {each.covers for each in parts if each.covers}
    return covered.pop() if len(covered) == 1 else ""


def _cell(group: Group, name: str) -> tuple[Part, ...]:
    found = [each for job in group.ended for each in job.row.guarantees if each.name == name]
    parts = []
    for status in ORDER:
        if of_it := [each for each in found if each.status == status]:
            often = f"{len(of_it)} of {len(found)} runs" if len(of_it) < len(found) else ""
            parts.append(Part(status, often, _covered(of_it), of_it[0].evidence))
    return tuple(parts)


def _covered(guarantees: Sequence[Guarantee]) -> str:
    """What they speak of; of many different things the first two."""
    if words.covered(guarantees[0]) == "-":
        return ""
    distinct: list[Covers] = []
    for each in guarantees:
        if each.covers not in distinct:
            distinct.append(each.covers)
    return "; ".join(words.covers(each) for each in distinct[:2]) + ("; …" if len(distinct) > 2 else "")

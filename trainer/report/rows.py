"""Folders of runs as rows: what each run's `verdict.json` says, as far as it can be read. Standard library only.

Runs that were refused, that broke, whose verdict cannot be read or that left none are rows like the others.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.audit.read import Part, Unreadable, part
from trainer.audit.verdict import FILE_NAME, Anomaly, Guarantee, PrecisionRow

# Statuses of guarantees that nothing was looked for.
UNCHECKED = ("not_checked", "not_applicable")
# Either says that a folder is a run's; one that has only its `.hydra` was ended from outside, or is under way.
TRACES = (FILE_NAME, ".hydra")


@dataclass(frozen=True)
class Seen:
    """An anomaly of a run: how often it was seen, and of how many; `of` is None for the sum of several of its kind."""

    kind: str
    count: int
    of: int | None


@dataclass
class Row:
    """One run and what its verdict says, as far as it could be read.

    Attributes:
        job: the number or time that the run's folder is named by, or the folder's name where it starts with neither.
        folder: where the run lies, below the one folder that was asked for, or as it was asked for.
        word: the verdict; `none` or `unreadable` where there is none to read.
        reason: why there is no verdict, or what broke or refused the run, on one line.
        claimed: names of the guarantees that the run claims.
        anomalies: one of each kind; None where nothing was checked, so that there was none to see.
        rest: the verdict's other numbers and words.
        guarantees, witnesses, precision: those of the verdict that could be read.
    """

    job: str
    folder: str
    word: str = "unreadable"
    reason: str = ""
    error: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    claimed: frozenset[str] = frozenset()
    anomalies: tuple[Seen, ...] | None = None
    rest: dict[str, Any] = field(default_factory=dict)
    guarantees: tuple[Guarantee, ...] = ()
    witnesses: tuple[Anomaly, ...] = ()
    precision: tuple[PrecisionRow, ...] = ()


def holds_runs(folder: Path) -> bool:
    return any(True for name in TRACES for _ in folder.rglob(name))


def find(*folders: Path) -> list[Row]:
    """A row for each run in or below the folders: in the order of the folders, and in each by job number.

    A run that several of the folders hold is one row.
    """
    rows: dict[Path, Row] = {}
    for folder in folders:
        runs = {path.parent for name in TRACES for path in folder.rglob(name)}
        for run in sorted(runs, key=lambda run: _order(run.relative_to(folder))):
            if run.resolve() not in rows:
                rows[run.resolve()] = _read(run, run.relative_to(folder) if len(folders) == 1 else run)
    return list(rows.values())


def _order(path: Path) -> list[tuple[int, int, str]]:
    """Numbers in a path by size, so that job 10 comes after job 9."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", str(path)) if part]


def _read(run: Path, named: Path) -> Row:
    name = run.resolve().name
    number = re.match(r"\d[\d-]*(?=_)", name)
    row = Row(number[0] if number else name, str(named))
    try:
        verdict = json.loads((run / FILE_NAME).read_text(encoding="utf-8"))
        word = verdict["verdict"]
        if not isinstance(word, str):
            raise TypeError(f"its verdict is {word!r}")
    except FileNotFoundError:
        row.word, row.reason = "none", f"no {FILE_NAME}: the run is still going on, or was killed with its parent"
        return row
    except (OSError, ValueError, TypeError, KeyError) as problem:
        row.reason = _one_line(f"{FILE_NAME} cannot be read: {type(problem).__name__}: {problem}")
        return row
    row.word, row.run, row.metrics = word, _mapping(verdict.get("run")), _mapping(verdict.get("metrics"))
    guarantees = _mappings(verdict.get("guarantees"))
    row.claimed = frozenset(str(each.get("name")) for each in guarantees if each.get("claimed") is True)
    if any(each.get("status") not in UNCHECKED for each in guarantees):
        row.anomalies = _seen(_mappings(verdict.get("anomalies")))
    row.rest = {
        key: value for key, value in verdict.items() if isinstance(value, str | int | float) and key != "verdict"
    }
    row.guarantees = _parts(Guarantee, guarantees)
    row.witnesses = _parts(Anomaly, _mappings(verdict.get("anomalies")))
    row.precision = _parts(PrecisionRow, _mappings(verdict.get("precision")))
    row.error = _mapping(verdict.get("error"))
    if row.error:
        row.reason = _one_line(f"{row.error.get('kind')}: {row.error.get('message')}")
    return row


def _seen(anomalies: list[dict[str, Any]]) -> tuple[Seen, ...]:
    found: dict[str, Seen] = {}
    for each in anomalies:
        kind, count, of = str(each.get("kind")), each.get("count"), each.get("of")
        if not isinstance(count, int):
            continue
        before = found.get(kind)
        of = of if isinstance(of, int) and before is None else None
        found[kind] = Seen(kind, count + (before.count if before else 0), of)
    return tuple(found.values())


def _parts(kind: type[Part], found: list[dict[str, Any]]) -> tuple[Part, ...]:
    """Those that are what they ought to be: one odd entry does not take a row from a table."""
    read = []
    for each in found:
        with suppress(Unreadable):
            read.append(part(kind, each))
    return tuple(read)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _mappings(value: object) -> list[dict[str, Any]]:
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []

"""Rows of measurements, in a CSV file that grows by one with each."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

Key = tuple[str, str, int]


@dataclass(frozen=True)
class Row:
    """One measurement. None: not measured by it, or it failed, and `error` says why.

    Attributes:
        kind: speed, start (a run of one step) or memory (a short run).
        start_to_first_step_seconds, wall_seconds: from the start of the process, to the first step and to the exit.
        peak_rss_bytes: of ours, the run's process; of a rival, all its processes, what they share counted in each.
        pss_bytes: the same after the last step, with what they share counted once.
        machine: CPU, cores used and versions.
    """

    round: int
    kind: str
    model: str
    contender: str
    engine: str
    replicas: int
    micro_steps_per_second: float | None = None
    steps: int | None = None
    seconds: float | None = None
    loss_first: float | None = None
    loss_last: float | None = None
    start_to_first_step_seconds: float | None = None
    wall_seconds: float | None = None
    peak_rss_bytes: float | None = None
    pss_bytes: float | None = None
    parameters: int | None = None
    error: str = ""
    command: str = ""
    machine: str = ""

    @property
    def key(self) -> Key:
        return self.model, self.contender, self.replicas


COLUMNS = [field.name for field in fields(Row)]
TEXTS = {field.name for field in fields(Row) if field.type == "str"}
WHOLE = {field.name for field in fields(Row) if str(field.type).startswith("int")}


class BadFile(ValueError):
    """A file that is not one of ours, told in one line."""


def begin(path: Path) -> None:
    """A file with no rows yet.

    Raises:
        FileExistsError: there is one already.
    """
    try:
        with path.open("x", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow(COLUMNS)
    except FileExistsError:
        raise FileExistsError(f"--out: {path} is there already. Give another folder.") from None


def add(path: Path, row: Row) -> None:
    # Opened and closed each time: whatever ends the program, the rows before are there.
    with path.open("a", newline="", encoding="utf-8") as file:
        csv.writer(file).writerow(["" if value is None else value for value in asdict(row).values()])


def read(path: Path) -> list[Row]:
    """All rows.

    Raises:
        BadFile: the file has other columns, or something in it is no number.
        OSError: it cannot be read.
    """
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != COLUMNS:
            raise BadFile(f"{path} is not a file of scripts/bench.py: its columns are not {','.join(COLUMNS)}.")
        return [_row(path, reader.line_num, line) for line in reader]


def _row(path: Path, number: int, line: dict[str, str]) -> Row:
    try:
        return Row(**{name: _value(name, line[name]) for name in COLUMNS})  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise BadFile(f"{path}, line {number}, is not as scripts/bench.py writes it: {error}.") from None


def _value(name: str, text: str) -> str | int | float | None:
    if name in TEXTS:
        return text
    if not text:
        return None
    return int(text) if name in WHOLE else float(text)


def by_round(rows: Sequence[Row], kind: str, column: str) -> dict[Key, dict[int, float]]:
    """A column's values by what was measured and in which round; what failed is not there."""
    found: dict[Key, dict[int, float]] = {}
    for row in rows:
        value = getattr(row, column)
        if row.kind == kind and value is not None and not row.error:
            found.setdefault(row.key, {})[row.round] = float(value)
    return found


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, least and largest."""
    return statistics.median(values), min(values), max(values)

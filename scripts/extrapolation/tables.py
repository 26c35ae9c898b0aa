"""Predictions and comparisons as tables, for the console and for a document; predictions as a CSV file."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path

from bench_speed.tables import Table

from extrapolation.check import Compared, medians
from extrapolation.pieces import PIECES, Calibration
from extrapolation.predict import COLUMNS, Prediction

TOLD = {
    "micro_steps_per_second": "micro-steps/s",
    "lock_wait_us": "lock wait, us",
    "staleness_mean": "staleness, mean",
    "lost_percent": "lost updates, %",
}


def pieces(calibration: Calibration) -> Table:
    """What each calibrating run's step is made of."""
    lines = []
    for run in calibration.runs:
        means = (number(1e6 * run.mean(name)) if getattr(run, name) else "-" for name in PIECES)
        lines.append(
            (run.mode, run.engine, f"{run.replicas}", f"{run.cores}", *means, f"{len(run.compute)}", run.source)
        )
    head = ("mode", "engine", "replicas", "cores", *(f"{name}, us" for name in PIECES), "steps", "from")
    return Table("Measured: a micro-step's pieces, means", head, lines, names=2)


def predictions(rows: Sequence[Prediction]) -> Table:
    lines = [
        (
            *(row.mode, row.layout, f"{row.replicas:,}", number(row.micro_steps_per_second)),
            *(f"{row.spread_percent:.0f} %", number(row.lock_wait_us), number(row.barrier_wait_us)),
            *(number(row.staleness_mean), f"{row.staleness_max:,}"),
            *("-" if row.lost_percent is None else f"{row.lost_percent:.1f} %", f"{row.again_percent:.0f} %"),
        )
        for row in rows
    ]
    head = (
        *("mode", "layout", "replicas", "micro-steps/s", "spread", "lock wait, us", "barrier, us"),
        *("stale mean", "max", "lost", "computed again"),
    )
    return Table("Predicted", head, lines, names=2)


def comparisons(rows: Sequence[Compared]) -> Table:
    lines = [
        (
            *(row.mode, TOLD[row.figure], f"{row.replicas}", number(row.predicted), number(row.measured)),
            "-" if row.error is None else f"{100 * row.error:+.0f} %",
        )
        for row in rows
    ]
    return Table(
        "Predicted and measured", ("mode", "figure", "replicas", "predicted", "measured", "error"), lines, names=2
    )


def errors(rows: Sequence[Compared]) -> Table:
    """The median size of each figure's errors: of all, and of as many replicas as cores at most."""
    found = medians(rows)
    lines = [(TOLD[figure], f"{100 * error:.0f} %", str(_count(rows, figure))) for figure, error in found.items()]
    return Table("Median error", ("figure", "of what was measured", "runs"), lines)


def _count(rows: Sequence[Compared], figure: str) -> int:
    return sum(row.figure == figure and row.error is not None for row in rows)


def write_csv(rows: Sequence[Prediction], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(["" if value is None else value for value in astuple(row)] for row in rows)


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

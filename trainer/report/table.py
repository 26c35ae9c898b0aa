"""Runs as one table on the console, on 80 columns or more."""

from __future__ import annotations

import shlex
from collections import Counter
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from trainer.report import anomalies, words
from trainer.report.console import STYLES
from trainer.report.rows import Row
from trainer.workloads.small import SMALL

# Keys that the other columns show, or that stand for several others.
SHOWN = ("strategy", "update_mode", "num_replicas", "model", "train.steps", "experiment")
# Heads of a table that would be wider than the console otherwise.
NARROW_HEADS = {
    "updates kept": "updates\nkept",
    "stale mean/max": "stale\nmean/\nmax",
    "accuracy": "accu-\nracy",
    "micro-steps/s": "micro-\nsteps/s",
}


def show(rows: list[Row], console: Console) -> None:
    """Print every run as a row, and below the table why a run has no numbers and which anomalies were seen."""
    jobs, sweeps = jobs_of(rows)
    columns, same = columns_of(rows, jobs), ""
    table = _table(rows, columns, {})
    if not _fits(table, console):
        same = _fold(columns, rows)
        table = _table(rows, columns, NARROW_HEADS)
    if not _fits(table, console):
        table.padding = (0, 0, 0, 0)
    console.print(table)
    for line in (same, *sweeps):
        if line:
            console.print(Text(line))
    for job, row in zip(jobs, rows, strict=True):
        if row.reason:
            console.print(Text(f"{job}: {row.reason}"))
    console.print()
    anomalies.show(rows, jobs, console)


def _fits(table: Table, console: Console) -> bool:
    unbounded = console.options.update(width=10_000)
    return console.measure(table, options=unbounded).maximum <= console.width


def _table(rows: list[Row], columns: dict[str, list[str]], heads: dict[str, str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for name in columns:
        named = name in ("job", "strategy", "mode", "model")
        # The names of modes are not broken in two, so that they can be searched for.
        table.add_column(
            heads.get(name, name), justify="left" if named else "right", overflow="fold", no_wrap=name == "mode"
        )
    table.add_column("verdict", no_wrap=True)
    for position, row in enumerate(rows):
        word = Text(str(row.error.get("kind", row.word)), style=STYLES.get(row.word, "bold red"))
        table.add_row(*(Text(cells[position]) for cells in columns.values()), word)
    return table


def jobs_of(rows: list[Row]) -> tuple[list[str], list[str]]:
    """Each row's job, with a letter for its sweep where jobs of several sweeps have the same; and what letters mean."""
    jobs = [row.job for row in rows]
    if max(Counter(jobs).values()) == 1:
        return jobs, []
    letters: dict[Path, str] = {}
    for row in rows:
        letters.setdefault(Path(row.folder).parent, _letters(len(letters)))
    return (
        [f"{letters[Path(row.folder).parent]}{row.job}" for row in rows],
        [f"{letter}: {sweep}" for sweep, letter in letters.items()],
    )


def _letters(number: int) -> str:
    """a to z, then aa to az, ba and so on."""
    more, last = divmod(number, 26)
    return (_letters(more - 1) if more else "") + chr(ord("a") + last)


def columns_of(rows: list[Row], jobs: list[str]) -> dict[str, list[str]]:
    def numbers(name: str, digits: int = 4) -> list[str]:
        return [words.number({**row.run, **row.metrics}.get(name), digits) for row in rows]

    def named(name: str) -> list[str]:
        return [str(row.run.get(name) or "-") for row in rows]

    return {
        "job": jobs,
        "strategy": named("strategy"),
        "mode": [mode_of(row) for row in rows],
        "N": numbers("num_replicas"),
        "model": named("model"),
        "steps": numbers("steps"),
        **varied(rows),
        "updates kept": _pairs(numbers("updates_kept"), numbers("updates_expected")),
        "stale mean/max": _pairs(numbers("staleness_mean", 2), numbers("staleness_max")),
        "loss": numbers("loss", 3),
        "accuracy": numbers("accuracy", 3),
        "micro-steps/s": numbers("micro_steps_per_second", 3),
    }


def mode_of(row: Row) -> str:
    """The update mode; a small workload is what tells its run apart, and not all of them have one."""
    workload, mode = row.run.get("workload"), row.run.get("update_mode")
    own = workload if workload in SMALL else None
    return " ".join(str(each) for each in (own, mode) if each) or str(workload or "-")


def varied(rows: list[Row]) -> dict[str, list[str]]:
    """What else the command gave differently to different runs, by key: two runs must not look the same by omission."""
    given = [_overrides(row) for row in rows]
    shown = [key for key in SHOWN if key != "experiment" or not _alike(rows, given)]
    keys = dict.fromkeys(key for each in given for key in each if key not in shown and not key.startswith("hydra"))
    found = {key: [each.get(key, "-") for each in given] for key in keys}
    return {key: cells for key, cells in found.items() if len(set(cells)) > 1}


def _alike(rows: list[Row], given: list[dict[str, str]]) -> bool:
    """Whether runs of different experiments are the same in all other columns."""
    experiments: dict[tuple[object, ...], set[str]] = {}
    for row, each in zip(rows, given, strict=True):
        told = (
            row.run.get("strategy"),
            mode_of(row),
            *(row.run.get(key) for key in ("num_replicas", "model", "steps")),
        )
        experiments.setdefault(told, set()).add(each.get("experiment", ""))
    return any(len(each) > 1 for each in experiments.values())


def _overrides(row: Row) -> dict[str, str]:
    """KEY=VALUE of the command that does the run again."""
    try:
        words = shlex.split(str(row.run.get("command", "")))
    except ValueError:
        return {}
    pairs = [word.partition("=") for word in words]
    return {key.lstrip("+"): value for key, equals, value in pairs if equals}


def _pairs(first: list[str], second: list[str]) -> list[str]:
    return ["-" if left == right == "-" else f"{left}/{right}" for left, right in zip(first, second, strict=True)]


def _fold(columns: dict[str, list[str]], rows: list[Row]) -> str:
    """Take columns out of a table: into the returned line where all runs agree, else the lesser ones below the mode."""
    same = []
    for name in ("strategy", "model", "steps", *varied(rows)):
        cells = columns[name]
        known = {cell for cell, row in zip(cells, rows, strict=True) if row.run}
        if len(known) == 1:
            same.append(f"{name} {known.pop()}")
        elif name == "strategy":
            continue
        else:
            more = [f"{name} {cell}" if row.run else "" for cell, row in zip(cells, rows, strict=True)]
            columns["mode"] = [f"{mode}\n{cell}".strip() for mode, cell in zip(columns["mode"], more, strict=True)]
        del columns[name]
    return f"all runs: {', '.join(same)}" if same else ""

"""A folder of runs as a table, a CSV file, a plot and a page, made from the `verdict.json` that each run leaves.

The parent of a sweep calls this, so nothing heavier than rich is imported, until there is something to draw.
"""

from __future__ import annotations

import csv
import json
import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from trainer.audit.verdict import FILE_NAME
from trainer.report import table
from trainer.report.rows import Row, find
from trainer.report.series import Chart, chart
from trainer.whole_file import whole

CSV_NAME = "sweep.csv"
PLOT_NAME = "sweep.png"
# Columns that come first in `sweep.csv`, in this order and always; whatever else verdicts hold follows by name.
CSV_COLUMNS = (
    *(
        "job",
        "folder",
        "verdict",
        "error.kind",
        "error.message",
        "anomalies",
        "strategy",
        "update_mode",
        "num_replicas",
        "model",
        "data",
    ),
    *("optimizer", "precision", "workload", "schedule", "audit", "steps", "batch_size", "seed", "threads_per_replica"),
    *("loss", "accuracy", "updates_expected", "updates_kept", "staleness_mean", "staleness_max", "torn_reads"),
    *("gradient_cosine_min", "gradient_error_max", "replica_divergence_max", "micro_steps_per_second"),
    *("duration_seconds", "final_parameters_sha256"),
)


def write(folder: Path, console: Console) -> None:
    """Report every run below a sweep's folder; what cannot be written is told on a line, and the rest goes on."""
    rows = find(folder)
    if not rows:
        console.print(Text(f"{folder} holds no run: no {FILE_NAME} below it."))
        return
    try:
        write_csv(rows, folder)
        csv_line = str(folder / CSV_NAME)
    except OSError as problem:
        csv_line = cannot_write(folder / CSV_NAME, problem)
    show(rows, console, csv_line)
    plot(rows, folder, console)
    page(rows, [folder], folder, console)
    board(rows, folder, console)
    tell_viewer([folder], console)


def show(rows: list[Row], console: Console, csv_line: str) -> None:
    console.print()
    table.show(rows, console)
    _line(console, csv_line)


def plot(rows: list[Row], folder: Path, console: Console) -> bool:
    """Draw `sweep.png` into a folder, and say where it is or why there is none; an older one of other runs goes.

    Returns:
        Whether there is now what there should be: a plot, or none because no run measured anything.
    """
    path, drawn = folder / PLOT_NAME, chart(rows)
    if not drawn.series:
        said, done = f"no {PLOT_NAME}: no run that ended by itself has numbers to draw.", True
    else:
        said, done = _drawn(drawn, path)
    if said != str(path):
        with suppress(OSError):
            path.unlink()
    _line(console, said)
    return done


def page(rows: list[Row], folders: Sequence[Path], folder: Path, console: Console) -> bool:
    """Make `report.html` in a folder, and say where it is or why there is none.

    Returns:
        Whether it could be written.
    """
    # With a template library, and with the plot once more; here only.
    from trainer.report.page import PAGE_NAME, write

    path = folder / PAGE_NAME
    try:
        write(rows, folders, path)
        said = str(path)
    except OSError as problem:
        said = cannot_write(path, problem)
    _line(console, said)
    return said == str(path)


def board(rows: list[Row], folder: Path, console: Console) -> bool:
    """Leave what TensorBoard shows first in the folder that the runs lie below, or say why it is not there.

    Returns:
        Whether it is there, or there is none to be made: the folder is a run's own, or no run was begun.
    """
    if (folder / FILE_NAME).exists() or all(row.error.get("kind") == "refused" for row in rows):
        return True
    # With protobufs; here only.
    from trainer.report.board import write

    try:
        write(folder, [row.folder for row in rows])
    except Exception as problem:
        # The runs are done: nothing that goes wrong in drawing them may change what the sweep came to.
        said = " ".join(f"{type(problem).__name__}: {problem}".split())
        _line(console, f"no first page for TensorBoard in {folder}: {said}")
        return False
    return True


def _drawn(what: Chart, path: Path) -> tuple[str, bool]:
    """The plot's path once it is drawn, or why it is not."""
    try:
        # Half a second of imports, and here only.
        from trainer.report.plot import save

        save(what, path)
    except OSError as problem:
        return cannot_write(path, problem), False
    except Exception as problem:
        # The runs are done and their numbers are in the CSV file: nothing that goes wrong in drawing them, in whatever
        # state the user's matplotlib is, may change what the sweep came to.
        return " ".join(f"no {PLOT_NAME}: drawing it failed: {type(problem).__name__}: {problem}".split()), False
    return str(path), True


def cannot_write(path: Path, problem: OSError) -> str:
    return f"{path} cannot be written: {problem.strerror or problem}."


def tell_viewer(folders: Sequence[Path], console: Console) -> None:
    """Say how the runs are seen in TensorBoard, as a line to be pasted."""
    short = {folder.name for folder in folders}
    names = [folder.name if len(short) == len(folders) else str(folder) for folder in folders]
    if len(folders) == 1:
        option = f"--logdir {shlex.quote(str(folders[0]))}"
    elif any(set(",:") & set(str(folder)) for folder in folders):
        # These would end a name or a folder in what follows below. Whatever else lies there is shown as well.
        option = f"--logdir {shlex.quote(os.path.commonpath([folder.resolve() for folder in folders]))}"
    else:
        spec = ",".join(f"{name}:{folder}" for name, folder in zip(names, folders, strict=True))
        option = f"--logdir_spec {shlex.quote(spec)}"
    _line(console, f"tensorboard {option}")


def _line(console: Console, text: str) -> None:
    # Not wrapped, so that paths can be copied whole.
    console.print(Text(text), soft_wrap=True)


def write_csv(rows: list[Row], folder: Path) -> None:
    """Write `sweep.csv` into a folder.

    Raises:
        OSError: it cannot be written.
    """
    flat = [dict(_cells(row)) for row in rows]
    more = sorted({name for cells in flat for name in cells} - set(CSV_COLUMNS))
    with whole(folder / CSV_NAME) as partial, partial.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, [*CSV_COLUMNS, *more], restval="")
        writer.writeheader()
        writer.writerows(flat)


def _cells(row: Row) -> Iterator[tuple[str, Any]]:
    yield from (("job", row.job), ("folder", row.folder), ("verdict", row.word))
    # A verdict that could not be read has no error of its own; why it could not is one.
    yield from _flat("error.", row.error or ({"kind": row.word, "message": row.reason} if row.reason else {}))
    if row.anomalies is not None:
        yield "anomalies", ";".join(f"{seen.kind}={seen.count}" for seen in row.anomalies) or "none"
    yield from _flat("", row.rest)
    yield from _flat("", row.run)
    yield from _flat("", row.metrics)


def _flat(prefix: str, values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Nested mappings under dotted names; lists as JSON."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(f"{prefix}{name}.", value)
        else:
            yield f"{prefix}{name}", json.dumps(value) if isinstance(value, list) else value

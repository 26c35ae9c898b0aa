"""The anomalies of several runs: a line for each run that is told by its job, on 80 columns or more."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from trainer.report import words
from trainer.report.console import STYLES
from trainer.report.rows import Row, Seen


def show(rows: list[Row], jobs: list[str], console: Console) -> None:
    """Print which anomalies every run showed and how often; nothing at all where none did."""
    if not any(row.anomalies for row in rows):
        return
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("job", overflow="fold")
    table.add_column("anomalies", overflow="fold")
    room = console.width - max(len(job) for job in ("job", *jobs)) - 2
    for job, row in zip(jobs, rows, strict=True):
        table.add_row(Text(job), Text(_told(row.anomalies, room), STYLES["anomaly"] if row.anomalies else ""))
    console.print(table)
    console.print()


def _told(anomalies: tuple[Seen, ...] | None, room: int) -> str:
    """`-` where nothing was checked."""
    if not anomalies:
        return "-" if anomalies is None else "none"
    each = [seen.kind + " " + words.share(seen.count, seen.of) for seen in anomalies]
    # Lines end between anomalies only, so that names and counts can be searched for.
    lines = [""]
    for told in (*(f"{one}," for one in each[:-1]), each[-1]):
        if lines[-1] and len(lines[-1]) + 1 + len(told) > room:
            lines.append("")
        lines[-1] = f"{lines[-1]} {told}".lstrip()
    return "\n".join(lines)

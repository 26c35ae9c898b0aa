"""A verdict on the console: what was guaranteed and what came of it, what was seen, and one last line."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import IO

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from trainer.audit.verdict import Anomaly, Guarantee, Verdict
from trainer.report import words

# A log has no width of its own; what goes into one is wrapped to this.
LOG_COLUMNS = 120
STYLES = {
    "upheld": "green",
    "violated": "bold red",
    "broken": "bold red",
    "anomaly": "yellow",
    "inconclusive": "magenta",
    "not_checked": "magenta",
}


def standard_output() -> Console:
    """The console on standard output: as wide as the terminal, or as `COLUMNS` says, or as a log.

    Only a real terminal is drawn on: `FORCE_COLOR`, which build servers set, gives colours there but no moving bar.
    """
    terminal = sys.stdout.isatty()
    width = None if terminal or os.environ.get("COLUMNS", "").isdigit() else LOG_COLUMNS
    return Console(
        width=width, force_interactive=None if terminal else False, highlight=False, markup=False, emoji=False
    )


def log_file(stream: IO[str]) -> Console:
    """A console that writes plain text into an open file."""
    return Console(
        file=stream,
        width=LOG_COLUMNS,
        color_system=None,
        force_terminal=False,
        highlight=False,
        markup=False,
        emoji=False,
    )


def show(console: Console, verdict: Verdict, folder: Path, fail_on: str) -> None:
    """Print a verdict; the last line has its word, what the exit status will be and why, and the run's folder."""
    console.print()
    if numbers := words.measured(verdict):
        console.print(Text(numbers))
    console.print()
    if told := words.told(verdict.guarantees):
        console.print(_guarantees(told))
    if untold := words.untold(verdict.guarantees):
        console.print(Text(untold, style="dim"))
        console.print()
    for anomaly in verdict.anomalies:
        _show_anomaly(console, anomaly)
    if verdict.error is not None:
        console.print(Text(words.error(verdict.error), style="bold red"))
    meaning = words.exit_meaning(verdict, fail_on)
    last = Text.assemble((verdict.verdict, STYLES[verdict.verdict]), f" ({meaning}) {folder}")
    # Not wrapped, so that the folder can be copied whole.
    console.print(last, soft_wrap=True)


def _guarantees(guarantees: list[Guarantee]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    table.add_column("guarantee", no_wrap=True)
    table.add_column("claimed", no_wrap=True)
    table.add_column("status", no_wrap=True)
    table.add_column("covers", min_width=15, overflow="fold", ratio=2)
    table.add_column("evidence", overflow="fold", ratio=5)
    for guarantee in guarantees:
        table.add_row(
            guarantee.name,
            words.claimed(guarantee),
            Text(guarantee.status, style=STYLES.get(guarantee.status, "")),
            words.covered(guarantee),
            Text(guarantee.evidence),
        )
    return table


def _show_anomaly(console: Console, anomaly: Anomaly) -> None:
    console.print(Text.assemble((anomaly.kind, STYLES["anomaly"]), f": {words.seen(anomaly)}"))
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True, style="dim")
    grid.add_column(overflow="fold")
    for title, text in words.told_of(anomaly):
        grid.add_row(title, Text(text))
    console.print(Padding(grid, (0, 0, 1, 2), expand=False))

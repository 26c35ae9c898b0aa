"""A verdict on the console: what was guaranteed and what came of it, what was seen, and one last line."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
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
    if saved := words.checkpoints(verdict):
        console.print(Text(saved))
    if faults := words.faults(verdict):
        console.print(Text(faults, style="yellow"))
    console.print()
    if told := words.told(verdict.guarantees):
        console.print(_guarantees(told))
    if untold := words.untold(verdict.guarantees):
        console.print(Text(untold, style="dim"))
        console.print()
    for anomaly in verdict.anomalies:
        _show_anomaly(console, anomaly)
    if verdict.profile:
        _show_profile(console, verdict)
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


def _show_profile(console: Console, verdict: Verdict) -> None:
    """Where a step's time goes: the phases of the steps that were traced, and what tracing itself costs."""
    metrics = verdict.metrics
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    table.add_column("where a step's time goes", no_wrap=True)
    for title in ("median", "share", "by replica"):
        table.add_column(title, no_wrap=True, justify="right")
    for phase in verdict.profile[0].share:
        shares = [row.share[phase] for row in verdict.profile]
        table.add_row(
            phase.replace("_", " "),
            _microseconds(metrics.get(f"{phase}_seconds")),
            _percent(metrics.get(f"{phase}_share")),
            f"{_percent(min(shares))} to {_percent(max(shares))}" if len(shares) > 1 else "",
        )
    table.add_row("a whole step", _microseconds(metrics.get("step_seconds")), _percent(1.0), "")
    console.print(table)
    console.print(Text(_words_of_tracing(metrics), style="dim"))
    console.print()


def _words_of_tracing(metrics: Mapping[str, float | int | None]) -> str:
    """What a profile stands on, and what it costs to have one."""
    opaque = "graph_call_share" in metrics
    said = (
        f"Of {words.number(metrics.get('profiled_micro_steps'))} micro-steps; "
        + (
            "a graph call is told whole, since nobody outside sees what it does when, "
            if opaque
            else "the critical section is all that is done under a lock, "
        )
        + "and other is what the phases leave of the step."
    )
    traced, untraced = (metrics.get(f"{name}traced_micro_steps_per_second") for name in ("", "un"))
    if traced is None or untraced is None:
        return said
    return f"{said} {words.number(traced)} micro-steps/s while they were traced, {words.number(untraced)} afterwards."


def _microseconds(seconds: float | int | None) -> str:
    return "-" if seconds is None else f"{words.number(1e6 * seconds, 3)} us"


def _percent(share: float | int | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}%"


def _show_anomaly(console: Console, anomaly: Anomaly) -> None:
    console.print(Text.assemble((anomaly.kind, STYLES["anomaly"]), f": {words.seen(anomaly)}"))
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True, style="dim")
    grid.add_column(overflow="fold")
    for title, text in words.told_of(anomaly):
        grid.add_row(title, Text(text))
    console.print(Padding(grid, (0, 0, 1, 2), expand=False))

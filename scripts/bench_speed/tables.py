"""What a run came to, as tables: for the console and, the same, for a document."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from cases import CASES
from rich import box
from rich.console import Console, JustifyMethod
from rich.table import Table as RichTable

from bench_speed.goals import Judged, judged
from bench_speed.results import Row, by_round, spread

# Whose speed the others' are told in multiples of.
AGAINST = (("plain_torch", 1), ("ddp", 2))
# Columns of words, not numbers, besides those of names.
PROSE = ("note", "why", "from start to", "when")


@dataclass(frozen=True)
class Table:
    """The first `names` columns hold names; the others numbers."""

    title: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    names: int = 1


def tables(rows: Sequence[Row]) -> list[Table]:
    """Speeds, a table for each model; memory and start-up; the goals; and what could not be measured."""
    models = dict.fromkeys(row.model for row in rows if row.kind == "speed")
    every = [*(speeds(rows, model) for model in models), starts(rows), memory(rows), goals(rows), failures(rows)]
    return [table for table in every if table.rows]


def speeds(rows: Sequence[Row], model: str) -> Table:
    """Fastest first."""
    found = by_round([row for row in rows if row.model == model], "speed", "micro_steps_per_second")
    medians = {(name, replicas): statistics.median(values.values()) for (_, name, replicas), values in found.items()}
    lines = []
    for name, replicas in sorted(medians, key=lambda key: -medians[key]):
        values = list(found[model, name, replicas].values())
        median, least, most = spread(values)
        ratios = (f"{median / medians[one]:.2f}" if one in medians else "-" for one in AGAINST)
        cells = (name, str(replicas), number(median), f"{number(least)} to {number(most)}", str(len(values)), *ratios)
        lines.append(cells)
    against = (f"x {name} {replicas}" for name, replicas in AGAINST)
    head = ("contender", "replicas", "micro-steps/s", "least to most", "rounds", *against)
    return Table(CASES[model].told, head, lines)


def starts(rows: Sequence[Row]) -> Table:
    """Start-up: of the rivals to the end of the first step, of ours to the exit of a run of one step."""
    lines = []
    for kind, column, until in (
        ("start", "wall_seconds", "exit after one step"),
        ("speed", "start_to_first_step_seconds", "first step"),
    ):
        for (model, name, replicas), values in by_round(rows, kind, column).items():
            median, least, most = spread(list(values.values()))
            seconds = (f"{median:.2f}", f"{least:.2f} to {most:.2f}")
            lines.append((name, model, str(replicas), until, *seconds))
    lines.sort(key=lambda line: (list(CASES).index(line[1]), float(line[4])))
    head = ("contender", "model", "replicas", "from start to", "seconds", "least to most")
    return Table("Start-up", head, [line for line in lines if line[1] == lines[0][1]], names=2)


def memory(rows: Sequence[Row]) -> Table:
    """Peak of ours in runs for the purpose; of rivals what all their processes held after the last step."""
    lines = []
    for kind, column, what in (("memory", "peak_rss_bytes", "peak"), ("speed", "pss_bytes", "after the last step")):
        for (model, name, replicas), values in by_round(rows, kind, column).items():
            if model == "mlp":
                median, least, most = (each / 1e6 for each in spread(list(values.values())))
                lines.append((name, str(replicas), what, f"{median:.0f}", f"{least:.0f} to {most:.0f}"))
    head = ("contender", "replicas", "when", "MB", "least to most")
    return Table(f"Memory, {CASES['mlp'].told}", head, lines)


def goals(rows: Sequence[Row]) -> Table:
    head = ("goal", "model", "engine", "asked", "measured", "least to most", "reached", "note")
    return Table("Goals", head, [_goal(one) for one in judged(rows)], names=3)


def failures(rows: Sequence[Row]) -> Table:
    failed = {(row.contender, row.model, str(row.replicas), row.error): None for row in rows if row.error}
    return Table("Not measured", ("contender", "model", "replicas", "why"), list(failed), names=2)


def _goal(one: Judged) -> tuple[str, ...]:
    asked = f"{'at most' if one.at_most else 'at least'} {one.goal:.3g}{one.unit}"
    named = (one.told, one.model, one.engine or "-", asked)
    if not one.figures:
        return (*named, "-", "-", "not measured", one.note)
    median, least, most = spread(one.figures)
    measured = (f"{median:.3g}{one.unit}", f"{least:.3g} to {most:.3g}")
    return (*named, *measured, "yes" if one.reached else "no", one.note)


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def show(every: Sequence[Table], console: Console) -> None:
    for table in every:
        rich = RichTable(title=table.title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        for position, head in enumerate(table.head):
            side: JustifyMethod = "left" if _named(table, position) else "right"
            # Names are not broken in two, so that they can be searched for.
            rich.add_column(head, justify=side, overflow="fold", no_wrap=position < table.names)
        for line in table.rows:
            rich.add_row(*line)
        console.print(rich)
        console.print()


def markdown(every: Sequence[Table]) -> str:
    return "\n\n".join("\n".join((f"### {table.title}", "", *_lines(table))) for table in every)


def _lines(table: Table) -> Iterator[str]:
    yield _line(table.head)
    yield _line("---" if _named(table, position) else "---:" for position in range(len(table.head)))
    yield from map(_line, table.rows)


def _named(table: Table, position: int) -> bool:
    return position < table.names or table.head[position] in PROSE


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"

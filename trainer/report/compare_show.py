"""Two runs beside each other on the console, and their losses as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from trainer.report import words
from trainer.report.compare import EVENTS, Comparison, Parting, loss
from trainer.report.plot import settings
from trainer.whole_file import whole

# Curves told by name; the rest is counted.
CURVES = 12
DIGITS = 16
INCHES, DOTS_PER_INCH = (9.0, 5.5), 120


def show(what: Comparison, console: Console) -> None:
    for letter, side in zip("AB", what.sides, strict=True):
        _line(console, f"{letter}  {side.folder}  {side.verdict.verdict}")
    console.print()
    _pairs(console, "configuration", what.config, "the same configuration")
    _pairs(console, "result", what.results, "the same verdict, digest, updates kept, loss and accuracy")
    judged = all(side.verdict.guarantees for side in what.sides)
    none = "the same status of every guarantee" if judged else "no guarantees to compare: a run that broke has none"
    _pairs(console, "guarantee", what.guarantees, none)
    _curves(console, what.partings)
    if what.speed is not None:
        _line(console, f"B ran at {what.speed:.3g} times the speed of A.")
    _line(console, verdict(what))


def verdict(what: Comparison) -> str:
    """The last line: the same, or where they part first."""
    if not what.compared:
        return "different, as far as one can tell: the runs have nothing in common that could be compared."
    if what.same:
        return f"the same: {_scope(what)}."
    parted = [each for each in what.partings if each.first is not None]
    if not parted:
        return f"different, though {_scope(what)}."
    losses = [each for each in parted if each.name.startswith("train/loss/")]
    first = (losses or parted)[0]
    together = ", ".join(each.name for each in (losses or parted) if each.first == first.first)
    return f"different: they part {_when(first)}, first in {together}."


def _scope(what: Comparison) -> str:
    points = sum(each.points for each in what.partings)
    digests = [side.verdict.final_parameters_sha256 for side in what.sides]
    bits = "the final parameters have the same bits and " if digests[0] and digests[0] == digests[1] else ""
    return f"{bits}{points:,} points of {len(what.partings)} curves agree"


def _when(what: Parting) -> str:
    """At a step; where only some steps have points, between which of them."""
    if what.first is None:
        return "nowhere"
    if what.first == (0 if what.before is None else what.before + 1):
        return f"at step {what.first}"
    return f"by step {what.first}" if what.before is None else f"after step {what.before}, by step {what.first}"


def _pairs(console: Console, title: str, pairs: Mapping[str, tuple[str, str]], none: str) -> None:
    if not pairs:
        _line(console, none)
        return
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for head in (title, "A", "B"):
        table.add_column(head, overflow="fold")
    for name, values in pairs.items():
        # Of a digest so much that it can be told from another.
        table.add_row(Text(name), *(Text(each[:DIGITS] if name.endswith("sha256") else each) for each in values))
    console.print(table)
    console.print()


def _curves(console: Console, partings: tuple[Parting, ...]) -> None:
    apart = [each for each in partings if each.first is not None]
    if apart:
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        for head in ("curve", "parts", "A there", "B there", "largest difference", "from"):
            table.add_column(head, overflow="fold")
        for each in apart[:CURVES]:
            distance, step = each.largest
            told = "not a number" if math.isnan(distance) else words.number(distance, 3)
            values = [Text(words.number(value, 7)) for value in each.values]
            where = Text(f"{told} at step {step}")
            table.add_row(
                Text(each.name), Text(_when(each)), *values, where, Text(f"{each.points} points, {each.source}")
            )
        console.print(table)
        if len(apart) > CURVES:
            _line(console, f"and {len(apart) - CURVES} curves more that part at the same step or later")
    _line(console, f"{len(partings) - len(apart)} of {len(partings)} curves agree at every step that both runs have.")
    if any(each.source == EVENTS and each.name.startswith("train/loss") for each in partings):
        _line(
            console, "Losses are those of the event files, every train.log_every steps; audit=full keeps every step's."
        )


def _line(console: Console, text: str) -> None:
    console.print(Text(text), soft_wrap=True)


def draw(what: Comparison, path: Path) -> bool:
    """Draw both losses and their difference into a PNG file, whole or not at all.

    Returns:
        Whether there was anything to draw.

    Raises:
        OSError: the file cannot be written.
    """
    ours, theirs = (loss(side) for side in what.sides)
    if not ours and not theirs:
        return False
    with settings():
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=INCHES, dpi=DOTS_PER_INCH, layout="constrained")
        FigureCanvasAgg(figure)
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
        for letter, points, side, colour in zip("AB", (ours, theirs), what.sides, ("#0072B2", "#D55E00"), strict=True):
            label = f"{letter}: {side.folder.resolve().name}"
            upper.plot(list(points), list(points.values()), color=colour, label=label, alpha=0.85, linewidth=1.4)
        upper.set_title("loss, mean over replicas", fontsize=9, loc="left")
        upper.legend(frameon=False, fontsize=9)
        steps = sorted(set(ours) & set(theirs))
        lower.plot(steps, [theirs[step] - ours[step] for step in steps], color="#444444", linewidth=1.2)
        lower.axhline(0, color="#BBBBBB", linewidth=0.8, zorder=0)
        lower.set_title("B minus A", fontsize=9, loc="left")
        lower.set_xlabel("step")
        with whole(path) as partial:
            figure.savefig(partial, format="png")
    return True

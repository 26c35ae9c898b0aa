"""The plot of several runs: updates kept, throughput, staleness and loss over the number of replicas, by update mode.

matplotlib is imported when a plot is drawn and not before. Its `pyplot` is left alone: no window system is asked for.
"""

from __future__ import annotations

import io
import logging
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from trainer.report.panels import GREY, IDEAL_LINE, LIGHT, PANELS, Style, bars, lines, named, styles
from trainer.report.series import Chart
from trainer.whole_file import whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DOTS_PER_INCH = 120
INCHES_WIDE = 13.0
# Characters that fit an inch, of the title and of the caption.
TITLE_CHARACTERS, CHARACTERS = 8, 15
# From so many series on, panels stand one above the other: points at one number of replicas need the width.
MANY = 6
# Colours that a page with light and dark dress sets by itself: ink, its greys, and what hollow points are filled with.
INKS = {"#000000": "ink", GREY.lower(): "grey", LIGHT.lower(): "faint", "#ffffff": "paper"}
SETTINGS: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    # Names are the user's: a dollar sign in one begins no formula.
    "text.parse_math": False,
}


def save(chart: Chart, path: Path) -> None:
    """Draw the chart into a PNG file, so that a reader sees the whole file or none.

    Raises:
        OSError: the file cannot be written.
    """
    with whole(path) as partial, settings():
        draw(chart).savefig(partial, format="png")


def svg(chart: Chart) -> str:
    """The same as one `<svg>` element without title and caption, to stand in a page that has them as text.

    Black, greys and white are `var(--ink)`, `var(--grey)`, `var(--faint)` and `var(--paper)`; what is filled with black
    says nothing of it, and takes the fill of whatever it stands in.
    """
    drawn = io.StringIO()
    with settings({"svg.hashsalt": "sweep"}):
        nameless = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        draw(chart, bare=True).savefig(drawn, format="svg", transparent=True, metadata=nameless)
    text = drawn.getvalue()
    for colour, name in INKS.items():
        text = text.replace(colour, f"var(--{name})")
    return text[text.index("<svg") :]


def draw(chart: Chart, *, bare: bool = False) -> Figure:
    """A panel for each measure, with the legend beside them where points are told apart by more than their place.

    Args:
        bare: leave title and caption out.
    """
    with settings():
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(INCHES_WIDE, _height(chart, bare=bare)), dpi=DOTS_PER_INCH, layout="constrained")
        FigureCanvasAgg(figure)
        looks, stacked, over = styles(chart), _stacked(chart), len(chart.num_replicas) > 1
        grid = figure.subplots(*_grid(chart), sharex=stacked, sharey=not over)
        for panel, axes in zip(PANELS, grid.flat, strict=True):
            axes.set_title(panel.title, fontsize=9, loc="left")
            (lines if over else bars)(axes, chart, panel, looks)
            if stacked:
                axes.label_outer()
            if not any(series.points[panel.measure] for series in chart.series):
                axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color=GREY)
        if over:
            _legend(figure, chart, looks)
        if bare:
            return figure
        figure.suptitle("\n".join(_title_lines(chart)), x=0.01, ha="left", fontsize=10, fontweight="bold")
        figure.supxlabel("\n".join(_caption_lines(chart)), x=0.01, ha="left", fontsize=8, color=GREY)
    return figure


@contextmanager
def settings(more: Mapping[Any, Any] = MappingProxyType({})) -> Iterator[None]:
    """Whatever the user has set for plots of their own, these look the same everywhere; nothing is said but errors."""
    # Its first use on a machine builds a cache of fonts and says so.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        # A letter that the font lacks is drawn as a box; saying so after a sweep helps nobody.
        warnings.simplefilter("ignore", UserWarning)
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({**SETTINGS, **more})
        yield


def title(chart: Chart) -> str:
    """What all runs drawn have in common, so that a picture far from its folder says what it shows."""
    common, parts = chart.common, [" and ".join(chart.strategies)]
    parts += [str(common[name]) for name in ("model", "data", "optimizer", "precision") if name in common]
    parts += [f"{name.replace('_', ' ')} {common[name]}" for name in ("steps", "batch_size", "seed") if name in common]
    if len(chart.num_replicas) == 1:
        parts.append(f"{chart.num_replicas[0]} replica{'s' if chart.num_replicas[0] > 1 else ''}")
    return ", ".join(parts)


def caption(chart: Chart) -> list[str]:
    """What the plot itself cannot say."""
    said = ["Filled: the mode claims that no update is lost. Hollow: it does not claim it."]
    if chart.most_runs > 1:
        over = "; ".join(
            f"{name} {', '.join(values) if len(values) <= 6 else f'({len(values)} values)'}".strip()
            for name, values in chart.varied.items()
        )
        points = f"Means over up to {chart.most_runs} runs{f', which differ in {over}' if over else ''}"
        said.append(f"{points}. Whiskers from the least to the largest run.")
    if chart.ideal is not None and len(chart.num_replicas) > 1:
        threads = f"{chart.ideal.threads} thread{'s' if chart.ideal.threads > 1 else ''}"
        cores = f"{chart.ideal.cores} core{'s' if chart.ideal.cores > 1 else ''}"
        said.append(
            f"Dashed: the throughput of the fastest single replica, which had {threads}, times the replicas; level "
            f"from the machine's {cores} on."
        )
    uncounted = f", {chart.uncounted} of them without a count of updates" if chart.uncounted else ""
    left_out = ", ".join(f"{number} {why}" for why, number in chart.left_out.items())
    said.append(f"Runs drawn: {chart.num_runs}{uncounted}." + (f" Not drawn: {left_out}." if left_out else ""))
    return said


def _title_lines(chart: Chart) -> list[str]:
    return textwrap.wrap(title(chart), int(TITLE_CHARACTERS * INCHES_WIDE))


def _caption_lines(chart: Chart) -> list[str]:
    return [line for each in caption(chart) for line in textwrap.wrap(each, int(CHARACTERS * INCHES_WIDE))]


def _grid(chart: Chart) -> tuple[int, int]:
    """Rows and columns of panels: bars side by side, since they share their names."""
    if len(chart.num_replicas) == 1:
        return 1, len(PANELS)
    return (len(PANELS), 1) if _stacked(chart) else (2, len(PANELS) // 2)


def _height(chart: Chart, *, bare: bool) -> float:
    """Inches, so that there is room for every bar, and for the legend beside the panels."""
    texts = 0.7 if bare else 0.7 + 0.2 * len(_title_lines(chart)) + 0.15 * len(_caption_lines(chart))
    if len(chart.num_replicas) == 1:
        return texts + 0.4 + 0.32 * len(chart.series)
    return texts + (11.2 if _stacked(chart) else 5.4)


def _stacked(chart: Chart) -> bool:
    return len(chart.num_replicas) > 1 and len(chart.series) >= MANY


def _legend(figure: Figure, chart: Chart, looks: Sequence[Style]) -> None:
    """Beside the panels, the modes that claim to keep every update before the others."""
    from matplotlib.lines import Line2D

    entries = sorted(zip(chart.series, looks, strict=True), key=lambda entry: not entry[1].filled)
    handles = [Line2D([], [], label=named(chart, series), **look.line_and_points()) for series, look in entries]
    if chart.ideal is not None:
        handles.append(Line2D([], [], label="ideal", **IDEAL_LINE))
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=9, handlelength=3.2)

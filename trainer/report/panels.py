"""One panel of the plot: lines over the number of replicas, or bars side by side where there is one number only.

Colours tell update modes apart (Okabe and Ito's, which colour-blind readers can), and so do markers: filled where the
mode claims that no update is lost, hollow where it does not. Lines tell strategies apart.

matplotlib is imported by whoever draws.
"""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainer.report import words
from trainer.report.series import Chart, Point, Series
from trainer.updates.mechanisms import MODES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9", "#8C8C8C")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p", "<", "h", ">", "d", "8", "*")
LINES = ("-", "--", ":", "-.")
GREY, LIGHT = "#444444", "#E0E0E0"
# How far points at one number of replicas stand apart, and how far the first from the last at most, as shares of the
# way to the next number.
ASIDE, SPREAD = 0.06, 0.7
# Labels that have room beside each other.
LABELS = 16
# How far above the highest point the ideal may reach, as a factor; beyond, points would have too little room.
IDEAL_ABOVE = 2
NAME_CHARACTERS = 30
# From here on a linear axis shows either the mean or the largest staleness, but not both.
LARGE_STALENESS = 10
# Then the part up to 1 is linear and takes so much of what a decade takes.
PART_TO_1 = 0.6
IDEAL_LINE: dict[str, Any] = {"color": GREY, "linestyle": (0, (5, 3)), "linewidth": 1, "zorder": 1}


@dataclass(frozen=True)
class Panel:
    """One measure's panel; `told` says a point in words."""

    measure: str
    title: str
    told: Callable[[Point], str]


PANELS = (
    Panel("kept_share", "updates kept, % of expected", lambda point: f"{100 * point.mean:.3g}%"),
    Panel("throughput", "throughput, micro-steps/s", lambda point: words.number(point.mean, 3)),
    Panel(
        "staleness",
        "staleness in updates, mean to largest",
        lambda point: f"{words.number(point.mean, 2)}, max {words.number(point.high)}",
    ),
    Panel("loss", "loss at the last step", lambda point: words.number(point.mean, 3)),
)


@dataclass(frozen=True)
class Style:
    """How the points of one series look."""

    colour: str
    marker: str
    line: str
    filled: bool

    @property
    def face(self) -> str:
        return self.colour if self.filled else "white"

    def line_and_points(self) -> dict[str, Any]:
        points = {"marker": self.marker, "markerfacecolor": self.face, "markersize": 6}
        return {"color": self.colour, "linestyle": self.line, "linewidth": 1.2, **points}


def styles(chart: Chart) -> list[Style]:
    """A style for each series; a mode's is the same in every plot, but for a colour that another mode has taken."""
    known = list(MODES)
    modes = list(dict.fromkeys(each.update_mode for each in chart.series))
    numbers = {mode: known.index(mode) if mode in known else len(known) + modes.index(mode) for mode in modes}
    colours: dict[str, str] = {}
    for mode, number in numbers.items():
        first = number % len(COLOURS)
        turned = COLOURS[first:] + COLOURS[:first]
        colours[mode] = next((colour for colour in turned if colour not in colours.values()), turned[0])
    return [
        Style(
            colours[each.update_mode],
            MARKERS[numbers[each.update_mode] % len(MARKERS)],
            LINES[chart.strategies.index(each.strategy) % len(LINES)],
            each.keeps,
        )
        for each in chart.series
    ]


def named(chart: Chart, series: Series) -> str:
    """A series' name on lines short enough to leave the panels their room."""
    return textwrap.fill(chart.name(series), NAME_CHARACTERS)


def lines(axes: Axes, chart: Chart, panel: Panel, styles: Sequence[Style]) -> None:
    """Twice as many replicas are equally far apart; at each number, the modes' points side by side, so that none hides
    another."""
    places = {count: math.log2(count) for count in chart.num_replicas}
    nearest = min((after - before for before, after in itertools.pairwise(places.values())), default=1.0)
    apart = min(ASIDE, SPREAD / len(styles)) * min(1.0, nearest)
    for position, (series, style) in enumerate(zip(chart.series, styles, strict=True)):
        if not (own := series.points[panel.measure]):
            continue
        aside = apart * (position - (len(styles) - 1) / 2)
        _, caps, whiskers = axes.errorbar(
            [places[point.num_replicas] + aside for point in own],
            [point.mean for point in own],
            yerr=_whiskers(own),
            elinewidth=0.8,
            capsize=2,
            # Whole markers at 0, too.
            clip_on=False,
            **style.line_and_points(),
        )
        for part in (*caps, *whiskers):
            part.set_alpha(0.6)
    if panel.measure == "throughput":
        _ideal(axes, chart)
    shown = _labelled(places)
    axes.set_xticks([places[count] for count in shown], [str(count) for count in shown])
    axes.set_xlim(min(places.values()) - 0.5, max(places.values()) + 0.5)
    axes.set_xlabel("replicas, on a logarithmic scale")
    axes.grid(axis="y", color=LIGHT, linewidth=0.6)
    _scale(axes, chart, panel, room=0.08, vertical=True)


def _labelled(places: Mapping[int, float]) -> list[int]:
    """The numbers of replicas whose labels have room, powers of two before others."""
    room = (max(places.values()) - min(places.values()) + 1) / LABELS
    shown: list[int] = []
    for count in sorted(places, key=lambda count: (count & (count - 1) != 0, count)):
        if all(abs(places[count] - places[other]) >= room for other in shown):
            shown.append(count)
    return sorted(shown)


def _ideal(axes: Axes, chart: Chart) -> None:
    if chart.ideal is not None:
        first, last = chart.num_replicas[0], chart.num_replicas[-1]
        bend = min(max(chart.ideal.cores, first), last)
        counts = [first * (bend / first) ** (at / 32) for at in range(33)] + [float(last)]
        axes.plot([math.log2(count) for count in counts], [chart.ideal.of(count) for count in counts], **IDEAL_LINE)


def bars(axes: Axes, chart: Chart, panel: Panel, styles: Sequence[Style]) -> None:
    """A bar for each series, with its number beside it."""
    for position, (series, style) in enumerate(zip(chart.series, styles, strict=True)):
        for point in series.points[panel.measure]:
            axes.barh(position, point.mean, height=0.6, color=style.face, edgecolor=style.colour)
            if point.low < point.high:
                reach = _whiskers([point])
                axes.errorbar([point.mean], [position], xerr=reach, fmt="none", ecolor=GREY, elinewidth=0.8, capsize=2)
            axes.annotate(
                panel.told(point),
                (point.high, position),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
    axes.set_ylim(len(styles) - 0.5, -0.5)
    axes.set_yticks(range(len(styles)), [named(chart, series) for series in chart.series])
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=LIGHT, linewidth=0.6)
    _scale(axes, chart, panel, room=0.4, vertical=False)


def _whiskers(points: Sequence[Point]) -> list[list[float]]:
    """How far below and above its mean each point reaches."""
    return [[point.mean - point.low for point in points], [point.high - point.mean for point in points]]


def _scale(axes: Axes, chart: Chart, panel: Panel, *, room: float, vertical: bool) -> None:
    """Begin at 0, and leave room beyond the largest: so much of what it takes itself."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

    axis = axes.yaxis if vertical else axes.xaxis
    set_limits, set_scale = (axes.set_ylim, axes.set_yscale) if vertical else (axes.set_xlim, axes.set_xscale)
    largest = max((point.high for series in chart.series for point in series.points[panel.measure]), default=1.0) or 1.0
    if panel.measure == "throughput" and vertical and chart.ideal is not None:
        largest = max(largest, min(chart.ideal.of(chart.num_replicas[-1]), IDEAL_ABOVE * largest))
    if panel.measure == "staleness" and largest > LARGE_STALENESS:
        set_scale("symlog", linthresh=1, linscale=0.9 * PART_TO_1)
        set_limits(0, 10 ** ((1 + room) * (math.log10(largest) + PART_TO_1) - PART_TO_1))
    elif panel.measure == "kept_share":
        set_limits(0, (1 + room) * max(largest, 1.0))
        axis.set_ticks([0, 0.25, 0.5, 0.75, 1])
        axis.set_major_formatter(PercentFormatter(xmax=1))
        return
    else:
        set_limits(0, (1 + room) * largest)
        axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))

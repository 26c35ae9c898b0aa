"""The plot: micro-steps per second of everybody, a panel for each model, bars as medians with whiskers over rounds.

`pyplot` is left alone: no window system is asked for.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cases import CASES

from bench_speed.results import Key, Row, by_round
from bench_speed.tables import number
from trainer.whole_file import whole

OURS, RIVAL = "#1f6f8b", "#b0b0b0"
INCHES_WIDE, INCHES_A_BAR, INCHES_A_PANEL = 9.0, 0.22, 0.7
DOTS_PER_INCH = 120


def save(rows: Sequence[Row], path: Path) -> None:
    """Draw a PNG file, so that a reader sees the whole file or none.

    Raises:
        ValueError: no row has a speed.
        OSError: the file cannot be written.
    """
    speeds = by_round(rows, "speed", "micro_steps_per_second")
    if not speeds:
        raise ValueError("There is nothing to draw: no speed was measured.")
    # Its first use on a machine builds a cache of fonts and says so.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels: dict[str, list[Key]] = {}
    for key in speeds:
        panels.setdefault(key[0], []).append(key)
    bars = [len(keys) for keys in panels.values()]
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False})
        height = INCHES_A_BAR * sum(bars) + INCHES_A_PANEL * (len(bars) + 1)
        figure = Figure(figsize=(INCHES_WIDE, height), dpi=DOTS_PER_INCH, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(len(bars), 1, squeeze=False, gridspec_kw={"height_ratios": bars})[:, 0]
        for each, (model, keys) in zip(axes, panels.items(), strict=True):
            _panel(each, CASES[model].told, {key: list(speeds[key].values()) for key in keys}, rows)
        figure.suptitle(_title(rows), x=0.01, ha="left", fontsize=8)
        with whole(path) as partial:
            figure.savefig(partial, format="png")


def _panel(axes: Any, told: str, speeds: dict[Key, list[float]], rows: Sequence[Row]) -> None:
    keys = sorted(speeds, key=lambda key: statistics.median(speeds[key]))
    medians = [statistics.median(speeds[key]) for key in keys]
    below = [median - min(speeds[key]) for key, median in zip(keys, medians, strict=True)]
    above = [max(speeds[key]) - median for key, median in zip(keys, medians, strict=True)]
    ours = {row.contender for row in rows if row.contender.startswith(("threads/", "mirrored/"))}
    bars = axes.barh(
        [f"{name}, {replicas}" for _, name, replicas in keys],
        medians,
        xerr=(below, above),
        color=[OURS if name in ours else RIVAL for _, name, _ in keys],
        error_kw={"elinewidth": 0.8},
    )
    # Beside the bars: from tens of thousands down to hundreds in one panel, the shortest ones cannot be read off.
    labels = axes.bar_label(bars, [number(median) for median in medians], padding=3, fontsize=7)
    for label in labels:
        label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.3})
    axes.set_title(told, fontsize=9, loc="left")
    axes.margins(x=0.08, y=0.01)


def _title(rows: Sequence[Row]) -> str:
    rounds = len({row.round for row in rows})
    return (
        f"Micro-steps per second by contender and number of replicas: medians of {rounds} "
        f"round{'s' if rounds > 1 else ''}, least to most.\n{rows[0].machine}"
    )

"""Predictions as a picture: four figures over the number of replicas, a line for each mode and layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from extrapolation.predict import Prediction

PANELS = (
    ("micro_steps_per_second", "micro-steps per second", "log"),
    ("lock_wait_us", "waiting for locks, us a micro-step", "symlog"),
    ("staleness_mean", "staleness, mean", "symlog"),
    ("lost_percent", "lost updates, %", "linear"),
)


def save(rows: Sequence[Prediction], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 2, figsize=(12, 9), layout="constrained")
    modes = list(dict.fromkeys(row.mode for row in rows))
    for (column, told, scale), axes in zip(PANELS, panels.flat, strict=True):
        for layout, style in zip(dict.fromkeys(row.layout for row in rows), ("-", "--", ":", "-."), strict=False):
            for place, mode in enumerate(modes):
                line = [row for row in rows if (row.mode, row.layout) == (mode, layout)]
                points = [(row.replicas, getattr(row, column)) for row in line if getattr(row, column) is not None]
                if points:
                    label = mode if layout == "flat" else f"{mode}, {layout}"
                    axes.plot(*zip(*points, strict=True), style, color=f"C{place}", marker=".", label=label)
        axes.set(xscale="log", yscale=scale, xlabel="replicas", title=told)
        axes.grid(alpha=0.3)
    figure.legend(*panels.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)

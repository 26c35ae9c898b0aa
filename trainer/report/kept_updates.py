"""Where updates were kept and where they were lost: by variable and replica, off the canaries of every run."""

from __future__ import annotations

import math

import numpy as np

from trainer.audit.records import RunRecord
from trainer.report.grid import BLUE, LILAC, ORANGE, PAPER, Cell, Grid, between

MOST_VARIABLES, MOST_REPLICAS = 14, 12

LEGEND = ((BLUE, "all kept"), (PAPER, "half"), (ORANGE, "none kept"))


def by_variable(record: RunRecord) -> Grid | None:
    """A row for each shared variable, those with the fewest first where there is no room for all; None before the end.

    A replica's update counts as kept where both ends of the variable hold it in every copy.
    """
    if record.copies is None:
        return None
    layout = record.layout
    chosen = layout.transacted
    segments = [segment for segment, own in zip(layout.segments, chosen, strict=True) if own]
    # [copies, segments, head and tail, replicas]
    counts = record.copies[:, layout.canaries[chosen]]
    least, most = counts.min(axis=(0, 2)), counts.max(axis=(0, 2))
    made = np.array([max(1, replica.steps_done) for replica in record.replicas])
    multiplied = bool((most > made).any())
    places = np.argsort(np.where(most > made, -1, least / made).min(axis=1), kind="stable")[:MOST_VARIABLES]
    replicas = range(min(record.num_replicas, MOST_REPLICAS))
    lost = int((~(least >= made)).any(axis=1).sum())
    return Grid(
        title=f"updates kept: {lost} of {len(segments)} variables lost some",
        caption=_caption(record, len(segments)),
        rows=[segments[place].name for place in sorted(places)],
        columns=[str(replica) for replica in replicas],
        cells=[
            [_cell(float(least[place, own]), float(most[place, own]), int(made[own])) for own in replicas]
            for place in sorted(places)
        ],
        legend=(*LEGEND, *([(LILAC, "applied more than once")] if multiplied else [])),
        across="replica",
        down="variable",
    )


def _caption(record: RunRecord, variables: int) -> str:
    made = {replica.steps_done for replica in record.replicas}
    of = f"{min(made):,}" if len(made) == 1 else f"{min(made):,} to {max(made):,}"
    said = f"Of {of} made by each replica: the least at either end, in any copy."
    if variables > MOST_VARIABLES:
        said += f" The {MOST_VARIABLES} variables that kept the fewest."
    if record.num_replicas > MOST_REPLICAS:
        said += f" Replicas 0 to {MOST_REPLICAS - 1}."
    return said


def _cell(least: float, most: float, made: int) -> Cell:
    if not (math.isfinite(least) and math.isfinite(most)):
        return Cell("?", LILAC)
    if most > made:
        return Cell(f"{most:,.0f}", LILAC)
    return Cell(f"{least:,.0f}", between(2 * least / made - 1))

"""Pairwise cosines between replicas' gradients, a matrix for each step of which the gradients were kept whole."""

from __future__ import annotations

import math
from collections import Counter

from trainer.audit.gradients import cosines
from trainer.audit.records import RunRecord
from trainer.report.grid import BLUE, ORANGE, PAPER, Cell, Grid, between

# Steps that are drawn, the first, the last and one between them, of fewer replicas; and columns in all.
MOST_STEPS, MOST_COLUMNS = 3, 15
# Replicas up to which a cell has room for its number, and up to which a matrix is drawn at all.
WITH_NUMBERS, MOST_REPLICAS = 10, 32

LEGEND = ((BLUE, "1: same direction"), (PAPER, "0"), (ORANGE, "-1: opposite"))


def matrices(record: RunRecord) -> Grid | None:
    """What is drawn of the run; None where no two replicas' gradients of one step were kept."""
    kept = Counter(reference.step for reference in record.references)
    most = max(kept.values(), default=0)
    steps = sorted(step for step, gradients in kept.items() if gradients == most)
    if not 1 < most <= MOST_REPLICAS:
        return None
    number = max(1, min(MOST_STEPS, MOST_COLUMNS // most, len(steps)))
    # The last alone, or from the first to the last.
    chosen = [steps[-1 - part * (len(steps) - 1) // max(1, number - 1)] for part in reversed(range(number))]
    return _grid({step: cosines(record, step) for step in chosen})


def _grid(found: dict[int, dict[int, dict[int, float]]]) -> Grid:
    values = [
        value
        for matrix in found.values()
        for one, row in matrix.items()
        for other, value in row.items()
        if one < other and math.isfinite(value)
    ]
    matrices = list(found.values())
    replicas = sorted(matrices[0])
    least = f", least {min(values):.2f}" if values else ""
    return Grid(
        title=f"cosine between replicas' gradients{least}",
        caption="",
        rows=[str(replica) for replica in replicas],
        columns=[str(replica) for _ in matrices for replica in replicas],
        cells=[
            [
                _cell(matrix[one].get(other, math.nan), numbers=len(replicas) <= WITH_NUMBERS)
                for matrix in matrices
                for other in replicas
            ]
            for one in replicas
        ],
        legend=LEGEND,
        groups=[f"step {step:,}" for step in found],
        down="replica",
    )


def _cell(value: float, *, numbers: bool) -> Cell:
    if not math.isfinite(value):
        return Cell("?" if numbers else "")
    return Cell(f"{value:.2f}" if numbers else "", between(value))

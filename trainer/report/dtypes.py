"""What the heat map of a run's precision shows: for each replica, columns of steps with the dtypes read off them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.audit.records import DTYPES, RunRecord

Codes = NDArray[np.int64]
Marks = NDArray[np.bool_]

# For steps that a replica did not come to; other codes are places in `DTYPES`.
NOT_DONE = -1
# So many fill the picture's width at three pixels each. TensorBoard first shows it at about a third of its size, by
# leaving pixels out: a single step that was off must keep one.
MOST_COLUMNS = 266


@dataclass(frozen=True)
class HeatMap:
    """Everything that is drawn.

    Attributes:
        activations: codes, int64 [replicas, columns]: of the column's first step that was off, or else of its first
            step that tells a dtype.
        gradients: likewise; None where none was ever computed in another dtype than the activations.
        off: bool [replicas, columns], where activations or gradients of any of the column's steps were off.
        steps_off: each replica's steps that were off, int64 [replicas].
        steps: of the replica that came furthest; the last column may have fewer than `steps_per_column`.
    """

    activations: Codes
    gradients: Codes | None
    off: Marks
    steps_off: Codes
    steps: int
    steps_per_column: int
    title: str
    caption: str


def heat_map(record: RunRecord) -> HeatMap | None:
    """Gather what is drawn from the steps that were read off; None where they tell no dtype."""
    asked, activations, gradients = _codes(record)
    told = (activations > 0) | (gradients > 0)
    if not told.any():
        return None
    activations_off, gradients_off = ((codes > 0) & (codes != asked) for codes in (activations, gradients))
    off, apart = activations_off | gradients_off, bool(((gradients > 0) & (gradients != activations)).any())
    steps: int = off.shape[1]
    width = -(-steps // MOST_COLUMNS)
    counts = Counter(asked[asked > 0].tolist()).most_common()
    caption = [f"Asked for: {', '.join(f'{DTYPES[code]} in {count:,}' for code, count in counts)}."]
    if apart:
        caption.append(f"Wide bands: activations, off in {activations_off.sum():,};")
        caption.append(f"narrow bands below: gradients, off in {gradients_off.sum():,}.")
    if width > 1:
        caption.append(f"A column is {width:,} steps and shows the first of them that was off, if one was.")
    return HeatMap(
        _shown(activations, activations_off, width),
        _shown(gradients, gradients_off, width) if apart else None,
        np.any(_columns(off, width), axis=2),
        off.sum(axis=1),
        steps,
        width,
        f"precision by replica and step: off in {off.sum():,} of {told.sum():,}",
        " ".join(caption),
    )


def _codes(record: RunRecord) -> tuple[Codes, Codes, Codes]:
    """What was asked for, and what was read off activations and gradients: int64 [replicas, steps] each."""
    done = [replica.computed.total() for replica in record.replicas]
    asked, activations, gradients = (np.full((len(done), max(done)), NOT_DONE, np.int64) for _ in range(3))
    for row, (replica, steps) in enumerate(zip(record.replicas, done, strict=True)):
        asked[row, :steps] = replica.column("asked")[:steps]
        activations[row, :steps] = replica.computed_in[:steps]
        gradients[row, :steps] = replica.gradients_in[:steps]
    return asked, activations, gradients


def _shown(codes: Codes, off: Marks, width: int) -> Codes:
    """The code that each column shows."""
    # Steps that were not done are the least, and so is what fills the last column up.
    rank = _columns(np.where(codes == NOT_DONE, 0, 1 + (codes > 0) + off), width)
    place = rank.argmax(axis=2) + width * np.arange(rank.shape[1])
    found: Codes = np.take_along_axis(codes, place, axis=1)
    return found


def _columns(values: NDArray[np.generic], width: int) -> NDArray[np.generic]:
    """[replicas, steps] -> [replicas, columns, steps of a column]; the last is filled up with zeros."""
    filled = np.pad(values, ((0, 0), (0, -values.shape[1] % width)))
    return filled.reshape(len(values), -1, width)

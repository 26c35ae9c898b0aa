"""Conservation: a copy's final value is its initial value plus all that was added, element by element. NumPy only.

Canaries stand at the ends of a variable and a kernel can tear in its middle; this looks at every element between them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.audit.records import Floats, RunRecord
from trainer.state.layout import Segment

Distances = NDArray[np.float64]
Marks = NDArray[np.bool_]

HALF_ULP = 2.0**-24  # of a float32 between 1 and 2
TINY, LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Unconserved:
    """Elements that are off by more than rounding, over all copies, and the one that is off most.

    Attributes:
        count: elements off.
        of: elements in all copies, but for those that are `untold`.
        untold: elements that are not finite, and may be so by what was added: nothing can be said of them.
        where: `count` by variable, the variables that have any.
        variable, element, copy: the one that is off most, and how far it is `off`.
    """

    count: int
    of: int
    untold: int
    where: dict[str, int]
    variable: str = ""
    element: int = 0
    copy: int = 0
    off: float = 0.0


class Deviation(NamedTuple):
    """How far a variable's elements are from what they should be: each [copies, elements].

    Attributes:
        off: distances.
        lost: where they are more than rounding.
        untold: where value and sum have left float32 together, so that neither tells of the other.
    """

    segment: Segment
    off: Distances
    lost: Marks
    untold: Marks


def deviations(record: RunRecord) -> Iterator[Deviation] | None:
    """One variable after the other that the update mode answers for; None without the sums."""
    if record.initial is None or record.copies is None or record.added is None or record.magnitudes is None:
        return None
    return _deviations(record, record.copies, record.initial.astype(np.float64) + record.added, record.magnitudes)


def _deviations(record: RunRecord, copies: Floats, expected: Distances, magnitudes: Distances) -> Iterator[Deviation]:
    # What once was infinite does not come back.
    allowed = 2 * HALF_ULP * np.where(np.isfinite(magnitudes), magnitudes, 0) + TINY
    fits = np.abs(expected) + magnitudes <= LARGEST
    for segment in record.layout.segments:
        if segment.kind not in record.layout.apart:
            values = copies[:, segment.span].astype(np.float64)
            with np.errstate(invalid="ignore"):
                off = np.abs(values - expected[segment.span])
            untold = ~np.isfinite(values) & ~fits[segment.span]
            # Not-a-number and infinity are off, whatever the bound.
            yield Deviation(segment, off, ~(off <= allowed[segment.span]) & ~untold, untold)


def unconserved(record: RunRecord) -> Unconserved | None:
    """Compare every element with what it should be; None unless `audit=full` kept the sums.

    Every addition to an element rounds by at most half a unit in the last place of what it makes. The magnitudes that
    are summed for the bound are read beside the additions, where another replica may have written in between: so twice
    the bound is allowed.
    """
    if record.copies is None or (found := deviations(record)) is None:
        return None
    of = untold = 0
    where = {}
    worst = Unconserved(0, 0, 0, {})
    for segment, off, lost, without in found:
        untold += int(without.sum())
        of += int((~without).sum())
        if lost.any():
            where[segment.name] = int(lost.sum())
            ranked = np.where(lost, np.nan_to_num(off, nan=np.inf), -1)
            copy, element = np.unravel_index(int(ranked.argmax()), off.shape)
            if not off[copy, element] <= worst.off:
                worst = Unconserved(0, 0, 0, {}, segment.name, int(element), int(copy), float(off[copy, element]))
    return replace(worst, count=sum(where.values()), of=of, untold=untold, where=where)

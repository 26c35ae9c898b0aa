"""Conservation: a copy's final value is its initial value plus all that was added, element by element. NumPy only.

Canaries stand at the ends of a variable and a kernel can tear in its middle; this looks at every element between them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.audit.records import Floats, RunRecord
from trainer.state.layout import Segment

Distances = NDArray[np.float64]
Marks = NDArray[np.bool_]

HALF_ULP = 2.0**-24  # of a float32 between 1 and 2


@dataclass(frozen=True)
class Unconserved:
    """Elements that are off by more than rounding, over all copies, and the one that is off most.

    Attributes:
        count: elements off.
        of: elements in all copies.
        where: `count` by variable, the variables that have any.
        variable, element, copy: the one that is off most, and how far it is `off`.
    """

    count: int
    of: int
    where: dict[str, int]
    variable: str = ""
    element: int = 0
    copy: int = 0
    off: float = 0.0


def deviations(record: RunRecord) -> Iterator[tuple[Segment, Distances, Marks]] | None:
    """How far each element is from what it should be, and where that is more than rounding; None without the sums.

    One variable after the other that the update mode answers for: float64 and bool [copies, elements].
    """
    if record.initial is None or record.copies is None or record.added is None or record.magnitudes is None:
        return None
    expected = record.initial.astype(np.float64) + record.added
    allowed = 2 * HALF_ULP * record.magnitudes + np.finfo(np.float32).tiny
    return _deviations(record, record.copies, expected, allowed)


def _deviations(
    record: RunRecord, copies: Floats, expected: Distances, allowed: Distances
) -> Iterator[tuple[Segment, Distances, Marks]]:
    for segment in record.layout.segments:
        if segment.kind not in record.layout.apart:
            off = np.abs(copies[:, segment.span].astype(np.float64) - expected[segment.span])
            # Not-a-number and infinity are off, whatever the bound.
            yield segment, off, ~(off <= allowed[segment.span])


def unconserved(record: RunRecord) -> Unconserved | None:
    """Compare every element with what it should be; None unless `audit=full` kept the sums.

    Every addition to an element rounds by at most half a unit in the last place of what it makes. The magnitudes that
    are summed for the bound are read beside the additions, where another replica may have written in between: so twice
    the bound is allowed.
    """
    if record.copies is None or (found := deviations(record)) is None:
        return None
    layout = record.layout
    count, where = 0, {}
    worst = Unconserved(0, 0, {})
    for segment, off, beyond in found:
        if beyond.any():
            where[segment.name] = int(beyond.sum())
            count += where[segment.name]
            ranked = np.where(beyond, np.nan_to_num(off, nan=np.inf), -1)
            copy, element = np.unravel_index(int(ranked.argmax()), off.shape)
            if not off[copy, element] <= worst.off:
                worst = Unconserved(0, 0, {}, segment.name, int(element), int(copy), float(off[copy, element]))
    of = len(record.copies) * sum(segment.size for segment in layout.segments if segment.kind not in layout.apart)
    return Unconserved(count, of, where, worst.variable, worst.element, worst.copy, worst.off)

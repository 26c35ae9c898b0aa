"""What a run of replicas that count has ended in, and how to read it. NumPy only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trainer.config import Config
from trainer.workloads.counter.roles import Left
from trainer.workloads.counter.shared import Numbers
from trainer.workloads.counter.ways import GRADIENT, num_writers, start_of, way_of


@dataclass
class Ended:
    """What a run has ended in.

    Attributes:
        values: every copy of the variable, [copies, elements, places]. A place counts the increments of one replica, or
            the only one those of all.
        given: what each replica has subtracted in gradient steps in all; empty where that is not known.
        left: what replicas have left besides; None under mirrored, where all they do is count.
    """

    config: Config
    values: Numbers
    given: Sequence[Numbers] = ()
    left: Left | None = None

    @property
    def made(self) -> int:
        """Increments that replicas have made."""
        return num_writers(self.config) * self.config.train.steps

    @property
    def expected(self) -> int:
        """Increments that every place is to show."""
        places: int = self.values.shape[2]
        return self.made // places

    @property
    def counted(self) -> Numbers:
        """Increments that each place of each element of each copy shows."""
        found: Numbers = np.abs(self.values - start_of(self.config))
        return found

    @property
    def kept_by_place(self) -> list[int]:
        """Increments that every element of every copy shows. Where one shows more than were made, none is kept."""
        counted = self.counted
        most, least = counted.max(axis=(0, 1)), counted.min(axis=(0, 1))
        return [0 if shown > self.expected else int(kept) for shown, kept in zip(most, least, strict=True)]

    @property
    def kept(self) -> int | None:
        """The same of all places together; None for gradient steps, which are not counted."""
        return None if way_of(self.config).base == GRADIENT else sum(self.kept_by_place)


def span(values: Numbers) -> str:
    least, most = values.min(), values.max()
    return f"{least:,.10g}" if least == most else f"{least:,.10g} to {most:,.10g}"

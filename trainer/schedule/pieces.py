"""How the shared vector is cut up into what is announced together."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.schedule.operations import APART, VARIABLE
from trainer.state.layout import Layout


@dataclass(frozen=True)
class Piece:
    """Elements `start` to `stop` of the flat vector, which are announced together.

    Attributes:
        of: APART for what replicas write outside of the update mode's transaction.
    """

    name: str
    start: int
    stop: int
    of: str = VARIABLE


class Pieces:
    """How the flat vector is cut up.

    Args:
        cuts: further places to cut at, as where the replicas' shares of a joint update meet.
        chunks: pieces of each variable, of nearly equal size; 1 leaves variables whole.
    """

    def __init__(self, layout: Layout, *, chunks: int = 1, cuts: Sequence[int] = ()) -> None:
        self.pieces: list[Piece] = []
        for segment in layout.segments:
            size = segment.end - segment.start
            inner = {segment.start + size * part // chunks for part in range(1, chunks)}
            inner |= {cut for cut in cuts if segment.start < cut < segment.end}
            bounds = sorted({segment.start, *inner, segment.end})
            for index, (start, stop) in enumerate(itertools.pairwise(bounds)):
                name = f"{segment.name}[{index}]" if len(bounds) > 2 else segment.name
                self.pieces.append(Piece(name, start, stop, APART if segment.kind in layout.apart else VARIABLE))
        self._starts = [piece.start for piece in self.pieces]

    def within(self, start: int, stop: int) -> list[Piece]:
        """Those that elements `start` to `stop` lie in, cut to them."""
        first = max(0, bisect.bisect_right(self._starts, start) - 1)
        found = []
        for piece in self.pieces[first:]:
            if piece.start >= stop:
                break
            if piece.stop > start:
                found.append(Piece(piece.name, max(start, piece.start), min(stop, piece.stop), piece.of))
        return found

    def at(self, positions: Tensor) -> list[Piece]:
        """Those that given elements lie in, whole."""
        starts = torch.tensor(self._starts)
        found = set(torch.bucketize(positions.flatten().contiguous(), starts, right=True).tolist())
        return [self.pieces[index - 1] for index in sorted(found)]

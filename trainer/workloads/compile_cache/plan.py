"""What siblings are to do, and what they tell of it. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from trainer.state.compile_ids import COMPILE_IDS, CompileIds


@dataclass(frozen=True)
class Plan:
    """What the siblings of one round do.

    Attributes:
        start: fork, compile_then_fork or spawn.
        mechanism, bits: whose ids steps have.
        folder: of the cache.
        first: the number of the round's first step, of all steps that there are in a run.
        steps: of each sibling; the last `after_fork` of them are not compiled before a fork.
        saves: whether what is missed is stored.
        seconds: after which a sibling that does not come is given up.
    """

    start: str
    mechanism: str
    bits: int
    folder: str
    first: int
    num_siblings: int
    steps: int
    after_fork: int
    batch_size: int
    seed: int
    saves: bool
    seconds: float

    def serials(self, own: int) -> range:
        """The numbers of one sibling's steps."""
        first = self.first + own * self.steps
        return range(first, first + self.steps)

    def before_fork(self) -> list[int]:
        """The numbers of those that the parent compiles before there are siblings."""
        if self.start != "compile_then_fork":
            return []
        in_common = self.steps - self.after_fork
        return [serial for own in range(self.num_siblings) for serial in self.serials(own)[:in_common]]

    def holder(self) -> CompileIds:
        return COMPILE_IDS[self.mechanism](self.bits)


class Ran(NamedTuple):
    """One step that was looked up and run.

    Attributes:
        id: that it was looked up by.
        content: its own.
        found: the content of what was found under the id; "" where nothing was, so that it was compiled.
        same: whether loss and gradient had the bits of its own body.
        saved: seconds of compiling that its process was spared by what it found before it compiled anything.
    """

    id: str
    content: str
    found: str
    same: bool
    saved: float

"""What a step returns for the audit beside its contribution: one float32 vector, the same in every strategy."""

from __future__ import annotations

from dataclasses import dataclass

RANDOM_WORDS = 2


@dataclass(frozen=True)
class Row:
    """Where what stands in a step's row; whole numbers in it are exact below 2**24.

        [ loss | logits | gradients | first sample | random words | loss scale, overflow | canaries ]

    With `audit=none` a row is the loss alone.

    Attributes:
        num_logits: of the batch's first sample.
        num_gradients: of one kernel's gradient, evenly spaced.
        num_canaries: of the snapshot.
    """

    num_logits: int
    num_gradients: int
    num_canaries: int

    @property
    def logits(self) -> slice:
        return slice(1, 1 + self.num_logits)

    @property
    def gradients(self) -> slice:
        return slice(1 + self.num_logits, 1 + self.num_logits + self.num_gradients)

    @property
    def sample(self) -> int:
        """Index of the batch's first sample."""
        return 1 + self.num_logits + self.num_gradients

    @property
    def random(self) -> slice:
        """The upper 24 bits of the first word that the batch's first and its last sample drew; -1 where none was."""
        return slice(self.sample + 1, self.sample + 1 + RANDOM_WORDS)

    @property
    def loss_scale(self) -> slice:
        """The loss scale that was used, and 1 where gradients overflowed; 0 and 0 where there is none."""
        return slice(self.random.stop, self.random.stop + 2)

    @property
    def canaries(self) -> slice:
        return slice(self.loss_scale.stop, self.loss_scale.stop + self.num_canaries)

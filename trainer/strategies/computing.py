"""What an update mode of `strategy=threads` is given to compute a gradient with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from trainer.schedule.operations import COMPUTE, GENERATOR, UPDATE
from trainer.schedule.point import mark, point
from trainer.state.layout import Floats
from trainer.updates.shared_vector import Replica

if TYPE_CHECKING:
    from trainer.strategies.threads import Threads


class Computing:
    """One replica's `compute`: made once, and told before every step what the step is of.

    What does not change from step to step is looked up here once: all of Python takes turns at the GIL.

    Attributes:
        number, samples: the step's number and its batch, for the next call to use.
        reads: whether the next call is to leave what it computed from in `read`, float32 [read_size]. That is taken
            during the call, since a mode that reads in place has it no longer after the step.
        row: what the last call has left for the audit; a new step may write over it.
        asked: the compute dtype that the last call was asked for.
        made_first: whether a call since `begin` was made as the first one.

    Thread-safety: the replica's thread.
    """

    number: Tensor
    samples: Tensor
    row: Tensor | None
    read: Floats

    def __init__(self, threads: Threads, own: int) -> None:
        training = threads.training
        self._own, self._shared = own, threads.shared
        self._steps, self._apart = threads.steps, threads.apart
        self._first_by_main, self._training = threads.first_by_main, training
        # A captured step draws where nobody can come in between, so all of it is announced at once.
        self._announces_draws = self._steps.captures and bool(training.draws) and not training.derived
        self.asked = training.asked[own]
        self.row = None
        self.reads = self.made_first = False

    def begin(self, number: Tensor, samples: Tensor, *, reads: bool) -> None:
        self.number, self.samples, self.reads = number, samples, reads
        self.row, self.made_first = None, False

    def __call__(self, replica: Replica) -> None:
        mark(COMPUTE)
        if self._announces_draws:
            point(UPDATE, "generator", of=GENERATOR)
        if self._first_by_main:
            self._take(replica)
        else:
            with self._training.first_call.call() as first:
                # What the attempt that counts was asked for: a mode may compute a gradient again.
                self.asked = "float32" if first else self._training.asked[self._own]
                self._take(replica)
            self.made_first = self.made_first or first
        if self._apart is not None:
            self._apart.take(replica)
        if self.reads:
            self.read = replica.prefix.numpy().copy()

    def _take(self, replica: Replica) -> None:
        self._shared.forget(replica)
        replica.contribution, self.row = self._steps.take(
            self._own, replica.prefix, self.number, self.samples, self.asked
        )

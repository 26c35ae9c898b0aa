"""What is run again and again, in one order after another."""

from __future__ import annotations

from typing import Protocol

from trainer.audit.records import RunRecord
from trainer.schedule.order import Order


class Case(Protocol):
    """A run, small enough to be made many times.

    Attributes:
        num_replicas: those that an order has turns for.
        joint, copies: as `History` has them.
    """

    num_replicas: int
    joint: bool
    copies: bool

    def run(self, order: Order, record: RunRecord) -> None:
        """Run it once from the start, with everything as it was then, in the order that `order` makes; fill `record`.

        Raises:
            Abandoned: the order was given up by its chooser.
            Deadlock: no replica could go on.
            Failed: a replica raised.
            Stalled: a replica waits for what a schedule cannot see.
        """

"""An update mode of your own, held to what it ought to guarantee:

python -m trainer update_mode._target_=bring_update_mode.TicketLocked \
    require=[no_lost_updates,no_torn_reads,atomic_updates]

Add +update_mode.arguments.careless=true to see it caught.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import ClassVar

from trainer.updates.shared_vector import Replica, SharedVector
from trainer.updates.transactions import Alone, Compute


class TicketLocked(Alone):
    """As `locked`, first come first served: replicas draw a ticket, and updates go by their numbers.

    Args:
        careless: base the write on the snapshot, which is older than the ticket.
    """

    whole_snapshot: ClassVar[bool] = True

    def __init__(self, shared: SharedVector, replicas: Sequence[Replica], careless: bool = False) -> None:
        super().__init__(shared, replicas)
        self.careless = careless
        self.turn = threading.Condition()
        self.drawn = self.served = 0

    def step(self, replica: Replica, compute: Compute) -> None:
        with self.turn:
            self.shared.copy_to(replica)
        compute(replica)
        with self.turn:
            ticket, self.drawn = self.drawn, self.drawn + 1
            self.turn.wait_for(lambda: self.served == ticket)
            if self.careless:
                self.shared.replace(replica, replica.snapshot + self.shared.delta(replica, base=replica.snapshot))
            else:
                self.shared.add(replica, self.shared.delta(replica, base=self.shared.vector))
            self.served += 1
            self.turn.notify_all()

"""An update mode with a race in it, and the same without: docs/schedules.md tells how the one is found and the other
proven.

python -m trainer update_mode._target_=checked_write.Racy model=linear train.steps=1 schedule=search \
    require=[no_lost_updates]

In place of Racy, write Safe.
"""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock
from typing import ClassVar

from trainer.updates.shared_vector import Replica, SharedVector
from trainer.updates.transactions import Alone, Compute


class Racy(Alone):
    """Copy, compute, and write copy plus delta if nobody has written meanwhile; else begin again."""

    whole_snapshot: ClassVar[bool] = True

    def __init__(self, shared: SharedVector, replicas: Sequence[Replica]) -> None:
        super().__init__(shared, replicas)
        self.version = 0
        self.writing = Lock()

    def step(self, replica: Replica, compute: Compute) -> None:
        while not self.commit(replica, self.attempt(replica, compute)):
            pass

    def attempt(self, replica: Replica, compute: Compute) -> int:
        version = self.version
        self.shared.copy_to(replica)
        compute(replica)
        return version

    def commit(self, replica: Replica, version: int) -> bool:
        if version != self.version:
            return False
        with self.writing:
            return self.write(replica)

    def write(self, replica: Replica) -> bool:
        self.shared.replace(replica, replica.snapshot + self.shared.delta(replica, base=replica.snapshot))
        self.version += 1
        return True


class Safe(Racy):
    """The version is looked at under the lock under which it is raised."""

    def commit(self, replica: Replica, version: int) -> bool:
        with self.writing:
            return version == self.version and self.write(replica)

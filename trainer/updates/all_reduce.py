"""Update modes of `strategy=threads` in which all replicas update together.

Invariant: between the two barriers of a step nobody reads a snapshot, and outside them nobody writes what a step reads
(the optimizer's counter, which it does not, follows the second). So a snapshot need be no copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from trainer.schedule.locks import Barrier
from trainer.schedule.operations import CONTRIBUTION, WRITE
from trainer.schedule.point import point
from trainer.updates.shared_vector import JointUpdate, Replica, SharedVector
from trainer.updates.transactions import Compute


class AllReduce:
    """Safe: the mean of the gradients is applied once, while every replica waits."""

    whole_snapshot: ClassVar[bool] = False
    reads_in_place: ClassVar[bool] = True

    def __init__(self, shared: SharedVector, replicas: Sequence[Replica]) -> None:
        self.shared = shared
        self.joint = self.join(shared, replicas)
        self.barrier = Barrier(len(replicas), "barrier")
        self.leader = replicas[0].replica_id  # which does once what is done for all

    def join(self, shared: SharedVector, replicas: Sequence[Replica]) -> JointUpdate:
        return JointUpdate(shared, replicas, self.scale(shared.num_trainers))

    def scale(self, num_trainers: int) -> float:
        """What the sum over replicas is multiplied by: each replica's loss is the mean over its own batch."""
        return 1.0 / num_trainers

    def step(self, replica: Replica, compute: Compute) -> None:
        self.shared.copy_to(replica)
        point(WRITE, self.joint.contributions[replica.replica_id], of=CONTRIBUTION)
        compute(replica)
        self.barrier.wait()  # every contribution is there, and every snapshot was taken
        self.joint.add_share(replica)
        if replica.replica_id == self.leader:
            self.joint.commit()
        self.barrier.wait()  # every share is in, and no contribution is read any more
        replica.spent = not replica.keeps
        if replica.replica_id == self.leader:
            # After the barrier, since the shares' rules read the counter before it; nobody reads it again until this
            # replica, too, has reached the next one.
            self.joint.count()

    def applied(self, replica: Replica) -> Tensor:
        return self.joint.applied

    def added(self, replica: Replica) -> Tensor | None:
        return self.joint.added if replica.replica_id == self.leader else None

    def abort(self) -> None:
        self.barrier.abort()


class UnscaledSum(AllReduce):
    """Unsafe: as `AllReduce`, but the replicas' mean losses are summed, so the step is num_replicas times too large."""

    def scale(self, num_trainers: int) -> float:
        return 1.0

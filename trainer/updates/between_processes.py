"""Update modes of `strategy=ddp`: every process has a copy of the shared variables, and threads that share it.

Invariant of `AllReduceOfProcesses`: all copies have the same bits before a step and after it, because every process
adds the same sum, scaled alike. Of `LocalSteps`: they have after every average, because every process starts from the
same base and adds the same mean. Nobody reads a snapshot between the first barrier of a step and its last.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from trainer.audit.records import Average
from trainer.updates.all_reduce import AllReduce
from trainer.updates.shared_vector import JointUpdate, Replica, SharedVector
from trainer.updates.transactions import Compute


class Sums(Protocol):
    """The way to the other processes, for one thread at a time.

    Attributes:
        values: float32, what this process contributes, and after `all_reduce` the sum over all of them.
        size: processes.
    """

    values: Tensor
    size: int

    def show(self, step: int, vector: Tensor) -> None:
        """Let the next `all_reduce` compare this copy, as it stands before a step, with the others', if it is time."""

    def all_reduce(self) -> None:
        """Sum `values` over all processes. Comes back in all of them with the same bits."""

    def measured(self, average: Average) -> None:
        """Put down how far this process was from the others before an average."""

    def abort(self) -> None:
        """Wake the thread that waits for other processes; it raises `threading.BrokenBarrierError`."""


class UpdateOfAll(JointUpdate):
    """A joint update to which replicas of other processes contribute: shares are summed, exchanged, then applied."""

    sums_and_adds: ClassVar[bool] = False

    def __init__(self, shared: SharedVector, replicas: Sequence[Replica], scale: float, total: Tensor) -> None:
        super().__init__(shared, replicas, scale)
        self._total = total

    def sum_share(self, replica: Replica) -> None:
        """Sum this replica's share over the replicas of this process; one of them takes the loss scale as well."""
        self._sum_values(self._parts[replica.replica_id])
        region = self._shared.layout.regions["loss_scale"]
        if replica is self._replicas[0] and region.stop > region.start:
            self._sum(region)

    def apply_share(self, replica: Replica) -> None:
        """Apply the same share of what has been summed over all processes."""
        self._apply(self._parts[replica.replica_id], self._decided())

    def commit(self) -> None:
        self._skipped = self._decided()
        if self._loss_scale is not None:
            self._apply(self._loss_scale, self._skipped)
        commits = self._shared.commits
        landed = sum(commits)
        for replica in self._replicas:
            replica.staleness = landed - replica.version
        for own in range(len(commits)):
            commits[own] += 1

    def _overflows(self, flag: int) -> Tensor:
        return self._total[flag]


class AllReduceOfProcesses(AllReduce):
    """Safe: as `AllReduce`, over the replicas of all processes, with one all-reduce between these in each step."""

    reads_in_place: ClassVar[bool] = True
    joint: UpdateOfAll

    def __init__(self, shared: SharedVector, replicas: Sequence[Replica], sums: Sums) -> None:
        self._sums = sums
        self._steps = 0
        super().__init__(shared, replicas)
        self._meeting = threading.Barrier(len(replicas), self._exchange)

    def join(self, shared: SharedVector, replicas: Sequence[Replica]) -> UpdateOfAll:
        return UpdateOfAll(shared, replicas, self.scale(shared.num_trainers), self._sums.values)

    def step(self, replica: Replica, compute: Compute) -> None:
        self.shared.copy_to(replica)
        compute(replica)
        self.barrier.wait()  # every contribution is there, and every snapshot was taken
        self.joint.sum_share(replica)
        self._meeting.wait()  # every share is summed here, and then over all processes by whoever comes last
        self.joint.apply_share(replica)
        if replica.replica_id == self.leader:
            self.joint.commit()
        self.barrier.wait()  # every share is in, and no contribution is read any more
        replica.spent = not replica.keeps
        if replica.replica_id == self.leader:
            self.joint.count()

    def go_on(self, step: int) -> None:
        """Begin with a step, where the shared values are those of a checkpoint."""
        self._steps = step

    def _exchange(self) -> None:
        self._sums.show(self._steps, self.shared.plain)
        self._sums.all_reduce()
        self._steps += 1

    def abort(self) -> None:
        super().abort()
        self._meeting.abort()
        self._sums.abort()


class LocalSteps(AllReduce):
    """Each process steps by itself, and every so many steps the copies are averaged.

    An average adds to the values that all had after the last one the mean of what the processes have added since, and
    to the canaries the sum: no update is lost, but each moves the values by its process's share only.

    Args:
        every: steps between averages.
        steps: of the run; the last one ends with an average, so that all copies end equal.
    """

    reads_in_place: ClassVar[bool] = True

    def __init__(self, shared: SharedVector, replicas: Sequence[Replica], sums: Sums, every: int, steps: int) -> None:
        super().__init__(shared, replicas)
        self._sums, self._every, self._last = sums, every, steps
        self._taken = {replica.replica_id: 0 for replica in replicas}
        self._meeting = threading.Barrier(len(replicas), self._average)
        self._base = shared.plain.clone()
        self._corrected = torch.zeros_like(self._base)
        self._corrects = False
        layout = shared.layout
        # What an average multiplies the sum by: a canary is a count, and counts add up.
        self._share = torch.full((layout.size,), 1.0 / sums.size)
        self._share[torch.from_numpy(layout.canaries.reshape(-1))] = 1.0
        parameters = torch.zeros(layout.size, dtype=torch.bool)
        for segment in (*layout.of_kind("weight"), *layout.of_kind("statistic")):
            parameters[segment.span] = True
        self._parameters = parameters.nonzero()[:, 0]

    def step(self, replica: Replica, compute: Compute) -> None:
        super().step(replica, compute)
        if replica.replica_id == self.leader:
            self._corrects = False
        taken = self._taken[replica.replica_id] = self._taken[replica.replica_id] + 1
        if taken % self._every == 0 or taken == self._last:
            self._meeting.wait()  # all are through with the step; whoever comes last averages

    def go_on(self, step: int) -> None:
        """Begin with a step, where the shared values are those of a checkpoint, which stands at an average."""
        self._taken = dict.fromkeys(self._taken, step)
        self._base = self.shared.plain.clone()

    def added(self, replica: Replica) -> Tensor | None:
        if replica.replica_id != self.leader:
            return None
        return self.joint.added + self._corrected if self._corrects else self.joint.added

    def abort(self) -> None:
        super().abort()
        self._meeting.abort()
        self._sums.abort()

    def _average(self) -> None:
        shared, sums, taken = self.shared, self._sums, self._taken[self.leader]
        own = shared.plain - self._base
        sums.values.copy_(own)
        sums.all_reduce()
        mean = sums.values * self._share
        sums.measured(self._apart(taken, own, mean))
        after = self._base + mean
        self._corrected, self._corrects = after - shared.plain, True
        shared.plain.copy_(after)
        self._base = after
        self._commit_for_others(taken)
        sums.show(taken, shared.plain)

    def _apart(self, step: int, own: Tensor, mean: Tensor) -> Average:
        """How far this process's weights and statistics are from the mean of all processes'."""
        moved = mean[self._parameters]
        off = own[self._parameters] - moved
        norm = float(torch.linalg.vector_norm(moved))
        largest = float(off.abs().max()) if len(off) else 0.0
        return Average(step, largest, float(torch.linalg.vector_norm(off)) / norm if norm else 0.0)

    def _commit_for_others(self, taken: int) -> None:
        """Count the updates that have come with an average."""
        for own in range(len(self.shared.commits)):
            if own not in self._taken:
                self.shared.commits[own] = taken

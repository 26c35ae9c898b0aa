"""The flat vector that PyTorch threads share, and the private workspace of one replica.

`SharedVector` does no locking at all: each method is one plain access, and it is the update mode that decides under
what it is called. Every mode is written in terms of these: copy, delta, add, replace and, for all-reduce, `add_mean`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.state.layout import Floats, Layout, Share
from trainer.updates.optimizers import Optimizer

# Captures a pure function of tensors for inputs of the example's shapes.
Capture = Callable[..., Callable[..., Tensor]]


@dataclass
class Replica:
    """What one replica's thread owns.

    Attributes:
        snapshot: float32, the copy that the gradient is computed from: weights and statistics, or everything where the
            mode bases its write on the snapshot.
        prefix: weights and statistics of the snapshot, a view.
        source: what the snapshot is a copy of, a view of the shared vector.
        delta: float32 [layout.size], scratch for what is to be added.
        contribution: float32 [read_size], this step's gradient, statistics deltas and canaries.
        version: commits by all replicas when the snapshot was taken.
        staleness: commits by others between this step's snapshot and its write.
    """

    replica_id: int
    snapshot: Tensor
    prefix: Tensor
    source: Tensor
    delta: Tensor
    contribution: Tensor
    version: int = 0
    staleness: int = 0


class SharedVector:
    """One copy of all shared variables: float32 [layout.size], written by every replica.

    Attributes:
        commits: updates committed by each replica; each element has one writer, the replica itself, or under
            all-reduce the replica that commits for all.
        variables: every weight with its slots, every statistic, the counter: what `copy_part` and `add_part` take.

    Thread-safety: none, on purpose.
    """

    def __init__(
        self, initial: Floats, layout: Layout, optimizer: Optimizer, capture: Capture = lambda function, *_: function
    ) -> None:
        self.layout = layout
        self.vector = torch.from_numpy(initial.copy())
        self.commits = [0] * layout.num_replicas
        self.variables = [Part(layout, share) for share in layout.variables()]
        if optimizer.counts:
            self.variables.append(Part(layout, layout.nothing, counter=True))
        self.optimizer = optimizer
        whole = Part(layout, layout.shares(1)[0], counter=optimizer.counts)
        # One call instead of a dozen: between any two operators threads would take turns at the GIL.
        self._delta = capture(
            lambda contribution, base: whole.delta(optimizer, contribution, base),
            torch.zeros(layout.read_size),
            self.vector.clone(),
        )

    def replica(self, replica_id: int, *, whole: bool) -> Replica:
        """A workspace whose snapshot covers everything (`whole`) or what a step reads."""
        # Views are made once: making one gives up the GIL, for which threads then queue.
        snapshot = self.vector.clone() if whole else self.vector[: self.layout.read_size].clone()
        return Replica(
            replica_id,
            snapshot,
            prefix=snapshot[: self.layout.read_size],
            source=self.vector[: len(snapshot)],
            delta=torch.zeros(self.layout.size),
            contribution=torch.empty(0),
        )

    # Reading.

    def copy_to(self, replica: Replica) -> None:
        """Fill the replica's snapshot from the shared values, in one kernel."""
        self.note_version(replica)
        replica.snapshot.copy_(replica.source)

    def copy_part(self, replica: Replica, part: Part) -> None:
        """Fill one variable of the replica's snapshot."""
        for span in part.spans:
            if span.stop <= len(replica.snapshot):
                replica.snapshot[span] = self.vector[span]

    def note_version(self, replica: Replica) -> None:
        """Note which version is about to be copied: what lands while a copy is under way counts as landed after it."""
        replica.version = sum(self.commits)

    # Writing. An update is committed once, just before its first write.

    def delta(self, replica: Replica, base: Tensor) -> Tensor:
        """What the replica's contribution adds to each shared variable, its slots taken from `base`."""
        replica.delta = self._delta(replica.contribution, base)
        return replica.delta

    def add(self, replica: Replica, delta: Tensor) -> None:
        """Add to the shared values in place, in one kernel."""
        self.commit(replica)
        self.vector.add_(delta)

    def add_part(self, replica: Replica, part: Part) -> None:
        """Add the replica's contribution to one variable and its slots, based on their current values."""
        part.fill(replica.delta, self.optimizer, replica.contribution, self.vector)
        part.add(self.vector, replica.delta)

    def add_weights(self, replica: Replica, delta: Tensor) -> None:
        """Add to weights and statistics in place, in one kernel, and leave slots alone."""
        self.commit(replica)
        self.vector[: self.layout.read_size].add_(delta[: self.layout.read_size])

    def replace(self, replica: Replica, values: Tensor) -> None:
        """Put these values in place of the shared ones, in one kernel."""
        self.commit(replica)
        self.vector.copy_(values)

    def replace_slots(self, values: Tensor) -> None:
        """Put these slots and counter in place of the shared ones, in one kernel, and leave weights alone."""
        self.vector[self.layout.read_size :] = values[self.layout.read_size :]

    def commit(self, replica: Replica) -> None:
        """Count an update of this replica, and those that landed since its snapshot."""
        replica.staleness = sum(self.commits) - replica.version
        self.commits[replica.replica_id] += 1


class JointUpdate:
    """The sum of all replicas' contributions, scaled and applied once; each replica sums and applies its own share.

    The sum runs in the order of the replicas whoever computes it, so the bits do not depend on timing. Values are
    scaled; canaries are not.

    Attributes:
        added: float32 [layout.size], what the last update added.

    Thread-safety: shares are disjoint, so replicas may call `add_share` at the same time, between two barriers:
    contributions must be complete before, and nobody may read the vector until all are through.
    """

    def __init__(self, shared: SharedVector, replicas: Sequence[Replica], scale: float) -> None:
        layout = shared.layout
        self._shared = shared
        self._replicas = replicas
        self._scale = scale
        self._parts = [Part(layout, share) for share in layout.shares(len(replicas))]
        self._counter = Part(layout, layout.nothing, counter=True) if shared.optimizer.counts else None
        self._total = torch.zeros(layout.read_size)
        self.added = torch.zeros(layout.size)

    @property
    def applied(self) -> Tensor:
        """What the optimizer was given: float32 [read_size]; canaries and padding mean nothing here."""
        return self._total * self._scale

    def add_share(self, replica: Replica) -> None:
        """Sum this replica's share over all replicas and add its delta to the shared values."""
        part = self._parts[replica.replica_id]
        for span in (part.share.weights, part.share.statistics):
            total = self._total[span].copy_(self._replicas[0].contribution[span])
            for other in self._replicas[1:]:
                total.add_(other.contribution[span])
        self._apply(part)

    def commit(self) -> None:
        """Count the update, for all replicas at once."""
        shared = self._shared
        landed = sum(shared.commits)
        for replica in self._replicas:
            replica.staleness = landed - replica.version
            shared.commits[replica.replica_id] += 1

    def count(self) -> None:
        """Raise the optimizer's counter, which every share's rule has read by now."""
        if self._counter is not None:
            self._apply(self._counter)

    def _apply(self, part: Part) -> None:
        part.fill(self.added, self._shared.optimizer, self._total, self._shared.vector, self._scale)
        part.add(self._shared.vector, self.added)


class Part:
    """One share of the flat vector, with or without the counter, and the canaries that stand in it."""

    def __init__(self, layout: Layout, share: Share, *, counter: bool = False) -> None:
        self.share = share
        self._counter = layout.regions["counter"] if counter else slice(0, 0)
        self._count = layout.of_kind("counter")[0].span if "counter" in layout.regions else None
        self.spans = tuple(span for span in (*share.spans, self._counter) if span.stop > span.start)
        canaries, sources = layout.canaries.reshape(-1), layout.canary_sources.reshape(-1)
        inside = [any(span.start <= at < span.stop for span in self.spans) for at in canaries.tolist()]
        self._canaries = torch.from_numpy(canaries[inside])
        self._sources = torch.from_numpy(sources[inside])

    def fill(self, out: Tensor, optimizer: Optimizer, contribution: Tensor, base: Tensor, scale: float = 1.0) -> None:
        """Write this part of the delta: the optimizer's rule for values, the contribution's own counts for canaries."""
        share = self.share
        gradient, statistics = contribution[share.weights], contribution[share.statistics]
        if scale != 1.0:
            gradient, statistics = gradient * scale, statistics * scale
        iterations = base[self._count] if self._count else None
        deltas = optimizer.delta(gradient, [base[span] for span in share.slots], iterations)
        for span, delta in zip((share.weights, *share.slots), deltas, strict=True):
            out[span] = delta
        out[share.statistics] = statistics
        out[self._counter] = 1.0
        out.index_copy_(0, self._canaries, contribution.index_select(0, self._sources))

    def delta(self, optimizer: Optimizer, contribution: Tensor, base: Tensor) -> Tensor:
        """The same for the part that is everything, as a new tensor: float32 [layout.size]."""
        out = torch.empty_like(base)
        self.fill(out, optimizer, contribution, base)
        return out

    def add(self, vector: Tensor, delta: Tensor) -> None:
        for span in self.spans:
            vector[span].add_(delta[span])

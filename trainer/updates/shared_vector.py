"""The flat vector that PyTorch threads share, and the private workspace of one replica.

`SharedVector` does no locking at all: each method is one plain access, and it is the update mode that decides under
what it is called. Every mode is written in terms of these: copy, delta, add, replace and, for all-reduce, `add_mean`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from trainer.schedule.operations import CONTRIBUTION, READ
from trainer.schedule.point import points
from trainer.state.layout import Floats, Layout, Share
from trainer.state.loss_scale import next_state, skips
from trainer.updates import shares
from trainer.updates.optimizers import Optimizer

# Captures a pure function of tensors for inputs of the example's shapes.
Capture = Callable[..., Callable[..., Tensor]]


# Beyond this many replicas, capturing a rule for each one's share takes longer at the start than it is worth.
MOST_CAPTURED = 8

NOTHING = torch.empty(0)
T = TypeVar("T")


@dataclass
class Replica:
    """What one replica's thread owns.

    Attributes:
        snapshot: float32, what the gradient is computed from: weights and statistics, or everything where the mode
            bases its write on the snapshot. A copy; the shared values themselves where the mode reads in place.
        prefix: weights and statistics of the snapshot, a view.
        source: what the snapshot is a copy of, a view of the shared vector; None where it is no copy.
        contribution: float32 [read_size], this step's gradient, statistics deltas and canaries. No longer after
            `prepare`, unless it `keeps`.
        delta: float32 [layout.size], what was last to be added.
        prepared: whether `prepare` has made the delta of this contribution.
        spent: whether nobody wants the contribution any more, so that its memory may go before the next one is made.
        keeps: whether what this step contributes, applies and adds is wanted after the step.
        version: commits by all replicas when the snapshot was taken.
        staleness: commits by others between this step's snapshot and its write.
    """

    replica_id: int
    snapshot: Tensor
    prefix: Tensor
    source: Tensor | None
    contribution: Tensor
    delta: Tensor
    prepared: bool = False
    spent: bool = False
    keeps: bool = True
    version: int = 0
    staleness: int = 0

    @property
    def in_place(self) -> bool:
        """Whether the replica reads the shared values themselves."""
        return self.source is None


class SharedVector:
    """One copy of all shared variables: float32 [layout.size], written by every replica.

    Attributes:
        vector: the values, as replicas are to use them; under a schedule every access to it is announced.
        plain: the same memory, for whoever is no replica.
        commits: updates committed by each replica; each element has one writer, the replica itself, or under
            all-reduce the replica that commits for all.
        variables: every weight with its slots, every statistic, loss scale and counter: what `copy_part` and `add_part`
            take.
        num_trainers: replicas that contribute gradients; the others only evaluate.
        growth_steps: of the loss scale (`trainer/state/loss_scale.py`), where the layout has one.
        capture: captures a function of tensors, so that it runs in one call.
        averages_statistics: whether a joint update averages statistics whatever it does with gradients.

    Thread-safety: none, on purpose.
    """

    def __init__(
        self,
        initial: Floats,
        layout: Layout,
        optimizer: Optimizer,
        capture: Capture = lambda function, *_: function,
        *,
        num_trainers: int | None = None,
        growth_steps: int = 1,
        averages_statistics: bool = False,
    ) -> None:
        self.layout = layout
        self.plain = torch.from_numpy(initial.copy())
        self.vector = self.plain
        self.commits = [0] * layout.num_replicas
        self.num_trainers = num_trainers or layout.num_replicas
        self.growth_steps = growth_steps
        self.averages_statistics = averages_statistics
        names = [segment.name for segment in (*layout.of_kind("weight"), *layout.of_kind("statistic"))]
        shares = zip(names, layout.variables(), strict=True)
        self.variables = [Part(layout, share, name=name) for name, share in shares]
        if optimizer.counts:
            self.variables.append(Part(layout, layout.nothing, counter=True, name="iterations"))
        growth = growth_steps if layout.loss_scale and "loss_scale" not in layout.apart else 0
        if growth:
            self.variables.append(Part(layout, layout.nothing, growth_steps=growth, name="loss_scale"))
        self.optimizer = optimizer
        self.capture = capture
        whole = Part(layout, layout.shares(1)[0], counter=optimizer.counts, growth_steps=growth)
        # float32 [layout.size], where the delta is the contribution times constants, 1 for canaries and statistics.
        self.factors: Tensor | None = None
        if optimizer.proportional and layout.loss_scale is None:
            self.factors = whole.delta(optimizer, torch.ones(layout.read_size), self.plain)
        # One call instead of a dozen: between any two operators threads would take turns at the GIL.
        self._delta: Callable[..., Tensor] = self._scaled
        if self.factors is None:
            self._delta = capture(
                lambda contribution, base: whole.delta(optimizer, contribution, base),
                torch.zeros(layout.read_size),
                self.plain.clone(),
            )
        # What the rule reads of the base, besides the contribution.
        kinds = ["slot", "counter", *(["loss_scale"] if growth else [])]
        self._base_spans = [slice(each.start, each.end) for kind in kinds for each in layout.of_kind(kind)]

    def replica(self, replica_id: int, *, whole: bool, in_place: bool = False) -> Replica:
        """A workspace whose snapshot covers everything (`whole`) or what a step reads.

        Args:
            in_place: nobody writes while a replica reads, so that its snapshot need be no copy. It is one all the same
                under a schedule, where steps are not given the announced vector, and where a replica writes a part of
                the variables by itself, based on what it read.
        """
        # Views are made once: making one gives up the GIL, for which threads then queue.
        source = self.vector if whole else self.vector[: self.layout.read_size]
        reads = in_place and self.vector is self.plain and not self.layout.apart
        # Not `source` itself: autograd counts writes by tensor, not by element, and the optimizer's counter, which no
        # step reads, is raised in the same one while steps are under way.
        snapshot = source.data if reads else source.clone()
        return Replica(
            replica_id,
            snapshot,
            prefix=snapshot[: self.layout.read_size],
            source=None if reads else source,
            contribution=NOTHING,
            delta=NOTHING,
        )

    # Reading.

    def copy_to(self, replica: Replica) -> None:
        """Fill the replica's snapshot from the shared values, in one kernel."""
        self.note_version(replica)
        if replica.source is not None:
            replica.snapshot.copy_(replica.source)

    def forget(self, replica: Replica) -> None:
        """Let go of a spent contribution, before the next one needs as much memory."""
        if replica.spent:
            replica.contribution = replica.delta = NOTHING
            replica.spent = False

    def copy_part(self, replica: Replica, part: Part) -> None:
        """Fill one variable of the replica's snapshot."""
        for span in part.spans:
            if span.stop <= len(replica.snapshot):
                replica.snapshot[span] = self.vector[span]

    def note_version(self, replica: Replica) -> None:
        """Note which version is about to be copied: what lands while a copy is under way counts as landed after it."""
        replica.version = sum(self.commits)

    # Writing. An update is committed once, just before its first write.

    def prepare(self, replica: Replica) -> None:
        """Make the delta beforehand if it takes no shared values, in the contribution's memory unless that is kept.

        For modes to call before they take a lock: `delta` then has nothing left to do under it.
        """
        if self.factors is None:
            return
        own = replica.contribution
        replica.delta = own * self.factors if replica.keeps else own.mul_(self.factors)
        replica.prepared, replica.spent = True, not replica.keeps

    def delta(self, replica: Replica, base: Tensor) -> Tensor:
        """What the replica's contribution adds to each shared variable, its slots taken from `base`."""
        if replica.prepared:
            replica.prepared = False
            return replica.delta
        if base is self.vector and self.vector is not self.plain:
            base = self._base()
        replica.delta = self._delta(replica.contribution, base)
        return replica.delta

    def _scaled(self, contribution: Tensor, base: Tensor) -> Tensor:
        """The delta of a rule that only multiplies, which needs no base."""
        assert self.factors is not None
        return contribution * self.factors

    def _base(self) -> Tensor:
        """Under a schedule: what the rule reads of the shared values, and nothing else, as it is now."""
        base = torch.zeros(self.layout.size)
        for span in self._base_spans:
            base[span] = self.vector[span]
        return base

    def add(self, replica: Replica, delta: Tensor) -> None:
        """Add to the shared values in place, in one kernel."""
        self.commit(replica)
        self.vector.add_(delta)

    def add_part(self, replica: Replica, part: Part) -> None:
        """Add the replica's contribution to one variable and its slots, based on their current values."""
        if not replica.delta.numel():
            replica.delta = torch.zeros(self.layout.size)
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
        added: float32 [layout.size], what the last update added, if replicas keep it (`Replica.keeps`).
        sums_and_adds: whether nothing comes between the sum of a share and its addition.

    Thread-safety: shares are disjoint, so replicas may call `add_share` at the same time, between two barriers:
    contributions must be complete before, and nobody may read the vector until all are through.
    """

    sums_and_adds: ClassVar[bool] = True

    def __init__(self, shared: SharedVector, replicas: Sequence[Replica], scale: float) -> None:
        layout = shared.layout
        self._shared = shared
        self._replicas = replicas
        self._scale = scale
        self._parts = self._of_each(Part(layout, share) for share in layout.shares(len(replicas)))
        self._counter = Part(layout, layout.nothing, counter=True) if shared.optimizer.counts else None
        transacted = layout.loss_scale and "loss_scale" not in layout.apart
        # Where each replica decides about its own overflows, the update is never skipped for all.
        self._flag = layout.loss_scale.start if transacted and layout.loss_scale else None
        # What `commit` decided, for what comes after the contributions are gone.
        self._skipped: Tensor | None = None
        self._loss_scale = Part(layout, layout.nothing, growth_steps=shared.growth_steps) if transacted else None
        self._statistics_scale = 1.0 / shared.num_trainers if shared.averages_statistics else scale
        self._total = torch.zeros(layout.read_size)
        self.added = torch.zeros(layout.size)
        # In a free run: a call for a span instead of one for each operator, between which replicas queue for the GIL.
        self._in_one_call = shared.vector is shared.plain
        at_once = self.sums_and_adds and self._in_one_call and shared.factors is not None
        self._scaled = self._scaled_shares() if at_once else None
        self._add_scaled = shares.add_scaled()
        self._rules = {
            part: self._captured(part) for part in (*self._parts.values(), self._counter) if part is not None
        }
        # What schedules call the replicas' contributions, which the others read.
        self.contributions = self._of_each(f"contribution {own}" for own in range(len(replicas)))

    @property
    def applied(self) -> Tensor:
        """What the optimizer was last given, if replicas keep it: float32 [read_size]; only values mean anything."""
        return self._total * self._scale

    def _of_each(self, things: Iterable[T]) -> dict[int, T]:
        """One thing for each replica, by its number."""
        return {replica.replica_id: thing for replica, thing in zip(self._replicas, things, strict=True)}

    def add_share(self, replica: Replica) -> None:
        """Sum this replica's share over all replicas and add its delta to the shared values."""
        part = self._parts[replica.replica_id]
        if self._scaled is not None:
            contributions = [each.contribution for each in self._replicas]
            for span, values, scales in self._scaled[replica.replica_id]:
                total, delta = self._add_scaled(values, contributions, scales, span.start, span.stop, replica.keeps)
                if replica.keeps:
                    self._total[span], self.added[span] = total, delta
            return
        self._sum_values(part)
        self._apply(part, self._decided())

    def _sum_values(self, part: Part) -> None:
        for span in (part.share.weights, part.share.statistics):
            if span.stop > span.start:
                self._sum(span)

    def _scaled_shares(self) -> dict[int, list[tuple[slice, Tensor, list[Tensor]]]]:
        """For a rule that only multiplies: each share's spans, their shared values, and what sums are multiplied by.

        Views are made once, for each takes as long as a small operator.
        """
        shared, layout = self._shared, self._shared.layout
        assert shared.factors is not None
        means = torch.ones(layout.size)
        for segment in layout.segments:
            means[segment.span] = self._scale if segment.kind == "weight" else self._statistics_scale
        # One after the other, as the rule has it: each product is rounded.
        scales = [shared.factors] if bool((means == 1).all()) else [means, shared.factors]
        return {
            own: [(span, shared.vector[span], [scale[span] for scale in scales]) for span in part.spans]
            for own, part in self._parts.items()
        }

    def _captured(self, part: Part) -> Callable[..., Tensor] | None:
        """The rule for a share and the addition to the shared values; none where that is not worth its capture."""
        shared = self._shared
        if not self._in_one_call or self._scaled is not None or self._flag is not None:
            return None
        if len(self._replicas) > MOST_CAPTURED:
            return None

        def add(added: Tensor, total: Tensor, vector: Tensor) -> Tensor:
            part.fill(added, shared.optimizer, total, vector, (self._scale, self._statistics_scale))
            part.add(vector, added)
            return vector

        return shared.capture(add, self.added.clone(), self._total.clone(), shared.plain.clone())

    def commit(self) -> None:
        """Count the update, for all replicas at once, and decide about the loss scale, which no share reads."""
        self._skipped = self._decided()
        if self._loss_scale is not None:
            self._sum(self._shared.layout.regions["loss_scale"])
            self._apply(self._loss_scale, self._skipped)
        shared = self._shared
        landed = sum(shared.commits)
        for replica in self._replicas:
            replica.staleness = landed - replica.version
            shared.commits[replica.replica_id] += 1

    def count(self) -> None:
        """Raise the optimizer's counter, which every share's rule has read by now.

        Contributions are not looked at: their replicas may have begun the next ones.
        """
        if self._counter is not None:
            self._apply(self._counter, self._skipped)

    def _sum(self, span: slice) -> None:
        """Sum a part of the contributions, in the order of the replicas."""
        if self._in_one_call:
            contributions = [replica.contribution for replica in self._replicas]
            shares.sum_into()(self._total, contributions, span.start, span.stop)
            return
        points(READ, "contributions", list(self.contributions.values()), of=CONTRIBUTION)
        total = self._total[span].copy_(self._replicas[0].contribution[span])
        for other in self._replicas[1:]:
            total.add_(other.contribution[span])

    def _decided(self) -> Tensor | None:
        """Whether the update is skipped for overflows: each share counts them for itself, in the same contributions."""
        if self._flag is None:
            return None
        skipped: Tensor = skips(self._overflows(self._flag))
        return skipped

    def _apply(self, part: Part, skipped: Tensor | None) -> None:
        rule = self._rules.get(part)
        if rule is not None:
            rule(self.added, self._total, self._shared.vector)
            return
        part.fill(
            self.added,
            self._shared.optimizer,
            self._total,
            self._shared.vector,
            (self._scale, self._statistics_scale),
            skipped,
        )
        part.add(self._shared.vector, self.added)

    def _overflows(self, flag: int) -> Tensor:
        """How many replicas' gradients overflowed."""
        return torch.stack([replica.contribution[flag] for replica in self._replicas]).sum()


class Part:
    """One share of the flat vector, with or without counter and loss scale, and the canaries that stand in it.

    Args:
        name: the variable's, where the share is one.
        growth_steps: of the loss scale, where this part decides about it; else 0.
    """

    def __init__(
        self, layout: Layout, share: Share, *, counter: bool = False, growth_steps: int = 0, name: str = "share"
    ) -> None:
        self.name = name
        self.share = share
        self._growth_steps = growth_steps
        self._counter = layout.regions["counter"] if counter else slice(0, 0)
        self._count = layout.of_kind("counter")[0].span if "counter" in layout.regions else None
        self._state = layout.loss_scale
        self._loss_scale = layout.regions["loss_scale"] if growth_steps else slice(0, 0)
        all_spans = (*share.spans, self._counter, self._loss_scale)
        self.spans = tuple(span for span in all_spans if span.stop > span.start)
        canaries, sources = layout.canaries.reshape(-1), layout.canary_sources.reshape(-1)
        inside = [any(span.start <= at < span.stop for span in self.spans) for at in canaries.tolist()]
        self._canaries = torch.from_numpy(canaries[inside])
        self._sources = torch.from_numpy(sources[inside])

    def fill(
        self,
        out: Tensor,
        optimizer: Optimizer,
        contribution: Tensor,
        base: Tensor,
        scales: tuple[float, float] = (1.0, 1.0),
        skipped: Tensor | None = None,
    ) -> None:
        """Write this part of the delta: the optimizer's rule for values, the contribution's own counts for canaries.

        Args:
            scales: what gradients and what statistics are multiplied by.
            skipped: 1 where an overflow in some replica takes the whole update's effect away, else 0; canaries count
                it all the same. None: the replica's own overflow, if there is a loss scale.
        """
        share = self.share
        gradient, statistics = contribution[share.weights], contribution[share.statistics]
        if scales[0] != 1.0:
            gradient = gradient * scales[0]
        if scales[1] != 1.0:
            statistics = statistics * scales[1]
        if skipped is None and self._state is not None:
            skipped = skips(contribution[self._state.start])
        iterations = base[self._count] if self._count else None
        deltas = optimizer.delta(gradient, [base[span] for span in share.slots], iterations)
        spans = (share.weights, *share.slots, share.statistics)
        for span, delta in zip(spans, (*deltas, statistics), strict=True):
            out[span] = delta if skipped is None else torch.where(skipped > 0, torch.zeros_like(delta), delta)
        out[self._counter] = 1.0 if skipped is None else 1.0 - skipped
        if self._growth_steps and self._state is not None and skipped is not None:
            before = base[self._state]
            out[self._loss_scale] = 0.0
            out[self._state] = torch.stack(next_state(before[0], before[1], skipped, self._growth_steps)) - before
        out.index_copy_(0, self._canaries, contribution.index_select(0, self._sources))

    def delta(self, optimizer: Optimizer, contribution: Tensor, base: Tensor) -> Tensor:
        """The same for the part that is everything, as a new tensor: float32 [layout.size]."""
        # What replicas write by themselves is no part of it: nothing is added there.
        out = torch.empty_like(base) if self._state is None else torch.zeros_like(base)
        self.fill(out, optimizer, contribution, base)
        return out

    def add(self, vector: Tensor, delta: Tensor) -> None:
        for span in self.spans:
            vector[span].add_(delta[span])

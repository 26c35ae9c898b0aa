"""Several steps of all replicas as one call: a loop in the graph, or with `train.capture=never` operator by operator.

What a step is, `Mirrored.replica_step` says; here it is repeated, and what it came to put together. Whatever a replica
carries from step to step stands on its own device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from trainer.audit.records import Floats
from trainer.workloads.train import Training

Tensor = Any


class Outcome(NamedTuple):
    """One replica's results of a call.

    Attributes:
        rows: of all steps, each ending in `COUNTS`; with `audit=none` the losses alone: float32 [steps, row].
        snapshots, contributions, totals: of the steps that were to be kept, in order: float32 [kept steps, read_size].
        sums: with `audit=full`, of all steps' deltas and of the values' magnitudes: float64 [2, size].
    """

    rows: Floats
    snapshots: Floats | None = None
    contributions: Floats | None = None
    totals: Floats | None = None
    sums: NDArray[np.float64] | None = None


class Place(NamedTuple):
    """A replica's part in every step, on its own device: whose canaries it raises and which random numbers are its."""

    template: Tensor
    gaps: list[Tensor]
    positions: Tensor


class Carried(NamedTuple):
    """What one replica carries from step to step, on its own device; the last two as far as the run is audited.

    Attributes:
        vectors: the last step's contribution and its total.
        done: steps of this call: its own count, so that no other device has to tell it.
    """

    done: Tensor
    rows: Any
    vectors: tuple[Tensor, ...]
    sums: tuple[Tensor, ...]


class Calls:
    """Calls of any number of steps, for the replicas of this process.

    Args:
        flat: the flat variable.
        replica_step: one step of the replica that calls it: (samples, steps, places) -> (row, *vectors, *sums).
        sums: whether steps return sums, as under `audit=full`.
        captures: whether the steps of a call are one graph.
    """

    def __init__(
        self,
        strategy: tf.distribute.Strategy,
        flat: tf.Variable,
        training: Training,
        replica_step: Callable[..., tuple[Tensor, ...]],
        *,
        sums: bool,
        captures: bool,
    ) -> None:
        self._strategy, self._flat, self._training = strategy, flat, training
        self._replica_step, self._sums = replica_step, sums
        self._devices = list(strategy.extended.worker_devices)
        self._take_steps = self._eagerly
        if captures:
            self._take_steps = tf.function(self._in_a_graph, autograph=False, input_signature=self._signature())

    def __call__(
        self,
        first: int,
        last: int,
        kept: Sequence[int],
        plans: Sequence[Tensor],
        firsts: Sequence[Tensor],
        places: Sequence[Place],
    ) -> list[Outcome]:
        """Take the steps from `first` up to but without `last`, and keep the vectors of those in `kept`.

        Args:
            plans: for each replica, on its device, the samples of every step: int32 [steps, batch]; `firsts` its first
                step's number, `places` the part that it takes.
        """
        blocks = tf.constant(_blocks(first, last, kept), tf.int32)
        results = self._take_steps(blocks, tf.constant(len(kept)), plans, firsts, places)
        return [outcome_of(len(kept), *(part.numpy() for part in own)) for own in results]

    def _signature(self) -> tuple[Any, ...]:
        """Of `_in_a_graph`."""
        size, gaps = self._training.layout.read_size, self._training.gaps
        place = Place(
            tf.TensorSpec([size]),
            [tf.TensorSpec([len(range(*gap.indices(size)))]) for gap in gaps],
            tf.TensorSpec([self._training.batch_size], tf.int32),
        )
        plan, number = tf.TensorSpec([None, self._training.batch_size], tf.int32), tf.TensorSpec([], tf.int32)
        each = [(plan, number, place)] * len(self._devices)
        return tf.TensorSpec([None, 2], tf.int32), number, *(list(part) for part in zip(*each, strict=True))

    def _in_a_graph(
        self,
        blocks: Tensor,
        num_kept: Tensor,
        plans: Sequence[Tensor],
        firsts: Sequence[Tensor],
        places: Sequence[Place],
    ) -> list[list[Tensor]]:
        """The steps of a call, in one graph.

        Args:
            blocks: runs of steps, each by the number of steps that are done at its end, and by where what its only
                step came to is kept; what is not to be kept goes to the place behind all others: int32 [blocks, 2].
            plans: for each replica the samples of every step: int32 [steps, batch]; `firsts` its first step's number.

        Returns:
            Per replica what an `Outcome` has, the place for what is not kept included.
        """

        def steps(end: Tensor, carried: Sequence[Carried]) -> tuple[Carried, ...]:
            (after,) = tf.while_loop(
                lambda carried: carried[0].done < end,
                lambda carried: (self._step(carried, plans, firsts, places),),
                (tuple(carried),),
                parallel_iterations=1,
            )
            return tuple(after)

        carried = tuple(self._begun(device, plan) for device, plan in zip(self._devices, plans, strict=True))
        if not self._training.audited:
            carried = steps(tf.shape(plans[0])[0], carried)
            return [[each.rows.stack()] for each in carried]

        def body(block: Tensor, carried: Any, kept: Any) -> Any:
            before = self._snapshots()
            carried = steps(blocks[block, 0], carried)
            slot = blocks[block, 1]
            found = [(snapshot, *each.vectors) for snapshot, each in zip(before, carried, strict=True)]
            kept = tuple(
                tuple(array.write(slot, vector) for array, vector in zip(*own, strict=True))
                for own in zip(kept, found, strict=True)
            )
            return block + 1, carried, kept

        size = self._training.layout.read_size
        arrays = [tf.TensorArray(tf.float32, num_kept + 1, element_shape=[size]) for _ in range(3 * len(plans))]
        kept = tuple(zip(arrays[::3], arrays[1::3], arrays[2::3], strict=True))
        _, carried, kept = tf.while_loop(
            lambda block, *_: block < tf.shape(blocks)[0], body, (tf.constant(0), carried, kept), parallel_iterations=1
        )
        return [
            [each.rows.stack(), *(array.stack() for array in own), *each.sums]
            for each, own in zip(carried, kept, strict=True)
        ]

    def _begun(self, device: str, plan: Tensor) -> Carried:
        """What a replica carries into a call's first step."""
        with tf.device(device):
            nothing = tf.zeros([self._training.layout.read_size])
            vectors = (nothing, nothing) if self._training.audited else ()
            sums = (tf.zeros([2, self._training.layout.size], tf.float64),) if self._sums else ()
            return Carried(tf.constant(0), tf.TensorArray(tf.float32, tf.shape(plan)[0]), vectors, sums)

    def _step(
        self, carried: Sequence[Carried], plans: Sequence[Tensor], firsts: Sequence[Tensor], places: Sequence[Place]
    ) -> tuple[Carried, ...]:
        """One step of all replicas."""
        samples, steps = [], []
        for device, each, plan, first in zip(self._devices, carried, plans, firsts, strict=True):
            with tf.device(device):
                samples.append(plan[each.done])
                steps.append(first + each.done)
        found = self._results(self._strategy.run(self._replica_step, args=(samples, steps, places)))
        after = []
        for device, each, (row, *vectors) in zip(self._devices, carried, found, strict=True):
            with tf.device(device):
                sums = tuple(total + added for total, added in zip(each.sums, vectors[3:], strict=True))
                after.append(Carried(each.done + 1, each.rows.write(each.done, row), tuple(vectors[1:3]), sums))
        return tuple(after)

    def _results(self, outcome: Sequence[Any]) -> list[tuple[Tensor, ...]]:
        """Per replica, what each of them returned."""
        return list(zip(*(self._strategy.experimental_local_results(part) for part in outcome), strict=True))

    def _snapshots(self) -> list[Tensor]:
        """What each replica reads now."""
        found = []
        for device, copy in zip(self._devices, self._strategy.experimental_local_results(self._flat), strict=True):
            with tf.device(device):
                found.append(copy.read_value()[: self._training.layout.read_size])
        return found

    def _eagerly(
        self,
        blocks: Tensor,
        num_kept: Tensor,
        plans: Sequence[Tensor],
        firsts: Sequence[Tensor],
        places: Sequence[Place],
    ) -> list[list[Tensor]]:
        """The same, operator by operator."""
        taken = []
        for done in range(len(plans[0])):
            samples, steps = [plan[done] for plan in plans], [first + done for first in firsts]
            taken.append(self._results(self._strategy.run(self._replica_step, args=(samples, steps, places))))
        kept = [int(end) - 1 for end, slot in blocks.numpy() if slot < num_kept]
        return [self._together([step[at] for step in taken], kept) for at in range(len(self._devices))]

    def _together(self, taken: Sequence[tuple[Tensor, ...]], kept: Sequence[int]) -> list[Tensor]:
        """One replica's steps of a call as `_in_a_graph` returns them."""
        rows, *vectors = zip(*taken, strict=True)
        nothing = tf.zeros([self._training.layout.read_size])
        stacked = [tf.stack([*(vector[step] for step in kept), nothing]) for vector in vectors[:3]]
        return [tf.stack(rows), *stacked, *(sum(sums) for sums in vectors[3:])]


def outcome_of(num_kept: int, rows: Floats, *parts: Any) -> Outcome:
    """One replica's results, from what its graph or its steps returned.

    Args:
        parts: snapshots, contributions and totals of at least the kept steps, and sums, as far as the run is audited.
    """
    return Outcome(rows, *(stacked[:num_kept] for stacked in parts[:3]), *parts[3:])


def _blocks(first: int, last: int, kept: Sequence[int]) -> NDArray[np.int32]:
    """The runs of steps that a call is made of, for `_in_a_graph`: each kept step is one of its own."""
    blocks, done = [], 0
    for slot, step in enumerate(kept):
        if step - first > done:
            blocks.append((step - first, len(kept)))
        done = step - first + 1
        blocks.append((done, slot))
    if last - first > done:
        blocks.append((last - first, len(kept)))
    return np.array(blocks, np.int32).reshape(-1, 2)

"""Faults in mirrored replicas, and a look at their gradients: built into the graph only where they are asked for.

What the host does on a replica's behalf (raise, delay, hang, kill) happens between two calls of the graph, of which one
ends before the step; a corrupted gradient is that replica's own, in the graph.
"""

from __future__ import annotations

import re
from typing import Any

import tensorflow as tf

from trainer.audit.row import Row
from trainer.config import Config
from trainer.faults import Faults
from trainer.state.layout import Layout
from trainer.strategies.hosting import RunBroken, stopped_by

Tensor = Any
MARK = "not finite at (replica, step, variable, values, first):"
FOUND = re.compile(re.escape(MARK) + r"\D*(\d+)\D+(\d+)\D+(\d+)\D+(\d+)\D+(\d+)")


class Guard:
    """What is done to replicas' contributions between their computation and their use.

    Thread-safety: `contribution` and `row` are traced, or run, by one replica's thread at a time.
    """

    def __init__(self, config: Config, layout: Layout, row: Row) -> None:
        self.faults = Faults(config.faults)
        self._corruptions = [self.faults.corruptions(own) for own in range(config.replicas_in_all)]
        self._stops = config.train.on_nonfinite == "stop"
        self._layout, self._row = layout, row

    def guarded(
        self, own: int, step: Tensor, contribution: Tensor, row: Tensor, template: Tensor, positions: Tensor
    ) -> tuple[Any, Any]:
        """A replica's contribution and row as they go on.

        Args:
            template, positions: as `Training.step` was given them. They are those of the replica whose part is taken,
                which after the run may be another's: nothing is corrupted then.
        """
        struck = positions[0] == own * int(positions.shape[0])
        for fault in self._corruptions[own]:
            # Chosen, not multiplied: 0 times an infinity is not 0.
            place = tf.constant([[self._layout.read_segments[0].values]])
            corrupted = tf.tensor_scatter_nd_add(contribution, place, [tf.constant(fault.value, tf.float32)])
            contribution = tf.where(struck & (step == fault.step), corrupted, contribution)
        if self._corruptions[own] and self._layout.loss_scale is not None:
            contribution, row = self._skipping(contribution, row, template)
        if self._stops:
            with tf.control_dependencies([self._asserted(own, step, contribution)]):
                contribution = tf.identity(contribution)
        return contribution, row

    def _skipping(self, contribution: Tensor, row: Tensor, template: Tensor) -> tuple[Tensor, Tensor]:
        """As the step itself does with what it finds to be not finite: nothing gets out but that it was so."""
        assert self._layout.loss_scale is not None
        finite = tf.reduce_all(tf.math.is_finite(contribution))
        flag = tf.one_hot(self._layout.loss_scale.start, self._layout.read_size)
        contribution = tf.where(finite, contribution, template + flag)
        if row.shape[0] == 1:
            return contribution, row  # audit=none
        overflow = tf.constant([[self._row.loss_scale.stop - 1]])
        return contribution, tf.where(finite, row, tf.tensor_scatter_nd_update(row, overflow, [1.0]))

    def _asserted(self, own: int, step: Tensor, contribution: Tensor) -> Tensor:
        """Ends the call where a value is not finite, with what `broken` reads again."""
        wrong = tf.logical_not(tf.math.is_finite(contribution))
        # What is told is computed only if it has to be: a graph's look at the gradients is one pass.
        segments = self._layout.read_segments

        def told() -> Tensor:
            counts = tf.stack([tf.reduce_sum(tf.cast(wrong[each.span], tf.int32)) for each in segments])
            variable = tf.argmax(tf.cast(counts > 0, tf.int32), output_type=tf.int32)
            starts = tf.constant([each.values for each in segments])
            first = tf.argmax(tf.cast(wrong, tf.int32), output_type=tf.int32) - starts[variable]
            data = [MARK, tf.constant(own), step, variable, counts[variable], first]
            with tf.control_dependencies([tf.debugging.Assert(False, data)]):
                return tf.constant(False)

        return tf.cond(tf.reduce_any(wrong), told, lambda: tf.constant(True))

    def broken(self, error: Exception) -> RunBroken | None:
        """What a call that ended by `_asserted` says; None where it ended otherwise."""
        found = FOUND.search(str(error)) if self._stops else None
        if found is None:
            return None
        own, step, variable, values, first = (int(number) for number in found.groups())
        return stopped_by(self._layout, own, step, variable, values, first)

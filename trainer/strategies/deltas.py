"""What a mirrored replica adds to its copy of the flat vector, from what reached it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from trainer.state.layout import Layout
from trainer.state.loss_scale import next_state, skips
from trainer.updates.optimizers import Optimizer

Tensor = Any


@dataclass(frozen=True)
class Deltas:
    """Turns what reached a replica into what is added to its copy of the flat vector.

    Args:
        scale: what the sum of gradients is multiplied by; `statistics_scale` the sum of the statistics' deltas.
        growth_steps: of the loss scale, where there is one.
    """

    layout: Layout
    optimizer: Optimizer
    scale: float
    statistics_scale: float
    growth_steps: int

    @property
    def needs_base(self) -> bool:
        """Whether a delta depends on what it is added to: on slots, a count of updates or a loss scale."""
        return self.layout.size > int(self.layout.regions["statistics"].stop)

    def full(self, total: Tensor, own: Tensor, averaged: Tensor | None, base: Tensor) -> Tensor:
        """What is added to everything, slots taken from `base`: float32 [layout.size].

        Values are scaled and go through the optimizer's rule; canaries are taken over as they are.

        Args:
            total: the contribution to apply, summed over replicas or not: float32 [read_size].
            own: the replica's own contribution.
            averaged: the sum of all replicas' statistics regions, where they are reduced whatever else is.
        """
        layout = self.layout
        weights, statistics, region = (layout.regions[name] for name in ("weights", "statistics", "loss_scale"))
        given_statistics = own[statistics] if "statistic" in layout.apart else total[statistics]
        given_statistics = given_statistics if averaged is None else averaged
        given_state = own[region] if "loss_scale" in layout.apart else total[region]
        given = total
        if averaged is not None or layout.apart:
            given = tf.concat([total[weights], given_statistics, given_state], 0)
        slots = [base[layout.regions[name]] for name in layout.slots]
        counter = layout.of_kind("counter")
        iterations = base[counter[0].span] if counter else None
        deltas = self.optimizer.delta(_scaled(total[weights], self.scale), slots, iterations)
        unscaled = "statistic" in layout.apart and averaged is None
        parts = [deltas[0]]
        if statistics.stop > statistics.start:
            parts.append(given_statistics if unscaled else _scaled(given_statistics, self.statistics_scale))
        more = [*deltas[1:]]
        if counter:
            more.append(tf.ones(counter[0].end - counter[0].start))
        state = layout.loss_scale
        if state is not None:
            # A replica whose own gradients overflowed has contributed nothing; an update is skipped for all only where
            # they decide together.
            skipped = skips(given[state.start])
            keeps = 1.0 if "loss_scale" in layout.apart else 1.0 - skipped
            parts, more = [part * keeps for part in parts], [part * keeps for part in more]
            new = tf.stack(next_state(base[state][0], base[state][1], skipped, self.growth_steps)) - base[state]
            parts.append(tf.pad(new, [[state.start - region.start, region.stop - state.stop]]))
        values = tf.concat([*parts, *more], 0) if len(parts) + len(more) > 1 else parts[0]
        # A few places of many: written over where the values stand, which a choice between two whole vectors is not.
        places = layout.canaries.reshape(-1, 1).astype(np.int32)
        raised_by = layout.canary_sources.reshape(-1).astype(np.int32)
        return tf.tensor_scatter_nd_update(values, places, tf.gather(given, raised_by))


def _scaled(values: Tensor, scale: float) -> Tensor:
    return values * scale if scale != 1.0 else values

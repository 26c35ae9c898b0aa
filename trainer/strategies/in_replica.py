"""What the functions that MirroredStrategy's replicas run have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

Tensor = Any


def replica_id() -> int:
    """The calling replica's number, while it is traced, too."""
    return int(tf.get_static_value(tf.distribute.get_replica_context().replica_id_in_sync_group))


def gradients_by_tape(
    loss_of: Callable[[list[Tensor]], tuple[Tensor, Any]], weights: list[Tensor]
) -> tuple[Tensor, Any, Sequence[Tensor]]:
    """A loss and its gradients."""
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(weights)
        loss, rest = loss_of(weights)
    return loss, rest, tape.gradient(loss, weights)

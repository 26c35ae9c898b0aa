"""What the functions that MirroredStrategy's replicas run have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from trainer.schedule.operations import BARRIER, LOCK, VARIABLE
from trainer.schedule.point import listener, point

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


def point_in_copy(kind: str, name: str, *, of: str = VARIABLE) -> None:
    """Announce an operation on the calling replica's own copy of a variable. Costs nothing where nobody listens."""
    heard = listener()
    if heard is not None:
        point(kind, f"{heard[1]}:{name}", of=of)


def barrier(name: str) -> None:
    """Under a schedule, come together with all other replicas; nothing where nobody listens."""
    heard = listener()
    if heard is not None:
        point(BARRIER, name, of=LOCK, value=heard[0].order.num_replicas)

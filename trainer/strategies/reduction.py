"""An all-reduce for replicas on one machine: every device adds all replicas' tensors itself, in replica order.

MirroredStrategy picks a ring for logical CPU devices, which is slow between them. Adding directly also gives every
device the same sum bit for bit, whatever its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf
from tensorflow.python.distribute import cross_device_ops, distribute_utils, values


class DirectReduction(tf.distribute.CrossDeviceOps):  # type: ignore[misc]
    """Sum or mean by direct addition, for `tf.distribute.MirroredStrategy(cross_device_ops=...)`."""

    def reduce_implementation(self, reduce_op: Any, per_replica_value: Any, destinations: Any, options: Any) -> Any:
        parts = per_replica_value.values
        results = []
        for device in cross_device_ops.get_devices_from(destinations, self._canonicalize_devices):
            with tf.device(device):
                total = _added(parts)
                results.append(total / len(parts) if reduce_op == tf.distribute.ReduceOp.MEAN else total)
        return distribute_utils.regroup(results, wrap_class=values.Mirrored)

    def batch_reduce_implementation(self, reduce_op: Any, value_destination_pairs: Any, options: Any) -> Any:
        return [
            self.reduce_implementation(reduce_op, value, destinations, options)
            for value, destinations in value_destination_pairs
        ]

    def broadcast_implementation(self, tensor: Any, destinations: Any) -> Any:
        return cross_device_ops.simple_broadcast(tensor, destinations, always_mirrored=True)

    def _gather_implementation(self, *_: Any) -> Any:
        raise NotImplementedError("replicas are reduced here, never gathered")


class WorkerReduction(DirectReduction):
    """The same for several workers: each adds its own replicas' tensors, and all are given the sum of the sums.

    Args:
        across: reduces one tensor of each worker.
        device: of this worker, on which its own sum is made.
    """

    def __init__(self, across: tf.distribute.CrossDeviceOps, num_workers: int, device: str) -> None:
        super().__init__()
        self._across, self._num_workers, self._device = across, num_workers, device

    @property
    def _num_between_graph_workers(self) -> int:
        # Where it is one, TensorFlow takes what a single device has for the sum.
        return self._num_workers

    def reduce_implementation(self, reduce_op: Any, per_replica_value: Any, destinations: Any, options: Any) -> Any:
        parts = per_replica_value.values
        with tf.device(self._device):
            own = _added(parts)
            total = self._across.reduce(tf.distribute.ReduceOp.SUM, own, self._device)
            if reduce_op == tf.distribute.ReduceOp.MEAN:
                total = total / (len(parts) * self._num_workers)
        results = []
        for device in cross_device_ops.get_devices_from(destinations, self._canonicalize_devices):
            with tf.device(device):
                results.append(tf.identity(total))
        return distribute_utils.regroup(results, wrap_class=values.Mirrored)


def _added(parts: Sequence[Any]) -> Any:
    """The sum, in order."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total

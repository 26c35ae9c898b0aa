"""An all-reduce for replicas on one machine: every device adds all replicas' tensors itself, in replica order.

MirroredStrategy picks a ring for logical CPU devices, which is slow between them. Adding directly also gives every
device the same sum bit for bit, whatever its place.
"""

from __future__ import annotations

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
                total = parts[0]
                for part in parts[1:]:
                    total = total + part
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

"""MirroredStrategy over logical CPUs: one for each replica, as TensorFlow's distributed training makes them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tensorflow as tf

OPTIONS: dict[str, dict[str, Any]] = {
    "replicas": {"type": int, "default": 2, "help": "logical CPUs (default: 2)"},
    "reduction": {
        "choices": ["default", "one_device"],
        "default": "default",
        "help": "cross_device_ops: what MirroredStrategy picks by itself, or ReductionToOneDevice (default: default)",
    },
}


def mirrored(replicas: int, reduction: str) -> tf.distribute.MirroredStrategy:
    """The strategy, with an intra-op thread for each replica."""
    # Keras and TensorFlow read these when they are imported.
    os.environ["KERAS_BACKEND"] = "tensorflow"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(replicas)
    (cpu,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * replicas)
    operations = tf.distribute.ReductionToOneDevice() if reduction == "one_device" else None
    devices = [f"CPU:{replica}" for replica in range(replicas)]
    return tf.distribute.MirroredStrategy(devices, cross_device_ops=operations)

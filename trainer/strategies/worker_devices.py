"""MultiWorkerMirroredStrategy with several replicas on each worker, on CPUs too.

TensorFlow's own gives a worker without GPUs one replica. Its devices are asked for in one place, which is overridden
here: the rest of it is made for any number of them. And as under MirroredStrategy a ring through logical CPU devices is
slow (`reduction.py`), so each worker adds its own replicas' tensors itself, in their order, and TensorFlow's collective
joins the workers' sums. On GPUs everything is TensorFlow's own, one collective over all of them.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf
from tensorflow.python.distribute import collective_all_reduce_strategy

from trainer.strategies.reduction import WorkerReduction


class MultiWorkerMirroredStrategy(tf.distribute.MultiWorkerMirroredStrategy):  # type: ignore[misc]
    """Reads `TF_CONFIG`, and waits until all workers are there.

    Args:
        num_replicas: of each worker.
        kind: of their devices, CPU or GPU; there are as many.
    """

    def __init__(self, num_replicas: int, kind: str) -> None:
        # TensorFlow's own constructor makes the devices before it could be told how many.
        tf.distribute.Strategy.__init__(self, _Extended(self, num_replicas, kind))


class _Extended(collective_all_reduce_strategy.CollectiveAllReduceExtended):  # type: ignore[misc]
    def __init__(self, strategy: tf.distribute.Strategy, num_replicas: int, kind: str) -> None:
        self._asked = num_replicas, kind
        super().__init__(
            strategy,
            cluster_resolver=tf.distribute.cluster_resolver.TFConfigClusterResolver(),
            communication_options=tf.distribute.experimental.CommunicationOptions(),
        )
        if kind == "CPU":
            self._cross_device_ops = WorkerReduction(
                self._host_cross_device_ops, self._num_workers, self.worker_devices[0]
            )

    def _initialize_local_devices(self, cluster_resolver: Any, worker_device: str) -> tuple[tuple[str, ...], str]:
        num_replicas, kind = self._asked
        return tuple(f"{worker_device}/device:{kind}:{index}" for index in range(num_replicas)), kind

    def _replica_ctx_all_reduce(self, reduce_op: Any, value: Any, options: Any = None) -> Any:
        if isinstance(self._cross_device_ops, WorkerReduction):
            # Replicas come together first, as they do under MirroredStrategy.
            return tf.distribute.StrategyExtended._replica_ctx_all_reduce(self, reduce_op, value, options)
        return super()._replica_ctx_all_reduce(reduce_op, value, options)

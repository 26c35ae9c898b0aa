"""`workload.variable=tensorflow`: a float64 tf.Variable, whose counts are exact up to 2**53 and never wrap."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from trainer.config import Config
from trainer.schedule.visible_variable import VisibleVariable
from trainer.workloads.counter.shared import TOTAL, Numbers, Shared, array


def prepare(threads_per_replica: int) -> None:
    """Set what TensorFlow must have before its first operation. Under `mirrored` the strategy has done so."""
    tf.config.threading.set_intra_op_parallelism_threads(threads_per_replica)


class TensorflowVariable:
    def __init__(self, config: Config) -> None:
        elements = config.workload.elements
        self.shape = (elements,) if elements else ()

    def make(self) -> Shared:
        return Shared(tf.Variable(tf.zeros(self.shape, tf.float64)))

    def visible(self) -> Shared:
        return Shared(VisibleVariable(tf.Variable(tf.zeros(self.shape, tf.float64)), TOTAL))

    def fill(self, shared: Shared, number: float) -> None:
        shared.total.assign(tf.fill(self.shape, tf.constant(number, tf.float64)))

    def amount(self, number: float) -> Any:
        # Of the variable's own shape, which `assign_add` insists on.
        return tf.fill(self.shape, tf.constant(number, tf.float64))

    def values(self, value: Any) -> Numbers:
        return array(getattr(value, "variable", value).numpy())

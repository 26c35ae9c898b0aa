"""`workload=dropout_masks`: what Keras' own Dropout draws in MirroredStrategy's replicas.

Its seed is a variable that counts the draws. Built in the strategy's scope, as in any model, it has a copy for each
replica; all start alike and count alike, so every replica draws the same mask. Built outside of the scope it is one
variable for all: no two draws are alike, but which one a replica gets depends on how many replicas there are. Derived
masks (`models.dropout`) do neither. The same body runs all three, on the same inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from models.dropout import Dropout
from models.random import Key, drawing
from trainer.audit.findings import Finding
from trainer.audit.records import RunRecord
from trainer.audit.verdict import Anomaly
from trainer.config import Config
from trainer.strategies.hosting import StopFlag, Watcher
from trainer.workloads.defaults.stock_strategy import stock_strategy

RATE = 0.5
# Of one sample: so many that no two masks are the same by chance.
ACTIVATIONS = 256

Mask = NDArray[np.bool_]


@dataclass
class Drawn:
    """What one layer drew: masks, each of one replica at one step.

    Attributes:
        built: what the layer is told apart by.
        repeated: masks that another replica drew at the same step, too; and where that was first.
        dependent: masks that are not what one replica draws for the same samples when it has the whole joint batch;
            likewise.
    """

    built: str
    masks: int = 0
    repeated: int = 0
    dependent: int = 0
    first_repeated: str = ""
    first_dependent: str = ""

    def add(self, step: int, masks: Sequence[Mask], joint: Mask) -> None:
        """Count one step's masks.

        Args:
            masks: each replica's, [batch, activations].
            joint: what one replica draws for the joint batch, [replicas x batch, activations].
        """
        for own, (mask, expected) in enumerate(zip(masks, np.split(joint, len(masks)), strict=True)):
            alike = [other for other, each in enumerate(masks) if other != own and np.array_equal(mask, each)]
            self.masks += 1
            if alike:
                self.repeated += 1
                self.first_repeated = self.first_repeated or f"step {step}: replicas {own} and {alike[0]}"
            if not np.array_equal(mask, expected):
                self.dependent += 1
                self.first_dependent = self.first_dependent or f"step {step}: replica {own}"


def run(config: Config, record: RunRecord, watcher: Watcher, stop: StopFlag) -> dict[str, Finding]:
    num_replicas, batch, seed = config.num_replicas, config.train.batch_size, config.train.seed
    strategy = stock_strategy(num_replicas)
    record.engine = "tf.function"
    with strategy.scope():
        inside = keras.layers.Dropout(RATE, seed=seed)
    outside = keras.layers.Dropout(RATE, seed=seed)
    alone = keras.layers.Dropout(RATE, seed=seed)
    derived = Dropout(RATE, layer_index=0)

    def in_replica(step: Any) -> list[Any]:
        first = tf.distribute.get_replica_context().replica_id_in_sync_group * batch
        with drawing(Key(seed, step, first + tf.range(batch))):
            return [_mask(layer, batch) for layer in (inside, outside, derived)]

    def all_replicas(step: Any) -> tuple[Any, list[Any]]:
        with drawing(Key(seed, step, tf.range(num_replicas * batch))):
            joint = [_mask(layer, num_replicas * batch) for layer in (alone, derived)]
        return strategy.run(in_replica, args=(step,)), joint

    take = tf.function(all_replicas, autograph=False)
    found = Drawn("built in the strategy's scope"), Drawn("built outside of it"), Drawn("derived")
    for step in range(config.train.steps):
        if stop.is_set():
            return {}
        drawn, (stock, own) = take(tf.constant(step))
        for each, masks, joint in zip(found, drawn, (stock, stock, own), strict=True):
            each.add(step, [mask.numpy() for mask in strategy.experimental_local_results(masks)], joint.numpy())
        for replica in record.replicas:
            replica.steps_done = step + 1
        watcher.progress(record)
    return {"rng_independent": judge(*found)}


def _mask(layer: Any, batch: int) -> Any:
    """What a layer keeps: bool [batch, activations]."""
    return layer(tf.ones((batch, ACTIVATIONS)), training=True) != 0


def judge(inside: Drawn, outside: Drawn, derived: Drawn) -> Finding:
    """Tell what stock Dropout did, built in either place, and beside it what derived masks did."""
    layers = (inside, outside, derived)
    told = "; ".join(f"{each.repeated:,} and {each.dependent:,} {each.built}" for each in layers)
    finding = Finding(
        f"of {inside.masks:,} masks, drawn by another replica at the same step too, and other than one replica would "
        f"draw: {told}"
    )
    remedy = (
        "state.random_numbers=derived, as models.dropout draws: "
        f"{derived.repeated:,} repeated and {derived.dependent:,} dependent in this run"
    )
    for each in (inside, outside):
        where = f"keras.layers.Dropout {each.built}"
        if each.repeated:
            witness = f"{each.first_repeated} drew the same mask"
            anomaly = Anomaly("repeated_random_numbers", each.repeated, each.masks, where, witness, remedy=remedy)
            finding.anomalies.append(anomaly)
        elif each.dependent:
            witness = f"{each.first_dependent} drew another mask than one replica alone draws for the same samples"
            anomaly = Anomaly("dependent_random_numbers", each.dependent, each.masks, where, witness, remedy=remedy)
            finding.anomalies.append(anomaly)
    return finding

"""`workload=moving_statistics`: plain Keras training under MirroredStrategy, and the moving statistics of every copy.

Keras' optimizers reduce gradients, so that all copies of a weight stay equal. Nobody reduces what BatchNormalization
notes: each replica writes the mean and variance of its own batch to its own copy, and the copies drift apart. From then
on a prediction depends on which replica makes it, and what is saved is one copy of several.

The cure that Keras has is `BatchNormalization(synchronized=True)`, which normalizes the joint batch. The same body runs
both, on the same data from the same weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

import data
from data.dataset import Dataset
from data.plan import BatchPlan
from trainer.audit.findings import Finding
from trainer.audit.records import Floats, RunRecord
from trainer.audit.verdict import Anomaly
from trainer.config import Config
from trainer.rules import validate_samples
from trainer.samples import Samples
from trainer.strategies.hosting import StopFlag, Watcher
from trainer.workloads.defaults.stock_strategy import stock_strategy

# In Keras' order.
STATISTICS = ("moving_mean", "moving_variance")
LEARNING_RATE = 0.1


class Drift(NamedTuple):
    """One statistic of one copy that is not copy 0's: how far off it was at most, and where at the end."""

    name: str
    copy: int
    off: float
    element: int
    values: tuple[float, float]


class Trained(NamedTuple):
    """What a model's training came to.

    Attributes:
        drifts: statistics of copies that were not copy 0's at the end.
        looked, drifted: looks at the copies, one after each step, and how many of them found a drift.
        of: statistics that have to be copy 0's: those of all other copies.
        weights_off: weights of which some copy was not copy 0's at the end.
        logits_off: how far apart two replicas' logits are for one held-out sample, at most.
        classified_otherwise: held-out samples that not all replicas classify alike.
    """

    drifts: list[Drift]
    looked: int
    drifted: int
    of: int
    weights_off: int
    logits_off: float
    classified_otherwise: int


def run(config: Config, record: RunRecord, watcher: Watcher, stop: StopFlag) -> dict[str, Finding]:
    dataset = data.load(config.data, config.train.seed)
    # What could not be told before the data were loaded.
    validate_samples(config, Samples(len(dataset.train_x), dataset.train_x.shape[1:]))
    strategy = stock_strategy(config.num_replicas)
    record.engine = "keras fit"

    def progress() -> None:
        for replica in record.replicas:
            replica.steps_done += 1
        watcher.progress(record)

    found = train(config, strategy, dataset, stop, progress, synchronized=False)
    if stop.is_set():
        return {}
    cured = train(config, strategy, dataset, stop, lambda: None, synchronized=True)
    return {"batch_statistics_kept": judge(found, cured, len(dataset.test_x))}


def train(
    config: Config, strategy: Any, dataset: Dataset, stop: StopFlag, progress: Callable[[], None], *, synchronized: bool
) -> Trained:
    """Train a model as any user of MirroredStrategy does, and look at all copies after every step."""
    # So that every model starts from the same weights.
    keras.utils.set_random_seed(config.train.seed)
    with strategy.scope():
        model = keras.Sequential(
            [
                keras.Input(dataset.train_x.shape[1:]),
                keras.layers.Flatten(),
                keras.layers.Dense(64),
                keras.layers.BatchNormalization(synchronized=synchronized),
                keras.layers.ReLU(),
                keras.layers.Dense(dataset.num_classes),
            ]
        )
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(optimizer=keras.optimizers.SGD(LEARNING_RATE), loss=loss)
    look = Look(strategy, model, stop, progress)
    model.fit(_batches(config, dataset), shuffle=False, verbose=0, callbacks=[look])
    return Trained(
        look.drifts,
        look.looked,
        look.drifted,
        len(STATISTICS) * (config.num_replicas - 1),
        sum(_differ(copies_of(strategy, weight)) for weight in model.trainable_variables),
        *_predicted_apart(strategy, model, dataset.test_x),
    )


class Look(keras.callbacks.Callback):  # type: ignore[misc]
    """Reads every copy of every moving statistic after every step."""

    def __init__(self, strategy: Any, model: Any, stop: StopFlag, progress: Callable[[], None]) -> None:
        super().__init__()
        self._strategy, self._stop, self._progress = strategy, stop, progress
        self._statistics = [each for each in model.non_trainable_variables if each.name in STATISTICS]
        self.drifts: list[Drift] = []
        self.looked = self.drifted = 0

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.drifts = [
            drift for each in self._statistics for drift in drifts(each.name, copies_of(self._strategy, each))
        ]
        self.looked += 1
        self.drifted += bool(self.drifts)
        self._progress()
        if self._stop.is_set():
            self.model.stop_training = True


def copies_of(strategy: Any, variable: Any) -> list[Floats]:
    """The values of a Keras variable on every device."""
    return [copy.numpy() for copy in strategy.experimental_local_results(variable.value)]


def drifts(name: str, copies: list[Floats]) -> list[Drift]:
    """The copies that are not bitwise copy 0."""
    found = []
    for own, copy in enumerate(copies):
        if copy.tobytes() != copies[0].tobytes():
            element = int(np.abs(copy - copies[0]).argmax())
            values = float(copies[0][element]), float(copy[element])
            found.append(Drift(name, own, abs(values[1] - values[0]), element, values))
    return found


def _differ(copies: list[Floats]) -> bool:
    return any(copy.tobytes() != copies[0].tobytes() for copy in copies)


def _batches(config: Config, dataset: Dataset) -> Any:
    """The batch plan's joint batches, in order."""
    steps, seed = config.train.steps, config.train.seed
    plan = BatchPlan(len(dataset.train_x), config.num_replicas, config.train.batch_size, seed)
    joint = tf.data.Dataset.from_tensor_slices(plan.indices(0, steps).reshape(steps, -1))

    def gathered(samples: Any) -> Any:
        return tf.gather(dataset.train_x, samples), tf.gather(dataset.train_y, samples)

    # Else AutoGraph writes it to a temporary file, and takes that away at an exit that a run does not wait for.
    return joint.map(tf.autograph.experimental.do_not_convert(gathered))


def _predicted_apart(strategy: Any, model: Any, x: Floats) -> tuple[float, int]:
    """Largest difference between replicas' logits for one sample, and the samples that not all classify alike."""
    predict = tf.function(lambda: strategy.run(lambda: model(x, training=False)), autograph=False)
    logits = np.stack([each.numpy() for each in strategy.experimental_local_results(predict())])
    classes = logits.argmax(axis=2)
    return float(np.ptp(logits, axis=0).max()), int((classes != classes[0]).any(axis=0).sum())


def judge(found: Trained, cured: Trained, num_held_out: int) -> Finding:
    """Tell the drift of plain BatchNormalization, and beside it what synchronizing leaves of it."""
    cure = f"BatchNormalization(synchronized=True) {len(cured.drifts)} of {cured.of}"
    finding = Finding(
        f"{len(found.drifts)} of {found.of} further copies of moving statistics are not copy 0's at the end, and some "
        f"were not after {found.drifted:,} of {found.looked:,} steps; with {cure}, after {cured.drifted:,} of "
        f"{cured.looked:,}; copies of {found.weights_off} weights differ"
    )
    if not found.drifts:
        return finding
    worst = max(found.drifts, key=lambda drift: drift.off)
    furthest = [max((each.off for each in found.drifts if each.name == name), default=0.0) for name in STATISTICS]
    finding.anomalies.append(
        Anomaly(
            "drifted_statistics",
            len(found.drifts),
            found.of,
            ", ".join(f"{name} by up to {off:.3g}" for name, off in zip(STATISTICS, furthest, strict=True)),
            f"after {found.looked:,} steps {worst.name}[{worst.element}] is {worst.values[0]:.6g} in copy 0 and "
            f"{worst.values[1]:.6g} in copy {worst.copy}; replicas' logits for one held-out sample differ by up to "
            f"{found.logits_off:.3g}, and {found.classified_otherwise:,} of {num_held_out:,} samples are not "
            "classified alike by all",
            remedy=f"{cure} in this run; workload=train update_mode=all_reduce keeps them equal without, by "
            "state.batch_statistics=transactional or reduced",
        )
    )
    return finding

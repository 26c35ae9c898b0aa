"""The `train` workload: data, model, flat vector and the step, the same code on both backends.

Keras must be imported with its backend chosen, so this module is imported in the run's own process only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

import data.arrays
import models
from data.plan import BatchPlan
from models.random import Key, keyed
from trainer.bring import bring
from trainer.config import Config, ConfigError, Custom
from trainer.rules import validate_samples
from trainer.samples import Samples
from trainer.state import layout as layouts
from trainer.updates import optimizers
from trainer.workloads.networks import KerasNetwork, Network

Tensor = Any  # of the backend
PROBE = 16  # logits of a batch's first sample that are kept each step, to read the compute dtype off

# f(weights) -> (loss, anything else); returns (loss, anything else, gradients of the loss by the weights, None where it
# does not depend on one).
Differentiate = Callable[
    [Callable[[list[Tensor]], tuple[Tensor, Any]], list[Tensor]], tuple[Tensor, Any, Sequence[Tensor]]
]


class Training:
    """What the replicas train, and on what.

    Attributes:
        layout: where each shared variable lives.
        initial: float32 [layout.size], the flat vector before the first update.
        batches: the batch plan.

    Thread-safety: read-only after construction; `step` may be traced by one thread at a time.
    """

    def __init__(self, config: Config) -> None:
        seed = config.train.seed
        self.dataset = _dataset(config)
        # What could not be told before the data were loaded.
        validate_samples(config, Samples(len(self.dataset.train_x), self.dataset.train_x.shape[1:]))
        self.num_replicas = config.num_replicas
        self.batch_size = config.train.batch_size
        self.seed = seed
        self.audited = config.audit.name != "none"
        self.network = _network(config, self.dataset)
        self.optimizer = optimizers.build(config.optimizer)
        weights, statistics = self.network.weights, self.network.statistics
        self.num_weights = len(weights)
        self.layout = layouts.plan(
            [(named.name, named.value.shape) for named in weights],
            [(named.name, named.value.shape) for named in statistics],
            self.optimizer.slots,
            counter=self.optimizer.counts,
            num_replicas=self.num_replicas,
        )
        self.initial = self.layout.pack([named.value for named in (*weights, *statistics)])
        self.batches = BatchPlan(len(self.dataset.train_x), self.num_replicas, self.batch_size, seed)

    @property
    def probe_size(self) -> int:
        return min(PROBE, self.dataset.num_classes)

    def step(
        self,
        differentiate: Differentiate,
        prefix: Tensor,
        template: Tensor,
        x: Tensor,
        y: Tensor,
        step: Tensor,
        positions: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """One replica's batch through forward and backward: a pure function.

        Args:
            differentiate: the backend's gradient.
            prefix: float32 [read_size], weights and statistics.
            template: float32 [read_size], what the contribution holds between its values: the replica's canaries.
            x: float32 [batch, *shape].
            y: int32 [batch], classes.
            step: int32 scalar, for the random numbers.
            positions: int32 [batch], each sample's index in the joint batch, for the random numbers.

        Returns:
            The contribution, float32 [read_size]: gradients of the mean loss, deltas of the statistics, canaries; and
            a row for the audit, float32: loss, then unless `audit=none` a probe of the logits and `prefix`'s canaries.
        """
        values = self._unpack(prefix)
        statistics = values[self.num_weights :]

        def loss_of(weights: list[Tensor]) -> tuple[Tensor, tuple[Tensor, Sequence[Tensor]]]:
            with keyed(Key(self.seed, step, positions)):
                logits, new = self.network.call(weights, statistics, x, training=True)
            logits = ops.cast(logits, "float32")
            return self._mean_loss(y, logits), (logits, new)

        weights = values[: self.num_weights]
        loss, (logits, new), gradients = differentiate(loss_of, weights)
        # A weight that the loss does not depend on has no gradient; to an optimizer that is zero.
        gradients = [
            ops.zeros_like(weight) if gradient is None else gradient
            for gradient, weight in zip(gradients, weights, strict=True)
        ]
        deltas = [ops.cast(after, "float32") - before for after, before in zip(new, statistics, strict=True)]
        contribution = self._assemble([*gradients, *deltas], template)
        row = [ops.reshape(loss, (1,))]
        if self.audited:
            canaries = ops.convert_to_tensor(self.layout.read_canaries.reshape(-1).astype("int32"))
            row += [logits[0, : self.probe_size], ops.take(prefix, canaries, axis=0)]
        return contribution, ops.concatenate(row)

    def predict(self, prefix: Tensor, x: Tensor) -> Tensor:
        """Logits in inference: float32 [batch, classes]."""
        values = self._unpack(prefix)
        logits, _ = self.network.call(values[: self.num_weights], values[self.num_weights :], x, training=False)
        return ops.cast(logits, "float32")

    def positions(self, replica_id: int) -> np.ndarray[Any, np.dtype[np.int32]]:
        """Index in the joint batch of each sample of one replica's batch: int32 [batch]."""
        return np.arange(self.batch_size, dtype=np.int32) + np.int32(replica_id * self.batch_size)

    def _mean_loss(self, y: Tensor, logits: Tensor) -> Tensor:
        return ops.mean(keras.losses.sparse_categorical_crossentropy(y, logits, from_logits=True))

    def _unpack(self, prefix: Tensor) -> list[Tensor]:
        return [ops.reshape(prefix[segment.span], segment.shape) for segment in self.layout.read_segments]

    def _assemble(self, values: Sequence[Tensor], template: Tensor) -> Tensor:
        """Put values into their segments, and the template everywhere between them."""
        parts, at = [], 0
        for segment, value in zip(self.layout.read_segments, values, strict=True):
            parts += [template[at : segment.values], ops.reshape(ops.cast(value, "float32"), (-1,))]
            at = segment.values + segment.size
        return ops.concatenate([*parts, template[at:]])


def _dataset(config: Config) -> data.Dataset:
    """The data that the config asks for; a user's own are held to the rules that those in a file are."""
    if not isinstance(config.data, Custom):
        return data.load(config.data, config.train.seed)
    found = bring("data", config.data)(seed=config.train.seed, **config.data.arguments)
    if isinstance(found, data.Dataset):
        return found
    where = f"data._target_={config.data._target_}"
    if not isinstance(found, Mapping):
        raise data.DataError(f"{where} must return arrays by name, {data.arrays.WANTED}; got {type(found).__name__}.")
    arrays = {str(name): np.asarray(array) for name, array in found.items()}
    roles = data.arrays.roles(arrays, where)
    return data.arrays.dataset(arrays, roles, where=where, classes=0, held_out=0.2, seed=config.train.seed)


def _network(config: Config, dataset: data.Dataset) -> Network:
    """The model that the config asks for: ours, or a user's, which under `threads` may be a `torch.nn.Module`."""
    arguments: dict[str, Any] = {
        "input_shape": dataset.train_x.shape[1:],
        "num_classes": dataset.num_classes,
        "seed": config.train.seed,
        "dtype_policy": keras.DTypePolicy(config.precision.name),
    }
    if not isinstance(config.model, Custom):
        return KerasNetwork(models.build(config.model, **arguments))
    target = f"model._target_={config.model._target_}"
    model = bring("model", config.model)(**arguments, **config.model.arguments)
    try:
        if isinstance(model, keras.Model):
            model(ops.zeros((1, *arguments["input_shape"])))  # a model that was not built has no variables before
            return KerasNetwork(model)
        if config.strategy.name == "threads":
            from trainer.workloads.torch_module import TorchNetwork

            return TorchNetwork(model, config.precision.name)
    except TypeError as error:
        raise ConfigError(f"{target}: {error}") from error
    raise ConfigError(f"{target} must return a keras.Model under strategy=mirrored; got {type(model).__name__}.")

"""The `train` workload: data, model, flat vector and the step, the same code on both backends.

Keras must be imported with its backend chosen, so this module is imported in the run's own process only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import keras
import numpy as np
from keras import ops

from data.plan import BatchPlan
from models.random import Key, Source, drawing
from trainer.audit.row import Row
from trainer.config import Config
from trainer.holders import apart, asked_dtypes, growth_steps, mechanism
from trainer.rules import validate_samples
from trainer.samples import Samples
from trainer.state import layout as layouts
from trainer.state.first_call import FIRST_CALLS
from trainer.state.layout import Floats
from trainer.state.loss_scale import NEVER
from trainer.state.precision import PrecisionHolder
from trainer.state.random_numbers import Drawn, Generated
from trainer.state.settings import ANY
from trainer.updates import optimizers
from trainer.workloads import build
from trainer.workloads.watched import Watched

Tensor = Any  # of the backend
# Values kept each step to read the compute dtype off: of the first sample's logits, and of a kernel's gradient.
PROBE = 16
# The part of a row that says what was drawn and scaled, where nothing was.
NOTHING_DRAWN_NOR_SCALED = np.array([-1, -1, 0, 0], np.float32)

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
        gaps: what stands before, between and behind the values of what a step reads: canaries and padding.
        batches: the batch plan.
        asked: the compute dtype that each replica is asked for.
        precision: who holds the precision mode.
        first_call: who notes the first call.
        generator: draws words of a shared generator, where random numbers come from one: the strategy supplies it.
        draws: (layer index, elements a sample, batch) of each draw of a step, in order; none before one was traced.

    Thread-safety: read-only once the strategy has set it up; `step` may be traced by one thread at a time, and called
    eagerly by all replicas at once.
    """

    def __init__(self, config: Config) -> None:
        seed = config.train.seed
        self.dataset = build.dataset(config)
        # What could not be told before the data were loaded.
        validate_samples(config, Samples(len(self.dataset.train_x), self.dataset.train_x.shape[1:]))
        self.num_replicas = config.replicas_in_all
        self.num_trainers = self.num_replicas - config.train.evaluators
        self.batch_size = config.train.batch_size
        self.seed = seed
        self.audited = config.audit.name != "none"
        self.asked = asked_dtypes(config)
        self.explicit = mechanism(config, "precision") == "explicit"
        self.enabled_in = config.precision.enabled_in
        self._enables = config.precision.enabled_by == "enable"
        self.network = build.network(config, self.dataset)
        self.precision: PrecisionHolder = self.network.precision
        self._first_call = mechanism(config, "first_call")
        self.first_call = FIRST_CALLS[self._first_call](self.network)
        self.synchronized = getattr(config.model, "normalization", "none") == "sync_batch"
        self.derived = mechanism(config, "random_numbers") == "derived"
        self.generator: Callable[[tuple[int, int]], Tensor] | None = None
        self.draws: tuple[Drawn, ...] = ()
        self.optimizer = optimizers.build(config.optimizer)
        weights, statistics = self.network.weights, self.network.statistics
        self.num_weights = len(weights)
        self.growth_steps = growth_steps(config)
        self.layout = layouts.plan(
            [(named.name, named.value.shape) for named in weights],
            [(named.name, named.value.shape) for named in statistics],
            self.optimizer.slots,
            counter=self.optimizer.counts,
            num_replicas=self.num_replicas,
            loss_scale=self.growth_steps != 0,
            apart=apart(config),
        )
        initial_scale = getattr(config.precision, "initial_scale", 1.0)
        state = [np.array([initial_scale, 0])] if self.growth_steps else []
        self.initial = self.layout.pack([*(named.value for named in (*weights, *statistics)), *state])
        self.batches = BatchPlan(len(self.dataset.train_x), self.num_replicas, self.batch_size, seed)
        self.gaps = _gaps(self.layout)
        self._probed = _gradient_probe(self.layout)
        self.row = Row(
            min(PROBE, self.dataset.num_classes) if self.audited else 0,
            len(self._probed),
            self.layout.read_canaries.size,
        )

    def renew(self) -> None:
        """As before the first step: state holders have forgotten what replicas left in them."""
        self.forget_first_call()
        self.precision.clear()

    def forget_first_call(self) -> None:
        """So that the next call is the first one again."""
        self.first_call = FIRST_CALLS[self._first_call](self.network)

    def turned_on(self, dtype: str) -> AbstractContextManager[None]:
        """A precision mode, for the time of a `with` block or, where modes are enabled, from there on."""
        if not self._enables:
            return self.precision.scope(dtype)
        self.precision.enable(dtype)
        return nullcontext()

    def put_back(self) -> AbstractContextManager[None]:
        """Round what main computes for itself: a mode that it enables there is off again afterwards."""
        return self.precision.scope(self.asked[0]) if self._enables and self.enabled_in == "replica" else nullcontext()

    @property
    def mode_left(self) -> str | None:
        """The mode that is on in the calling thread although all scopes were left; one that was enabled is to stay."""
        return None if self._enables else self.precision.current()

    @property
    def settings_of_replicas(self) -> dict[str, str]:
        """Settings of the framework that replicas change themselves where they enable a mode."""
        return dict.fromkeys(getattr(self.precision, "settings", ()) if self._enables else (), ANY)

    def step(
        self,
        differentiate: Differentiate,
        prefix: Tensor,
        template: Tensor,
        x: Tensor,
        y: Tensor,
        samples: Tensor,
        step: Tensor,
        positions: Tensor,
        *,
        compute_dtype: str,
        trains: bool = True,
        gaps: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One replica's forward and backward pass, as a pure function but for what its state holders keep.

        Args:
            differentiate: the backend's way to a loss and its gradients.
            prefix: float32 [layout.read_size], the snapshot to compute from.
            template: float32 [layout.read_size], nothing but the replica's own canaries.
            x, y: the batch, and `samples` its indices in the dataset: integer [batch].
            step, positions: step number and sample indices in the joint batch, the key of random numbers.
            compute_dtype: what this replica is asked to compute in.
            trains: otherwise it only evaluates: no gradients, and no changes of statistics. In synchronized
                normalization it takes part all the same, forwards and backwards, as the others wait for it.
            gaps: what the template has in `self.gaps`, if that is at hand: then it need not be cut out.

        Returns:
            The contribution, float32 [read_size]: gradients of the mean loss, deltas of the statistics, whether the
            gradients overflowed, canaries; and a row for the audit (`trainer/audit/row.py`).
        """
        values = self._unpack(prefix)
        weights, statistics = values[: self.num_weights], values[self.num_weights : self._num_variables]
        state = self.layout.loss_scale
        factor = prefix[state.start] if state and self.growth_steps != NEVER else None  # 1 is not worth its operators
        source = Watched(self._source(step, positions))

        def loss_of(weights: list[Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor, Sequence[Tensor]]]:
            with drawing(source):
                training = trains or self.synchronized
                logits, new = self._forward(weights, statistics, x, training=training, compute_dtype=compute_dtype)
            logits = ops.cast(logits, "float32")
            loss = self._mean_loss(y, logits)
            if not trains:
                return loss * 0.0, (loss, logits, new)  # of no weight in what others differentiate with it
            return loss if factor is None else loss * factor, (loss, logits, new)

        if trains or self.synchronized:
            _, (loss, logits, new), gradients = differentiate(loss_of, weights)
        else:
            _, (loss, logits, new) = loss_of(weights)
        contribution, overflow = template, None
        if trains:
            contribution, overflow = self._contribution(gradients, weights, new, statistics, template, factor, gaps)
        self.draws = self.draws or tuple(source.draws)
        row = [ops.reshape(loss, (1,))]
        if self.audited:
            row += [
                logits[0, : self.row.num_logits],
                _gathered(contribution, self._probed),
                ops.cast(samples[:1], "float32"),
            ]
            # Few operators: on a small model each of them shows in the time of a step.
            if source.draws or factor is not None or overflow is not None:
                used = ops.zeros((1,)) if factor is None else ops.reshape(factor, (1,))
                row += [source.words(), used, ops.zeros((1,)) if overflow is None else overflow]
            else:
                row.append(ops.convert_to_tensor(NOTHING_DRAWN_NOR_SCALED))
            row.append(_gathered(prefix, self.layout.read_canaries.reshape(-1)))
        return contribution, ops.concatenate(row)

    def predict(self, prefix: Tensor, x: Tensor) -> Tensor:
        """Logits in inference, in the precision that replicas train in: float32 [batch, classes]."""
        values = self._unpack(prefix)
        weights, statistics = values[: self.num_weights], values[self.num_weights : self._num_variables]
        with self.put_back():
            logits, _ = self._forward(weights, statistics, x, training=False, compute_dtype=self.asked[0])
        return ops.cast(logits, "float32")

    def expected_words(self, num_steps: int, replica_id: int) -> Floats:
        """The row's random words of all steps, were they derived: float32 [steps, 2]."""
        layer_index = self.draws[0].layer_index
        ends = (replica_id * self.batch_size, (replica_id + 1) * self.batch_size - 1)
        samples = [ops.full((num_steps,), position, dtype="int32") for position in ends]
        words = [
            Key(self.seed, ops.arange(num_steps), sample).bits(layer_index=layer_index, num_elements=1, batch=None)[
                :, 0
            ]
            for sample in samples
        ]
        found: Floats = ops.cast(ops.right_shift(ops.stack(words, axis=1), 8), "float32").numpy()
        return found

    def _forward(
        self, weights: Sequence[Tensor], statistics: Sequence[Tensor], x: Tensor, *, training: bool, compute_dtype: str
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """The model's call, in the precision that was asked for as far as the holder keeps to it."""
        # Main has turned on what the first replica is asked for; whoever needs another mode turns it on itself.
        own = self.enabled_in == "replica" or compute_dtype != self.asked[0]
        with self.turned_on(compute_dtype) if own else nullcontext():
            return self.network.call(
                weights, statistics, x, training=training, compute_dtype=compute_dtype if self.explicit else None
            )

    def _contribution(
        self,
        gradients: Sequence[Tensor | None],
        weights: Sequence[Tensor],
        new: Sequence[Tensor],
        statistics: Sequence[Tensor],
        template: Tensor,
        factor: Tensor | None,
        gaps: Sequence[Tensor] | None,
    ) -> tuple[Tensor, Tensor | None]:
        """The contribution, and whether the gradients overflowed, if that can be: float32 [1]."""
        # A weight that the loss does not depend on has no gradient; to an optimizer that is zero.
        found = [
            ops.zeros_like(weight) if gradient is None else gradient
            for gradient, weight in zip(gradients, weights, strict=True)
        ]
        deltas = [ops.cast(after, "float32") - before for after, before in zip(new, statistics, strict=True)]
        state = self.layout.loss_scale
        if state is None:
            return self._assemble([*found, *deltas], template, gaps), None
        if factor is not None:
            found = [ops.cast(gradient, "float32") / factor for gradient in found]
        whole = self._assemble([*found, *deltas, ops.zeros((2,))], template, gaps)
        finite = ops.all(ops.isfinite(whole))
        overflow = 1.0 - ops.cast(finite, "float32")
        flag = np.zeros(self.layout.read_size, np.float32)
        flag[state.start] = 1.0
        # Nothing of an overflow gets out, but that there was one.
        contribution = ops.where(finite, whole, template) + overflow * ops.convert_to_tensor(flag)
        return contribution, ops.reshape(overflow, (1,))

    def _source(self, step: Tensor, positions: Tensor) -> Source:
        if self.derived:
            return Key(self.seed, step, positions)
        assert self.generator is not None, "the strategy supplies the shared generator"
        return Generated(self.generator)

    @property
    def _num_variables(self) -> int:
        return self.num_weights + len(self.network.statistics)

    def positions(self, replica_id: int) -> np.ndarray[Any, np.dtype[np.int32]]:
        """Index in the joint batch of each sample of one replica's batch: int32 [batch]."""
        return np.arange(self.batch_size, dtype=np.int32) + np.int32(replica_id * self.batch_size)

    def _mean_loss(self, y: Tensor, logits: Tensor) -> Tensor:
        return ops.mean(keras.losses.sparse_categorical_crossentropy(y, logits, from_logits=True))

    def _unpack(self, prefix: Tensor) -> list[Tensor]:
        return [ops.reshape(prefix[segment.span], segment.shape) for segment in self.layout.read_segments]

    def _assemble(self, values: Sequence[Tensor], template: Tensor, gaps: Sequence[Tensor] | None) -> Tensor:
        """Put values into their segments, and the template everywhere between them."""
        parts = []
        for index, value in enumerate(values):
            gap = template[self.gaps[index]] if gaps is None else gaps[index]
            parts += [gap, ops.reshape(ops.cast(value, "float32"), (-1,))]
        return ops.concatenate([*parts, template[self.gaps[-1]] if gaps is None else gaps[-1]])


def _gathered(vector: Tensor, places: np.ndarray[Any, np.dtype[np.int64]]) -> Tensor:
    """Elements of a vector. On torch in one operator: `ops.take` is eight, as it first puts negative indices right."""
    index = ops.convert_to_tensor(places)
    return vector.index_select(0, index) if keras.backend.backend() == "torch" else ops.take(vector, index, axis=0)


def _gaps(layout: layouts.Layout) -> list[slice]:
    ends = [segment.values + segment.size for segment in layout.read_segments]
    starts: list[int | None] = [segment.values for segment in layout.read_segments]
    return [slice(end, start) for end, start in zip([0, *ends], [*starts, None], strict=True)]


def _gradient_probe(layout: layouts.Layout) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Places of some values of the last kernel's gradient, which a leak in any layer before it has reached."""
    kernels = [segment for segment in layout.of_kind("weight") if len(segment.shape) > 1]
    if not kernels:
        return np.zeros(0, np.int64)
    last = kernels[-1]
    # Odd, so that it does not keep to one column of a kernel whose width it divides.
    apart = max(1, last.size // PROBE) // 2 * 2 + 1
    return np.arange(last.values, last.values + last.size, apart)

"""A hand-written loop of `tf.function` steps, one a call, under MirroredStrategy over logical CPUs.

    python scripts/rivals/mirrored_loop.py --model mlp --replicas 2

Each replica gathers its batch inside the step, from arrays that are there already: no tf.data pipeline stands between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from cases import CASES, LEARNING_RATE, Case
from logical_cpus import OPTIONS, mirrored
from numpy.typing import NDArray
from stopwatch import arguments, say, stretch

if TYPE_CHECKING:
    import keras
    import tensorflow as tf


def main() -> None:
    given = arguments(__doc__, **OPTIONS)
    strategy = mirrored(given.replicas, given.reduction)
    # After the strategy, which says what Keras is to run on.
    import keras
    from keras_models import build

    keras.utils.set_random_seed(0)
    case = CASES[given.model]
    with strategy.scope():
        model = build(case)
        optimizer = keras.optimizers.SGD(LEARNING_RATE)
        optimizer.build(model.trainable_variables)
    step = joint_step(strategy, model, optimizer, case)
    batches = shuffled(len(case.load().train_x), given.replicas, case.batch_size)

    def train(steps: int) -> float:
        for _ in range(steps):
            loss = step(next(batches))
        return float(loss)

    measured = stretch(lambda: train(1), train, given.seconds)
    say([measured], parameters=model.count_params(), micro_steps=given.replicas)


def joint_step(
    strategy: tf.distribute.MirroredStrategy, model: keras.Model, optimizer: keras.optimizers.Optimizer, case: Case
) -> Callable[[tf.Tensor], tf.Tensor]:
    """A step of all replicas: indices [replicas, batch] to the joint batch's mean loss."""
    import keras
    import tensorflow as tf

    arrays = case.load()
    images, labels = tf.constant(arrays.train_x), tf.constant(arrays.train_y)
    joint_batch = strategy.num_replicas_in_sync * case.batch_size

    def replica(indices: tf.Tensor) -> tf.Tensor:
        own = indices[tf.distribute.get_replica_context().replica_id_in_sync_group]
        x, y = tf.gather(images, own), tf.gather(labels, own)
        with tf.GradientTape() as tape:
            losses = keras.losses.sparse_categorical_crossentropy(y, model(x, training=True), from_logits=True)
            # Gradients are summed over replicas, so each has its part of the joint mean.
            loss = tf.nn.compute_average_loss(losses, global_batch_size=joint_batch)
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return loss

    @tf.function
    def step(indices: tf.Tensor) -> tf.Tensor:
        losses = strategy.run(replica, (indices,))
        return strategy.reduce(tf.distribute.ReduceOp.SUM, losses, axis=None)

    return lambda indices: step(tf.constant(indices))


def shuffled(samples: int, replicas: int, batch_size: int) -> Iterator[NDArray[Any]]:
    """Indices [replicas, batch] of shuffled epochs, over and over; what does not fill a joint batch is dropped."""
    random = np.random.default_rng(0)
    joint_batch = replicas * batch_size
    while True:
        order = random.permutation(samples)
        yield from order[: samples // joint_batch * joint_batch].reshape(-1, replicas, batch_size)


if __name__ == "__main__":
    main()

"""Keras `model.fit` under MirroredStrategy over logical CPUs.

python scripts/rivals/mirrored_fit.py --model mlp --replicas 2
"""

from __future__ import annotations

from cases import CASES
from logical_cpus import OPTIONS, mirrored
from stopwatch import arguments, say, stretch


def main() -> None:
    given = arguments(__doc__, **OPTIONS)
    strategy = mirrored(given.replicas, given.reduction)
    # After the strategy, which says what Keras is to run on.
    import keras
    from fitting import fitted
    from keras_models import compiled

    keras.utils.set_random_seed(0)
    case = CASES[given.model]
    with strategy.scope():
        model = compiled(case)
    first, train, steps_per_epoch = fitted(model, case, given.replicas * case.batch_size)
    measured = stretch(first, train, given.seconds)
    say([measured], parameters=model.count_params(), micro_steps=given.replicas * steps_per_epoch)


if __name__ == "__main__":
    main()

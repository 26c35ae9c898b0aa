"""Keras `model.fit` on arrays in memory: one replica, on either backend.

python scripts/rivals/keras_fit.py --backend torch --model mlp
"""

from __future__ import annotations

import os

from cases import CASES
from stopwatch import arguments, say, stretch


def main() -> None:
    given = arguments(
        __doc__,
        backend={"choices": ["torch", "tensorflow"], "default": "torch", "help": "Keras' backend (default: torch)"},
        threads={"type": int, "default": 1, "help": "intra-op threads (default: 1)"},
    )
    # Keras and TensorFlow read these when they are imported.
    os.environ["KERAS_BACKEND"] = given.backend
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    set_threads(given.backend, given.threads)
    import keras
    from fitting import fitted
    from keras_models import compiled

    keras.utils.set_random_seed(0)
    case = CASES[given.model]
    model = compiled(case)
    first, train, steps_per_epoch = fitted(model, case, case.batch_size)
    measured = stretch(first, train, given.seconds)
    say([measured], parameters=model.count_params(), micro_steps=steps_per_epoch)


def set_threads(backend: str, threads: int) -> None:
    if backend == "torch":
        import torch

        torch.set_num_threads(threads)
    else:
        import tensorflow as tf

        tf.config.threading.set_intra_op_parallelism_threads(threads)


if __name__ == "__main__":
    main()

"""MNIST's handwritten digits: 28x28 pixels, 10 classes, with a test set of their own."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from data import npz
from data.arrays import Roles, Shaped, dataset, sample_shape
from data.dataset import DataError, Dataset

NUM_TRAIN = 60_000
SHAPE = (28, 28, 1)
CLASSES = 10
SILENCE_SECONDS = 20.0
ROLES = Roles("x_train", "y_train", "x_test", "y_test")


def load(options: Any, seed: int) -> Dataset:
    """The digits from a local file, or as Keras' own loader has them: cached, else downloaded. Nothing is drawn.

    Args:
        options: `path` of a .npz named and shaped like Keras' mnist.npz, with any number of samples; "" for Keras' own.

    Raises:
        DataError: the file is none such, or nothing could be downloaded.
    """
    if not options.path:
        return _dataset(_downloaded(), ROLES, "data=mnist", seed)
    arrays, found = npz.read(options.path)
    _check(arrays, found, options.path)
    return _dataset(arrays, found, npz.where(options.path), seed)


def sizes(options: Any) -> tuple[int, tuple[int, ...]]:
    """Number of samples to train on and shape of one; of a file, from its headers alone.

    Raises:
        DataError: the file is none such.
    """
    if not options.path:
        return NUM_TRAIN, SHAPE
    headers, found = npz.described(options.path)
    _check(headers, found, options.path)
    return headers[found.train_x].shape[0], SHAPE


def _check(arrays: Mapping[str, Shaped], found: Roles, path: str) -> None:
    instead = f"Other data: data=npz data.path={path}."
    if not found.test_x:
        raise DataError(f"{npz.where(path)} has no test set, and data=mnist has x_test and y_test. {instead}")
    shape = sample_shape(arrays[found.train_x])
    if shape != SHAPE:
        raise DataError(f"{npz.where(path)}: data=mnist has images of 28x28; got {list(shape)}. {instead}")


def _dataset(arrays: Mapping[str, NDArray[Any]], found: Roles, where: str, seed: int) -> Dataset:
    return dataset(arrays, found, where=where, classes=CLASSES, held_out=0, seed=seed)


def _downloaded() -> dict[str, NDArray[Any]]:
    # Here, not at the top: this imports Keras, whose backend is the caller's to choose.
    from keras.datasets import mnist

    before = socket.getdefaulttimeout()
    # Keras sets none: behind a wall that drops what it does not let through, it would wait for minutes.
    socket.setdefaulttimeout(SILENCE_SECONDS)
    try:
        (x_train, y_train), (x_test, y_test) = mnist.load_data()
    # Keras raises bare exceptions for whatever keeps it from the file.
    except Exception as error:
        raise DataError(
            f"data=mnist could not be downloaded ({' '.join(str(error).split())}). "
            "Fetch mnist.npz where there is a network and add data.path=FILE, or try data=digits."
        ) from None
    finally:
        socket.setdefaulttimeout(before)
    return {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test}

"""Arrays of a user's own as a dataset: found by name, held to rules, converted.

The rules about names, shapes and dtypes need no values, so they serve arrays and the headers of a file alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from data.dataset import DataError, Dataset, Floats, num_held_out, split

# Names of (train x, train y, test x, test y).
NAMINGS = (("train_x", "train_y", "test_x", "test_y"), ("x_train", "y_train", "x_test", "y_test"), ("x", "y", "", ""))
NAMES = frozenset(name for naming in NAMINGS for name in naming if name)
MENTIONED = 5
WANTED = "x and y, or train_x and train_y with or without test_x and test_y"


class Shaped(Protocol):
    """An array, or what its header says of it."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...


@dataclass(frozen=True)
class Roles:
    """The names of the arrays that are used: x and y to train on, and (unless both are empty) to test on."""

    train_x: str
    train_y: str
    test_x: str = ""
    test_y: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        named = (self.train_x, self.train_y, self.test_x, self.test_y)
        return tuple(name for name in named if name)


def roles(arrays: Mapping[str, Shaped], where: str) -> Roles:
    """Which arrays are which, held to fit each other.

    Args:
        where: the dotted key and what it holds, which every message begins with.

    Raises:
        DataError: one is missing, or has a dtype or shape that cannot be trained on.
    """
    found = _named(arrays, where)
    _check_pair(arrays, found.train_x, found.train_y, where)
    if found.test_x:
        _check_pair(arrays, found.test_x, found.test_y, where)
        shapes = [list(sample_shape(arrays[name])) for name in (found.train_x, found.test_x)]
        if shapes[0] != shapes[1]:
            raise DataError(
                f"{where}: samples of {found.train_x} have shape {shapes[0]}, those of {found.test_x} {shapes[1]}."
            )
        dtypes = [arrays[name].dtype for name in (found.train_x, found.test_x)]
        # Only bytes are scaled.
        if dtypes.count(np.dtype(np.uint8)) == 1:
            raise DataError(
                f"{where}: {found.train_x} is {dtypes[0]}, {found.test_x} {dtypes[1]}. Save both as one dtype."
            )
    return found


def sample_shape(x: Shaped) -> tuple[int, ...]:
    """Shape of one sample as it is trained on: images [height, width] get a channel."""
    _, *shape = x.shape
    return (*shape, 1) if len(shape) == 2 else tuple(shape)


def num_train(arrays: Mapping[str, Shaped], found: Roles, held_out: float) -> int:
    """Samples that are left to train on.

    Raises:
        DataError: none.
    """
    samples = arrays[found.train_x].shape[0]
    return samples if found.test_x else samples - num_held_out(samples, held_out)


def dataset(
    arrays: Mapping[str, NDArray[Any]], found: Roles, *, where: str, classes: int, held_out: float, seed: int
) -> Dataset:
    """The arrays, converted; a share of the samples is held out where there is no test set.

    Args:
        classes: how many there are, or 0 for one more than the largest label.

    Raises:
        DataError: a value that cannot be trained on, or nothing left to train on.
    """
    # First, so that what headers tell is told before what values do.
    num_train(arrays, found, held_out)
    labels = {name: arrays[name] for name in (found.train_y, found.test_y) if name}
    num_classes = _num_classes(labels, classes, where)
    x, y = _floats(arrays[found.train_x], found.train_x, where), arrays[found.train_y].astype(np.int32)
    if not found.test_x:
        return split(x, y, num_classes, held_out, seed)
    test_x = _floats(arrays[found.test_x], found.test_x, where)
    return Dataset(x, y, test_x, arrays[found.test_y].astype(np.int32), num_classes)


def _named(arrays: Mapping[str, Shaped], where: str) -> Roles:
    namings = [naming for naming in NAMINGS if any(name and name in arrays for name in naming)]
    if not namings:
        names = sorted(arrays)[:MENTIONED]
        more = f" and {len(arrays) - len(names)} more" if len(arrays) > len(names) else ""
        raise DataError(f"{where} has {', '.join(names) or 'no arrays'}{more}. Name the arrays {WANTED}.")
    if len(namings) > 1:
        first, second = (next(name for name in naming if name in arrays) for naming in namings[:2])
        raise DataError(f"{where} has {first} and {second}: which to train on? Name the arrays {WANTED}.")
    train_x, train_y, test_x, test_y = namings[0]
    tested = bool(test_x) and (test_x in arrays or test_y in arrays)
    for name in (train_x, train_y, *((test_x, test_y) if tested else ())):
        if name not in arrays:
            present = ", ".join(sorted(set(arrays) & NAMES))
            raise DataError(f"{where} has {present} but no {name}. Name the arrays {WANTED}.")
    return Roles(*namings[0]) if tested else Roles(train_x, train_y)


def _check_pair(arrays: Mapping[str, Shaped], x: str, y: str, where: str) -> None:
    for name in (x, y):
        if arrays[name].dtype.hasobject:
            raise DataError(
                f"{where}: {name} holds Python objects, and nothing is ever unpickled. Save it with a numeric dtype."
            )
    features, labels = arrays[x], arrays[y]
    if features.dtype.kind not in "buif":
        raise DataError(f"{where}: {x} must hold real numbers; got dtype {features.dtype}.")
    if len(features.shape) < 2:
        raise DataError(f"{where}: {x} must be [samples, ...], a vector or an image a sample; got {_told(features)}.")
    if labels.dtype.kind not in "ui":
        raise DataError(f"{where}: {y} must hold classes as whole numbers; got dtype {labels.dtype}.")
    if len(labels.shape) != 1:
        raise DataError(f"{where}: {y} must be [samples], one class a sample; got {_told(labels)}.")
    if features.shape[0] != labels.shape[0]:
        raise DataError(f"{where}: {x} has {features.shape[0]} samples, {y} has {labels.shape[0]}. They must agree.")
    if 0 in features.shape:
        raise DataError(f"{where}: {x} is empty; got {_told(features)}.")


def _told(array: Shaped) -> str:
    return f"shape {list(array.shape)}"


def _num_classes(labels: Mapping[str, NDArray[Any]], classes: int, where: str) -> int:
    """How many classes there are. Every label is held to be one of them."""
    for name, y in labels.items():
        wrong = np.flatnonzero((y < 0) | (y >= classes) if classes else y < 0)
        if len(wrong):
            fits = f"from 0 to {classes - 1}" if classes else "from 0 up"
            raise DataError(f"{where}: {name} must hold classes {fits}; got {y[wrong[0]]} in sample {wrong[0]}.")
    if classes:
        return classes
    largest, samples = max(int(y.max()) for y in labels.values()), sum(len(y) for y in labels.values())
    if largest == 0:
        raise DataError(f"{where}: all labels are 0, and 2 classes are the least. data.classes=2 says there are two.")
    # Identifiers, or years: a model with an output for every number up to the largest is not what was meant.
    if largest >= samples:
        raise DataError(
            f"{where}: a label is {largest}, but there are only {samples} samples. Number the classes from 0, or add "
            f"data.classes={largest + 1}."
        )
    return largest + 1


def _floats(x: NDArray[Any], name: str, where: str) -> Floats:
    """float32 [n, *shape]; bytes are scaled from 0..255 to 0..1."""
    with np.errstate(over="ignore", invalid="ignore"):
        found: Floats = np.ascontiguousarray(x, np.float32)
    if x.dtype == np.uint8:
        found /= np.float32(255)
    finite = np.isfinite(found).reshape(len(found), -1).all(axis=1)
    if not finite.all():
        raise DataError(
            f"{where}: {name} holds NaN or infinity as float32 in {np.count_nonzero(~finite)} of {len(found)} samples, "
            f"first in sample {np.flatnonzero(~finite)[0]}. Replace it, or leave those samples out."
        )
    return found.reshape(len(found), *sample_shape(x))

"""Arrays from a NumPy .npz file of the user's. Nothing in it is ever unpickled."""

from __future__ import annotations

import lzma
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from data.arrays import NAMES, Roles, dataset, num_train, roles, sample_shape
from data.dataset import DataError, Dataset

SUFFIX = ".npy"
# What opening and reading a damaged, encrypted or oddly compressed archive raises.
DAMAGED = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, OSError, RuntimeError, ValueError)


@dataclass(frozen=True)
class Header:
    """What an array says of itself ahead of its values."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


def load(options: Any, seed: int) -> Dataset:
    """The file's x and y, and its test set or a share of its samples held out.

    x becomes float32 and y int32. Bytes (uint8, as images have) are scaled from 0..255 to 0..1, other numbers are taken
    as they are. Images without channels, [n, height, width], get one: [n, height, width, 1].

    Args:
        options: `path`, `held_out` (above 0 and below 1; unused where the file has a test set) and `classes` (0: one
            more than the largest label).

    Raises:
        DataError: the file, or what is in it, cannot be trained on.
    """
    arrays, found = read(options.path)
    return dataset(
        arrays, found, where=where(options.path), classes=options.classes, held_out=options.held_out, seed=seed
    )


def sizes(options: Any) -> tuple[int, tuple[int, ...]]:
    """Number of samples to train on and shape of one, from the headers alone.

    Raises:
        DataError: the file is missing or no .npz, or names, dtypes or shapes cannot be trained on.
    """
    headers, found = described(options.path)
    return num_train(headers, found, options.held_out), sample_shape(headers[found.train_x])


def where(path: str) -> str:
    """What messages about a file begin with."""
    return f"data.path={path}"


def described(path: str) -> tuple[dict[str, Header], Roles]:
    """The headers of a file's arrays, and which of the arrays are used.

    Raises:
        DataError: as `sizes`.
    """
    with _opened(path) as archive:
        headers = _headers(archive, path)
    return headers, roles(headers, where(path))


def read(path: str) -> tuple[dict[str, NDArray[Any]], Roles]:
    """The arrays that are used, and which of them is which.

    Raises:
        DataError: as `sizes`; or an array is damaged.
    """
    with _opened(path) as archive:
        found = roles(_headers(archive, path), where(path))
        arrays = {}
        for name in found.names:
            with _member(archive, name, path) as member:
                arrays[name] = npy.read_array(member, allow_pickle=False)
    return arrays, found


@contextmanager
def _opened(path: str) -> Iterator[zipfile.ZipFile]:
    if not path:
        raise DataError("data=npz needs a file. Add data.path=FILE, one that numpy.savez wrote.")
    # Asked first: to open a pipe would wait for whoever writes to it.
    if not os.path.isfile(os.path.expanduser(path)):
        raise DataError(f"{where(path)} is no file. Give its path, absolute or from {os.getcwd()}.")
    try:
        archive = zipfile.ZipFile(os.path.expanduser(path))
    except OSError as error:
        raise DataError(f"{where(path)} cannot be read: {error.strerror}.") from None
    except DAMAGED:
        example = "numpy.savez(FILE, x=x, y=y) writes one"
        raise DataError(f"{where(path)} is no .npz file, or is cut short. {example}.") from None
    with archive:
        yield archive


def _headers(archive: zipfile.ZipFile, path: str) -> dict[str, Header]:
    """What the file's arrays say of themselves. Those of other names are not opened, and stand as scalars."""
    names = [name.removesuffix(SUFFIX) for name in archive.namelist() if name.endswith(SUFFIX)]
    return {name: _header(archive, name, path) if name in NAMES else Header((), np.dtype(bool)) for name in names}


def _header(archive: zipfile.ZipFile, name: str, path: str) -> Header:
    with _member(archive, name, path) as member:
        version = npy.read_magic(member)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"it is of .npy version {version[0]}.{version[1]}, which numbers do not need")
        shape, _, dtype = (npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0)(member)
        size = member.tell() + math.prod(shape) * dtype.itemsize
        # A header that promises more than there is would have memory set aside for it before the first value is read.
        # Objects are pickled: their dtype does not tell their size.
        if not dtype.hasobject and (min(shape, default=0) < 0 or size != archive.getinfo(name + SUFFIX).file_size):
            raise ValueError("its size is not what its header says")
    return Header(shape, dtype)


@contextmanager
def _member(archive: zipfile.ZipFile, name: str, path: str) -> Iterator[Any]:
    """One array's part of the archive, to be read inside.

    Raises:
        DataError: reading it failed.
    """
    try:
        with archive.open(name + SUFFIX) as member:
            yield member
    except DAMAGED as error:
        problem = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise DataError(f"{where(path)}: {name} is damaged: {problem}. Save the file again.") from None

"""A compiled step as the bytes of one file: a line that tells the format, a digest of all that follows, and that.

What follows is one line of JSON and then code and arrays, as they are. Nothing in it is ever run to be read. The digest
makes a torn or damaged file known as such, wherever it is damaged; it says nothing of who wrote it (`folder.py` does).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# What the code is: TorchScript source, or a shared library.
GRAPH, LIBRARY = "graph", "library"
FORMAT = 1
_KIND_OF_FILE = b"replica-trainer compiled step, format "
_FIRST_LINE = _KIND_OF_FILE + b"%d\n" % FORMAT
_DIGEST_SIZE = 64


class Unusable(Exception):
    """A file holds no compiled step, or none that is any good here; in words that follow the file's name."""


@dataclass(frozen=True)
class Array:
    """A constant that the code is called with.

    Attributes:
        dtype: as the framework calls it: "float32", "bfloat16".
        data: its elements, in the order of the last index first, in the machine's own byte order.
    """

    dtype: str
    shape: tuple[int, ...]
    data: bytes


@dataclass(frozen=True)
class Entry:
    """A compiled step.

    Attributes:
        id: under which it is stored.
        name: its qualified name, which other steps may have, too.
        symbol: what the code itself calls the function. Whoever loads it must use this one, not one of its own making.
        kind: GRAPH or LIBRARY.
        content: digest of all that the step computes and is made with.
        versions: of whatever made the code; with others it is not used.
        compile_seconds: what it took to make, which is what finding it saves.
    """

    id: str
    name: str
    symbol: str
    kind: str
    content: str
    versions: Mapping[str, str]
    compile_seconds: float
    code: bytes
    arrays: tuple[Array, ...] = ()


def pack(entry: Entry) -> bytes:
    header = {
        "id": entry.id,
        "name": entry.name,
        "symbol": entry.symbol,
        "kind": entry.kind,
        "content": entry.content,
        "versions": dict(entry.versions),
        "compile_seconds": entry.compile_seconds,
        "code_size": len(entry.code),
        "arrays": [[each.dtype, list(each.shape), len(each.data)] for each in entry.arrays],
    }
    rest = b"".join([json.dumps(header).encode(), b"\n", entry.code, *(each.data for each in entry.arrays)])
    return b"".join([_FIRST_LINE, hashlib.sha256(rest).hexdigest().encode(), b"\n", rest])


def unpack(data: bytes) -> Entry:
    """The entry that a file holds.

    Raises:
        Unusable: it holds none.
    """
    if not data.startswith(_FIRST_LINE):
        other = data.startswith(_KIND_OF_FILE)
        raise Unusable("was written by another version" if other else "is torn or no compiled step")
    begin = len(_FIRST_LINE) + _DIGEST_SIZE + 1
    digest, rest = data[len(_FIRST_LINE) : begin], data[begin:]
    if digest != hashlib.sha256(rest).hexdigest().encode() + b"\n":
        raise Unusable("is torn or damaged: its digest does not match")
    line, _, payload = rest.partition(b"\n")
    try:
        return _entry(json.loads(line), payload)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        # With its digest right, it was written so.
        raise Unusable(f"has a header that cannot be read: {error}") from error


def _entry(header: Any, payload: bytes) -> Entry:
    code_size, at = _size(header["code_size"]), _size(header["code_size"])
    arrays = []
    for dtype, shape, size in header["arrays"]:
        arrays.append(Array(_text(dtype), tuple(map(_size, shape)), payload[at : at + _size(size)]))
        at += size
    if at != len(payload):
        raise ValueError(f"{len(payload)} bytes of code and arrays, expected {at}")
    seconds = header["compile_seconds"]
    if not isinstance(seconds, float | int) or not 0 <= seconds < math.inf:
        raise ValueError(f"compile_seconds is {seconds}")
    if header["kind"] not in (GRAPH, LIBRARY):
        raise ValueError(f"kind is {header['kind']}")
    return Entry(
        **{name: _text(header[name]) for name in ("id", "name", "symbol", "kind", "content")},
        versions={name: _text(version) for name, version in header["versions"].items()},
        compile_seconds=float(seconds),
        code=payload[:code_size],
        arrays=tuple(arrays),
    )


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _size(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise TypeError(f"{value!r} is no size")
    return value

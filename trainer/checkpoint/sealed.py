"""The file of a checkpoint: safetensors, with JSON in its header, sealed by a digest of every byte. Standard library.

    header's size, 8 bytes | header: JSON, the metadata below and each array's dtype, shape and place | the arrays

Metadata: `format`, `version`, `facts` (JSON: all that is no array) and `sha256`, which is that of the whole file with
zeros in its own place. Nothing in it can be executed, and nothing of a file is used before its digest was right.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

FORMAT = "replica-trainer checkpoint"
VERSION = 1
SIZE_BYTES = 8
UNSEALED = "0" * 64
# Inside `facts` the quotes would be escaped, so that this is found in one place only.
BEFORE_DIGEST = b'"sha256":"'


class Unusable(Exception):
    """A file that cannot be resumed from; the message says why, to go behind its name."""


class Damaged(Unusable):
    """It is not as it was written."""


class Foreign(Unusable):
    """Something else wrote it."""


class Newer(Unusable):
    """A newer version of this program wrote it."""


def metadata(facts: Mapping[str, Any]) -> dict[str, str]:
    """What the header of a file that is not sealed yet says."""
    return {
        "format": FORMAT,
        "version": str(VERSION),
        "sha256": UNSEALED,
        "facts": json.dumps(facts, separators=(",", ":")),
    }


def seal(data: bytes) -> bytes:
    """The same file with its digest.

    Args:
        data: a safetensors file with `metadata`.
    """
    at = _digest_at(data)
    return data[:at] + hashlib.sha256(data).hexdigest().encode() + data[at + len(UNSEALED) :]


def facts_of(data: bytes) -> dict[str, Any]:
    """What a checkpoint says beside its arrays, once all of it was found to be as it was written.

    Raises:
        Unusable: it is not.
    """
    header = _header(data)
    about = header.get("__metadata__")
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise Foreign("is a safetensors file, but no checkpoint of this program")
    # Before the digest, which a newer version may make otherwise.
    version = str(about.get("version", ""))
    if not version.isdecimal() or int(version) < 1:
        raise Damaged(f"is damaged: its version is '{version}'")
    if int(version) > VERSION:
        raise Newer(f"has format {version}, and this version of the program reads up to {VERSION}")
    if (is_to := _end(header)) > len(data) - _data_at(data):
        raise Damaged(f"is truncated: {len(data) - _data_at(data):,} of {is_to:,} bytes of arrays")
    if not _is_sealed(data, str(about.get("sha256", ""))):
        raise Damaged("is damaged: its content does not have its sha256")
    facts: dict[str, Any] = json.loads(about["facts"])
    return facts


def _header(data: bytes) -> dict[str, Any]:
    if len(data) < SIZE_BYTES or len(data) < _data_at(data):
        raise Damaged(f"is truncated: {len(data):,} bytes, less than its header")
    try:
        found = json.loads(data[SIZE_BYTES : _data_at(data)])
    except ValueError:
        raise Damaged("is damaged: its header is no JSON") from None
    if not isinstance(found, dict):
        raise Damaged("is damaged: its header is no JSON object")
    return found


def _data_at(data: bytes) -> int:
    return SIZE_BYTES + int.from_bytes(data[:SIZE_BYTES], "little")


def _end(header: Mapping[str, Any]) -> int:
    """Bytes of arrays that the header speaks of."""
    try:
        return max((each["data_offsets"][1] for name, each in header.items() if name != "__metadata__"), default=0)
    except (KeyError, IndexError, TypeError):
        raise Damaged("is damaged: its header does not say where arrays are") from None


def _is_sealed(data: bytes, digest: str) -> bool:
    at = _digest_at(data)
    if at < 0 or data[at : at + len(UNSEALED)] != digest.encode():
        return False
    found = hashlib.sha256(data[:at])
    found.update(UNSEALED.encode())
    found.update(memoryview(data)[at + len(UNSEALED) :])
    return found.hexdigest() == digest


def _digest_at(data: bytes) -> int:
    at = data.find(BEFORE_DIGEST, 0, _data_at(data))
    return at if at < 0 else at + len(BEFORE_DIGEST)

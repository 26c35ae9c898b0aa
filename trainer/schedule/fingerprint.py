"""A digest of what replicas hold, to tell states apart that ought to be the same.

Equivalent prefixes lead to the same state only where all that replicas share is announced. What a user's own code
shares in other ways (a tensor of its own, an element of a list) shows here: the search then takes two prefixes for
equivalent only where their states are equal, and says that something was hidden.

Thread-safety: for whoever's turn it is, when every other replica waits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

SCALARS = (int, float, str, bool, type(None))
# Deeper than this nobody looks into lists of lists.
DEPTH = 3
# Above this many elements a digest at every choice would take longer than what it saves.
MOST_ELEMENTS = 1_000_000


def fingerprint(objects: Iterable[Any]) -> bytes:
    """A digest of tensors, scalars and collections of them, and of what objects hold of those: 16 bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for each in objects:
        _feed(digest, each, 0)
    return digest.digest()


def held(thing: object) -> list[Any]:
    """What an object's plain attributes are bound to, read without announcing it."""
    found: dict[str, Any] = object.__getattribute__(thing, "__dict__")
    return [value for _, value in sorted(found.items())]


def _feed(digest: Any, value: Any, depth: int) -> None:
    value = getattr(value, "plain", value)  # the shared vector under a schedule
    if isinstance(value, SCALARS):
        digest.update(repr(value).encode())
    elif hasattr(value, "detach") and hasattr(value, "numpy"):
        array = value.detach().contiguous().numpy()
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(array.tobytes())
    elif hasattr(value, "tobytes"):
        digest.update(value.tobytes())
    elif hasattr(value, "state_dict"):
        _feed(digest, value.state_dict(), depth + 1)
    elif depth < DEPTH:
        _feed_each(digest, value, depth + 1)


def _feed_each(digest: Any, value: Any, depth: int) -> None:
    if isinstance(value, dict):
        for key, each in value.items():
            digest.update(repr(key).encode())
            _feed(digest, each, depth)
    elif isinstance(value, (list, tuple)):
        digest.update(f"[{len(value)}".encode())
        for each in value:
            _feed(digest, each, depth)
    elif isinstance(value, (set, frozenset)):
        digest.update(repr(sorted(map(repr, value))).encode())

"""Files of which a reader sees all or nothing, however their writing ends. Standard library only."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Where to write what is to be at `path`: it gets there when the block ends well, and else nothing is left.

    Thread-safety: one writer of a path in a process at a time.

    Raises:
        OSError: the file cannot be put in its place.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)

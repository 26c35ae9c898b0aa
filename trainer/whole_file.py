"""Files of which a reader sees all or nothing, however their writing ends. Standard library only."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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


def put(data: bytes, name: str, folder: int) -> None:
    """Put a file into an open folder. Should the machine go down, too, the file is there whole, or as it was before.

    What is being written is called `.NAME.` and 16 digits; a process that is killed leaves it behind.

    Args:
        folder: its descriptor, so that nothing that is done to a path meanwhile leads elsewhere.

    Thread-safety: any number of writers, in any number of processes and machines: the last one's file stays.

    Raises:
        OSError: the file cannot be written or put in its place; nothing of it is left.
    """
    # Drawn, not the process's number: processes in containers that share a folder may have the same one.
    partial = f".{name}.{secrets.token_hex(8)}"
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=folder)
    try:
        try:
            left = memoryview(data)
            while left:
                left = left[os.write(descriptor, left) :]
            # Before it gets its name: else the name may be on disk earlier than the data.
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(partial, name, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        with suppress(OSError):
            os.unlink(partial, dir_fd=folder)
        raise
    os.fsync(folder)

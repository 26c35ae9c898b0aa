"""The folder that compiled steps are kept in: nobody else may have put anything into it. Standard library only.

A path is followed one folder at a time, each opened from within the one before and looked at once it is open, so that
what is looked at is what is used: whatever happens to the path in between, files come from the folder that was checked.
Guaranteed: the folder is a real one, the user's own, and others cannot write to it. Every folder above it is root's or
the user's, and nobody may write to it whom the sticky bit does not hold back. Those whose group may write are let pass,
as many systems make them so by default: whoever uses that to put another folder there puts one that is not the user's.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

NAME = "replica-trainer"
# Without a permission to list it, a folder above may still be passed through.
_THROUGH = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_INTO = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Untrusted(Exception):
    """A folder or file that others may have written, or can: what and why."""


def default_folder() -> Path | None:
    """`$XDG_CACHE_HOME/replica-trainer`, or in `~/.cache`; None for a user without a home.

    Source: XDG Base Directory Specification, which has paths that are not absolute ignored.
    """
    for root in (os.environ.get("XDG_CACHE_HOME", ""), os.path.expanduser("~/.cache")):
        if os.path.isabs(root):
            return Path(root) / NAME
    return None


@contextmanager
def opened(folder: Path, *, create: bool = False) -> Iterator[int]:
    """A descriptor of the folder, which can be trusted.

    Args:
        create: make it, and what is missing above it, for the user alone.

    Raises:
        Untrusted: it cannot be.
        OSError: it cannot be opened or made.
    """
    # Links are followed first, and none after that: what they lead to is what is held to the rules.
    root, *names = Path(os.path.realpath(folder)).parts
    descriptor, so_far = os.open(root, _THROUGH), Path(root)
    try:
        for name in names:
            _check_above(so_far, os.fstat(descriptor))
            inner = _entered(name, descriptor, create=create)
            os.close(descriptor)
            descriptor, so_far = inner, so_far / name
        check_own(f"folder {folder}", os.fstat(descriptor))
        into = os.open(".", _INTO, dir_fd=descriptor)
    finally:
        os.close(descriptor)
    try:
        yield into
    finally:
        os.close(into)


def check_own(what: str, found: os.stat_result) -> None:
    """Hold a folder or a file to being the user's own.

    Raises:
        Untrusted: it is somebody else's, or others can write to it.
    """
    if found.st_uid != os.geteuid():
        raise Untrusted(f"{what} belongs to another user (uid {found.st_uid})")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise Untrusted(f"{what} can be written by others (mode {stat.S_IMODE(found.st_mode):o})")


def _check_above(folder: Path, found: os.stat_result) -> None:
    if found.st_uid not in (0, os.geteuid()):
        raise Untrusted(f"folder {folder}, above it, belongs to another user (uid {found.st_uid})")
    if found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX:
        raise Untrusted(f"folder {folder}, above it, can be written by others (mode {stat.S_IMODE(found.st_mode):o})")


def _entered(name: str, parent: int, *, create: bool) -> int:
    try:
        return os.open(name, _THROUGH, dir_fd=parent)
    except FileNotFoundError:
        if not create:
            raise
    # Somebody else may make it just now; whose it is comes out when it is open.
    with suppress(FileExistsError):
        os.mkdir(name, 0o700, dir_fd=parent)
    return os.open(name, _THROUGH, dir_fd=parent)

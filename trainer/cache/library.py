"""Loads the machine code of a compiled step: exactly the bytes that were held to their digest, and nobody else's.

A loader takes a path. Between looking at a file and loading it the path may come to mean another file, so the bytes
that were read and checked are put into a file of this process's own that has no name, and sealed: nobody can change
it any more, this process included. The path is that of its descriptor.

The loader knows what it has loaded by path, and a descriptor's number is used again once it is closed: the next library
would then be taken for the former, whose body would run. So descriptors stay open for as long as the process lives, as
the libraries themselves do.

Symbols are local to each library. Made global, two that call their functions alike would call one of them for both.
"""

from __future__ import annotations

import ctypes
import fcntl
import os

from trainer.cache.entry import LIBRARY, Entry

_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def load_library(entry: Entry) -> ctypes.CDLL:
    """The shared library of an entry; its function is `entry.symbol`.

    Raises:
        OSError: this system cannot load it, or has no files without names (Linux has).
    """
    assert entry.kind == LIBRARY, entry.kind
    if not hasattr(os, "memfd_create"):
        raise OSError("loading compiled libraries needs Linux")
    descriptor = os.memfd_create("compiled step", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        left = memoryview(entry.code)
        while left:
            left = left[os.write(descriptor, left) :]
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
        return ctypes.CDLL(f"/proc/self/fd/{descriptor}", mode=ctypes.RTLD_LOCAL)
    except BaseException:
        os.close(descriptor)  # nothing was loaded from it
        raise

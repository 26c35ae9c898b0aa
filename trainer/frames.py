"""Where the threads of this process are. Standard library only."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


def frames() -> dict[int, FrameType]:
    """The frame that each thread is in, by the thread's identity."""
    with collector_off():
        return sys._current_frames()


@contextmanager
def collector_off() -> Iterator[None]:
    """Without the garbage collector, for whoever calls `sys._current_frames`.

    CPython 3.11 may run it in there, under the lock on the list of threads, and hangs for ever where it frees a
    `threading.local`, which wants that lock (python/cpython issue 106883).
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()

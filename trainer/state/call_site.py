"""Where, in the code that uses `Synchronized`, something happened: `file:line`. Standard library only."""

from __future__ import annotations

import sys
import traceback
from types import FrameType

# Frames that only pass a call on.
_PASSED_THROUGH = {
    "contextlib",
    *(
        f"{__package__}.{name}"
        for name in ("call_site", "guarded", "handles", "lock_order", "locks", "read_write_lock", "synchronized")
    ),
}


def call_site() -> str:
    """Of the call that is under way.

    Thread-safety: pure.
    """
    frame: FrameType = sys._getframe()
    while not _is_users(frame) and frame.f_back is not None:
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def raised_at(error: BaseException) -> str:
    """Of the last line that an exception comes from; of the call under way, if it was raised in C or by us.

    Thread-safety: for the thread that the exception is passing through.
    """
    frames = [(frame, line) for frame, line in traceback.walk_tb(error.__traceback__) if _is_users(frame)]
    if not frames:
        return call_site()
    frame, line = frames[-1]
    return f"{frame.f_code.co_filename}:{line}"


def _is_users(frame: FrameType) -> bool:
    return frame.f_globals.get("__name__") not in _PASSED_THROUGH

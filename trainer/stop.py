"""Why a run has to end early, and the promise that it then does. Standard library only.

A run ends early on Ctrl-C, on SIGTERM, and when the process that started it is gone, which shows as the end of the pipe
between the two: that comes even if the parent was killed outright. Whoever runs looks at the flag often; whoever does
not look for `PATIENCE_SECONDS`, because it imports, compiles or hangs, is ended without being asked.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from trainer.audit.verdict import Error

PATIENCE_SECONDS = 1.2
REASONS = {signal.SIGINT: "interrupted by Ctrl-C (SIGINT)", signal.SIGTERM: "terminated (SIGTERM)"}
PARENT_ENDED = "parent process ended"


class Stop:
    """A flag that is raised once, with the reason.

    Attributes:
        reason: None until raised.
        status: exit status that goes with the reason.
        give_up: ends the process with an error for a verdict, from any thread, where the process is the run's own.

    Thread-safety: any thread and any signal handler may read or raise it; the first reason stays.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self.status = 0
        self.give_up: Callable[[Error], NoReturn] | None = None

    def is_set(self) -> bool:
        return self.reason is not None

    def set(self, reason: str, status: int) -> None:
        if self.reason is None:
            self.status = status
            self.reason = reason

    def listen(self, pipe: int, too_late: Callable[[], object]) -> None:
        """Raise the flag on SIGINT, on SIGTERM and at the end of the pipe, from now on.

        Args:
            pipe: file descriptor of the reading end.
            too_late: called, in a thread of its own, `PATIENCE_SECONDS` after the flag was raised.
        """
        # A handler may interrupt any lock's holder, so it takes none: it sets the flag and writes one byte, which wakes
        # the thread up.
        wake, woken = os.pipe()

        def handle(number: int, _frame: FrameType | None) -> None:
            self.set(REASONS[signal.Signals(number)], 128 + number)
            os.write(woken, b"!")

        for number in REASONS:
            signal.signal(number, handle)

        def watch() -> None:
            while not self.is_set():
                ready, _, _ = select.select([pipe, wake], [], [])
                if pipe in ready and not os.read(pipe, 4096):
                    self.set(PARENT_ENDED, 128 + signal.SIGTERM)
            time.sleep(PATIENCE_SECONDS)
            too_late()

        threading.Thread(target=watch, name="stop", daemon=True).start()

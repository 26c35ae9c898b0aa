"""Where the threads of replicas meet at a step's end, so that what they share is at rest and can be looked at whole."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence

from trainer.checkpoint.contents import Snapshot
from trainer.state.precision import PrecisionHolder

POLL_SECONDS = 0.1


class Meeting:
    """One run's; replicas come together once for each checkpoint.

    Guarantees: `take` runs when all replicas have come and none has gone on, in the thread of one of them; afterwards
    they go on at once, while the main thread writes. It does not run if one of them does not come.

    Attributes:
        modes: the precision mode that each replica was in when they last met.

    Args:
        hosted: the replicas of this process.
        take: makes the snapshot of a step.
        ended: the run is to end, and nobody will ask for snapshots any more.
    """

    def __init__(
        self,
        hosted: Sequence[int],
        precision: PrecisionHolder,
        take: Callable[[int], Snapshot],
        ended: threading.Event,
    ) -> None:
        self.modes: dict[int, str | None] = dict.fromkeys(hosted)
        self._precision, self._take, self._ended = precision, take, ended
        self._step = 0
        self._come = threading.Barrier(len(hosted))
        self._seen = threading.Barrier(len(hosted), self._hand_over)
        # One: replicas that come again before it was written wait, and memory does not fill with snapshots.
        self._taken: queue.Queue[Snapshot] = queue.Queue(maxsize=1)

    def resume(self, own: int, mode: str | None) -> None:
        """Put a replica's thread into the mode that it was in, before any of them takes a step."""
        if self._precision.current() != mode:
            self._precision.enable(mode)
        self._come.wait()

    def attend(self, own: int, step: int) -> None:
        """Come to the end of a step, and go on when all have come.

        Raises:
            threading.BrokenBarrierError: the run is to end.
        """
        self._step = step  # the same for all
        self._come.wait()
        # Only now: a mode that all share may have been changed by who came last. The thread's own: nobody else sees it.
        self.modes[own] = self._precision.current()
        self._seen.wait()

    def abort(self) -> None:
        self._come.abort()
        self._seen.abort()

    def _hand_over(self) -> None:
        snapshot = self._take(self._step)
        while not self._ended.is_set():
            try:
                self._taken.put(snapshot, timeout=POLL_SECONDS)
            except queue.Full:
                continue
            return

    def taken(self) -> Snapshot | None:
        """What was taken and nobody has asked for yet."""
        return None if self._taken.empty() else self._taken.get()

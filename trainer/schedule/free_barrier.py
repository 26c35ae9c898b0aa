"""A barrier for threads that run freely. Standard library only."""

from __future__ import annotations

import threading


class FreeBarrier:
    """As `threading.Barrier`, handed on by one bare lock for each thread that waits.

    `threading.Barrier` wakes its threads through a condition: each takes the condition's own lock again before it may
    go on, and waits until those of the last round are out. Here whoever comes last releases the others' locks and goes
    on; the others go on as they wake.

    Invariant: `_waiting` are the locks of those who wait in this round, all held; whoever takes one out releases it.

    Guarantees: nobody goes on before all have come; whoever waits when it is broken, or comes later, gets
    `threading.BrokenBarrierError`. A thread that was let go may be late for the next round without harm.

    Thread-safety: any thread; not from a signal handler.
    """

    def __init__(self, parties: int) -> None:
        if parties < 1:
            raise ValueError(f"A barrier is for at least 1 thread; got {parties}.")
        self.parties = parties
        self.broken = False
        self._guard = threading.Lock()  # over all that changes; never held while waiting
        self._waiting: list[threading.Lock] = []

    @property
    def n_waiting(self) -> int:
        return len(self._waiting)

    def wait(self, timeout: float | None = None) -> int:
        """Wait until all have come. Returns how many had come before, as `threading.Barrier` does.

        Args:
            timeout: seconds after which the barrier is broken, for everybody; None waits for ever.

        Raises:
            threading.BrokenBarrierError: the barrier is broken, by `abort` or by a time-out.
        """
        with self._guard:
            if self.broken:
                raise threading.BrokenBarrierError
            before = len(self._waiting)
            if before + 1 == self.parties:
                self._let_go()
                return before
            turn = threading.Lock()
            turn.acquire()
            self._waiting.append(turn)
        if not turn.acquire(timeout=-1 if timeout is None else max(0.0, timeout)):
            self._give_up(turn)
        if self.broken:
            raise threading.BrokenBarrierError
        return before

    def _give_up(self, turn: threading.Lock) -> None:
        with self._guard:
            if turn in self._waiting:  # else it was let go at the last moment
                self.broken = True
                self._let_go()

    def abort(self) -> None:
        """Let nobody wait any more."""
        with self._guard:
            self.broken = True
            self._let_go()

    def _let_go(self) -> None:
        waiting, self._waiting = self._waiting, []
        for turn in waiting:
            turn.release()

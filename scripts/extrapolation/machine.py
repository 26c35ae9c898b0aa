"""Cores, the interpreter's lock, locks and barriers, over simpy's clock.

A thread keeps its core until it blocks, gives way, or its time slice is used up and another waits: then that one has
its turn. A lock that is given back is free for whoever runs first; the first that waits is woken, and waits again if it
comes too late. That is what the system's locks do: handed over, they would belong to threads that have no core.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from typing import Any

import simpy

Doing = Generator[simpy.Event, Any, None]


class Cores:
    """So many threads run at the same time; in their order, each for a slice.

    Args:
        number: None for as many as there are threads.
        switch_seconds: what a core takes to go over to a thread that has waited for it.
    """

    def __init__(
        self, env: simpy.Environment, number: int | None, slice_seconds: float, switch_seconds: float = 0.0
    ) -> None:
        self.env, self.free, self.slice_seconds, self.switch_seconds = env, number, slice_seconds, switch_seconds
        self.waiting: deque[simpy.Event] = deque()

    def give_back(self) -> None:
        assert self.free is not None
        if self.waiting:
            self.waiting.popleft().succeed()
        else:
            self.free += 1


class Thread:
    """One replica's.

    Attributes:
        core_wait: seconds that it was ready to run and had no core.
    """

    def __init__(self, cores: Cores) -> None:
        self.cores, self.env = cores, cores.env
        self.core_wait = 0.0
        self._left = 0.0
        self._has_core = False

    def run(self, seconds: float) -> Doing:
        """Take so much time of a core."""
        if self.cores.free is None:
            yield self.env.timeout(seconds)
            return
        while True:
            if not self._has_core:
                yield from self._wait_for_core()
            part = min(seconds, self._left)
            yield self.env.timeout(part)
            seconds -= part
            self._left -= part
            if self._left <= 0:
                if self.cores.waiting:
                    self.block()
                else:
                    self._left = self.cores.slice_seconds
            if seconds <= 0:
                return

    def give_way(self) -> Doing:
        """Leave the core to those that wait for one, and come after them."""
        if self.cores.waiting:
            self.block()
            yield from self.run(0.0)

    def block(self) -> None:
        """Leave the core to others."""
        if self._has_core:
            self._has_core = False
            self.cores.give_back()

    def _wait_for_core(self) -> Doing:
        cores, since = self.cores, self.env.now
        assert cores.free is not None
        if cores.free:
            cores.free -= 1
        else:
            turn = self.env.event()
            cores.waiting.append(turn)
            yield turn
            yield self.env.timeout(cores.switch_seconds)
        self.core_wait += self.env.now - since
        self._has_core, self._left = True, cores.slice_seconds


class Lock:
    """One holds it. Woken in the order of their coming."""

    def __init__(self, env: simpy.Environment) -> None:
        self.env = env
        self.held = False
        self.waiting: deque[simpy.Event] = deque()

    def acquire(self, thread: Thread) -> Doing:
        if thread.cores.free is not None:
            yield from thread.run(0.0)
        while self.held:
            thread.block()
            woken = self.env.event()
            self.waiting.append(woken)
            yield woken
            if thread.cores.free is not None:
                yield from thread.run(0.0)
        self.held = True

    def release(self) -> None:
        self.held = False
        if self.waiting:
            self.waiting.popleft().succeed()


class SharedLock:
    """Many read or one writes: who writes has the turn and waits for those that read, as trainer's does."""

    def __init__(self, env: simpy.Environment) -> None:
        self.env = env
        self.turn = Lock(env)
        self.readers = 0
        self.drained: simpy.Event | None = None

    def acquire_shared(self, thread: Thread) -> Doing:
        yield from self.turn.acquire(thread)
        self.readers += 1
        self.turn.release()

    def release_shared(self) -> None:
        self.readers -= 1
        if not self.readers and self.drained is not None:
            self.drained.succeed()
            self.drained = None

    def acquire(self, thread: Thread) -> Doing:
        yield from self.turn.acquire(thread)
        if self.readers:
            thread.block()
            self.drained = self.env.event()
            yield self.drained

    def release(self) -> None:
        self.turn.release()


class Barrier:
    """All go on when the last has come and has done what is the last one's to do."""

    def __init__(self, env: simpy.Environment, parties: int) -> None:
        self.env, self.parties = env, parties
        self.come = 0
        self.open = env.event()

    def wait(self, thread: Thread, last: Doing | None = None) -> Doing:
        """Meet the others.

        Args:
            last: done by the last to come, before anybody goes on; a generator that is not the last one's is closed.
        """
        self.come += 1
        if self.come < self.parties:
            if last is not None:
                last.close()
            thread.block()
            yield self.open
            return
        if last is not None:
            yield from last
        self.come, opened, self.open = 0, self.open, self.env.event()
        opened.succeed()

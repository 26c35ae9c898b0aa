"""One process of replicas as it is simulated: its cores, its locks, its shared variables; and one replica in it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import simpy

from extrapolation.machine import Barrier, Cores, Doing, Lock, SharedLock, Thread
from extrapolation.pieces import Pieces
from extrapolation.versions import START, Variable

DRAWN = 4096  # values at a time
PARTS = 3  # of the rest: one before a step, the others before its gradient


class Draws:
    """Each piece's next duration, from what was measured of it."""

    def __init__(self, pieces: Pieces, seed: int) -> None:
        self._random = random.Random(seed)
        self.read, self.compute, self.write, self.rest, self.barrier = (
            self._of(getattr(pieces, name)) for name in ("read", "compute", "write", "rest", "barrier")
        )

    def _of(self, values: tuple[float, ...]) -> Callable[[], float]:
        if len(values) < 2:
            only = values[0] if values else 0.0
            return lambda: only
        return self._stream(values).__next__

    def _stream(self, values: tuple[float, ...]) -> Iterator[float]:
        while True:
            yield from self._random.choices(values, k=DRAWN)


class Group:
    """What the replicas of one process share.

    Attributes:
        landed: updates made.
        barrier_scale: a barrier's time over that of the calibrating run's: who is last wakes the others one by one.
    """

    def __init__(
        self,
        env: simpy.Environment,
        draws: Draws,
        replicas: int,
        *,
        cores: Cores,
        num_variables: int,
        has_gil: bool,
        barrier_scale: float,
    ) -> None:
        self.env, self.draws, self.size, self.cores = env, draws, replicas, cores
        self.gil = Lock(env) if has_gil else None
        self.lock, self.shared_lock = Lock(env), SharedLock(env)
        self.locks = [Lock(env) for _ in range(num_variables)]
        self.barriers = Barrier(env, replicas), Barrier(env, replicas)
        self.meeting = Barrier(env, replicas)
        self.variables = [Variable() for _ in range(num_variables)]
        self.barrier_scale = barrier_scale
        self.landed = 0
        self.version = 0  # of optimistic: odd while a write is under way


@dataclass
class Told:
    """What one simulation has seen of updates after its warm-up."""

    updates: int = 0
    staleness: int = 0
    staleness_max: int = 0
    lock_wait: float = 0.0
    barrier_wait: float = 0.0
    core_wait: float = 0.0
    again: int = 0  # gradients that optimistic threw away


@dataclass
class Replica:
    """One replica of one process."""

    own: int
    group: Group
    thread: Thread
    lock_wait: float = 0.0
    barrier_wait: float = 0.0
    staleness: int = 0
    again: int = 0
    seen: int = 0  # the version of its snapshot
    bases: list[int] = field(default_factory=list)

    def rest(self) -> Doing:
        """What comes before a step's first piece."""
        yield from self._in_the_interpreter(self.group.draws.rest() / PARTS)

    def _in_the_interpreter(self, seconds: float = 0.0) -> Doing:
        """Python's part of something: under the interpreter's lock, which goes to those that wait for a core first."""
        group = self.group
        if group.gil is None:
            yield from self.thread.run(seconds)
            return
        yield from self.thread.give_way()
        yield from group.gil.acquire(self.thread)
        yield from self.thread.run(seconds)
        group.gil.release()

    def kernel(self, seconds: float) -> Doing:
        """What runs without the interpreter's lock, and has to ask for it when it is done."""
        yield from self.thread.run(seconds)
        if self.group.gil is not None:
            yield from self._in_the_interpreter()

    def compute(self) -> Doing:
        for _ in range(PARTS - 1):
            yield from self.rest()
        yield from self.kernel(self.group.draws.compute())

    def look(self) -> None:
        """Take down which version is there."""
        self.seen = self.group.landed

    def read(self) -> Doing:
        self.look()
        yield from self.kernel(self.group.draws.read())

    def write(self) -> Doing:
        yield from self.kernel(self.group.draws.write())

    def commit(self) -> None:
        """Its update is in."""
        self.staleness = self.group.landed - self.seen
        self.group.landed += 1

    def acquire(self, way: Doing) -> Doing:
        """Wait for a lock, and count how long."""
        since = self.group.env.now
        yield from way
        self.lock_wait += self.group.env.now - since

    def meet(self, barrier: Barrier, last: Doing | None = None) -> Doing:
        since = self.group.env.now
        yield from barrier.wait(self.thread, last)
        if self.thread.cores.free is not None:
            yield from self.thread.run(0.0)
        self.barrier_wait += self.group.env.now - since

    def barrier_time(self) -> Doing:
        """What a barrier itself takes of the last one's time."""
        yield from self.thread.run(self.group.draws.barrier() * self.group.barrier_scale)

    # Variable by variable, for modes that hold nothing meanwhile.

    def read_in_turn(self) -> Doing:
        self.look()
        share = self.group.draws.read() / len(self.group.variables)
        self.bases = [START] * len(self.group.variables)
        for place, variable in enumerate(self.group.variables):
            yield from self.kernel(share)
            self.bases[place] = variable.now

    def write_in_turn(self) -> Doing:
        share = self.group.draws.write() / len(self.group.variables)
        for place, variable in enumerate(self.group.variables):
            yield from self.kernel(share)
            variable.write(self.own, self.bases[place])

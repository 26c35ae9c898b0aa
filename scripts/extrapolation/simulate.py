"""One simulation: so many replicas in one mode, flat or in processes, until enough updates have been made."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace

import simpy

from extrapolation.group import Draws, Group, Replica, Told
from extrapolation.machine import Barrier, Cores, Doing, Thread
from extrapolation.modes import LOSING, MODES, NOT_TOLD
from extrapolation.network import Network
from extrapolation.pieces import Pieces
from extrapolation.versions import updates_kept

NETWORK = Network(alpha_seconds=50e-6, beta_seconds=8e-10, gradient_bytes=4 * 669_706)
STEPS = 3  # that each replica takes at least, on average, after one that warms up


@dataclass(frozen=True)
class Setting:
    """What is simulated.

    Attributes:
        group_size: replicas in a process; 0 for all of them in one.
        local_steps: of each replica between two averages over processes.
        cores: of one machine, which all processes share; None for `cores_per_replica`.
        slice_seconds: how long a thread keeps a core that others wait for.
        switch_seconds: what a core takes to go over to a thread that has waited for it.
        updates: that are looked at, at least.
    """

    mode: str
    replicas: int
    group_size: int = 0
    local_steps: int = 1
    cores: int | None = None
    cores_per_replica: float = 1.0
    has_gil: bool = False
    num_variables: int = 4
    slice_seconds: float = 3e-3
    switch_seconds: float = 0.0
    updates: int = 4000
    network: Network = NETWORK

    @property
    def layout(self) -> str:
        return f"processes of {self.group_size}" if self.group_size else "flat"

    @property
    def sizes(self) -> list[int]:
        """Replicas of each process; the last one has what is left."""
        size = self.group_size or self.replicas
        return [min(size, self.replicas - first) for first in range(0, self.replicas, size)]


@dataclass(frozen=True)
class Outcome:
    """What came of it. Seconds are per micro-step.

    Attributes:
        kept: updates that are left of those `made`, from the beginning; None where that is not told.
    """

    micro_steps_per_second: float
    lock_wait_seconds: float
    barrier_wait_seconds: float
    core_wait_seconds: float
    staleness_mean: float
    staleness_max: int
    made: int
    kept: int | None
    again_share: float

    @property
    def lost_share(self) -> float | None:
        return None if self.kept is None else 1 - self.kept / self.made


class Simulation:
    """Built, run once, and looked at."""

    def __init__(self, pieces: Pieces, setting: Setting, seed: int) -> None:
        self.setting = setting
        self.env = simpy.Environment()
        self.told = Told()
        self.done = self.env.event()
        self.made = 0
        self.warm_up = setting.replicas
        self.wanted = self.warm_up + max(setting.updates, STEPS * setting.replicas)
        self.began = 0.0
        step_seconds = sum(pieces.mean(name) for name in ("read", "compute", "write", "rest"))
        order = random.Random(seed).sample(range(setting.replicas), setting.replicas)
        self.starts = iter([step_seconds * place / setting.replicas for place in order])
        draws = Draws(pieces, seed)
        machine = self._machine(setting.cores) if setting.cores is not None else None
        self.groups = [
            Group(
                self.env,
                draws,
                size,
                cores=machine or self._cores(size),
                num_variables=setting.num_variables,
                has_gil=setting.has_gil,
                barrier_scale=size / pieces.replicas,
            )
            for size in setting.sizes
        ]
        self.everybody = Barrier(self.env, len(self.groups))

    def run(self) -> Outcome:
        for group in self.groups:
            for own in range(group.size):
                self.env.process(self._replica(Replica(own, group, Thread(group.cores))))
        self.env.run(until=self.done)
        return self._outcome()

    def _cores(self, size: int) -> Cores:
        number = max(1, round(size * self.setting.cores_per_replica))
        return self._machine(number if number < size else None)

    def _machine(self, number: int | None) -> Cores:
        return Cores(self.env, number, self.setting.slice_seconds, self.setting.switch_seconds)

    def _replica(self, replica: Replica) -> Doing:
        setting, step = self.setting, MODES[self.setting.mode]
        joint = setting.mode == "all_reduce"
        number = 0
        # Not all at the same moment, where nothing brings them together: it takes many steps to lose that.
        yield self.env.timeout(0.0 if joint else next(self.starts))
        while True:
            number += 1
            averages = setting.group_size > 0 and number % setting.local_steps == 0
            yield from replica.rest()
            # A generator that is made and not begun costs nothing.
            yield from step(replica, self._average() if averages and joint else _nothing())
            if averages and not joint:
                yield from replica.meet(replica.group.meeting, self._average())
            self._tell(replica)

    def _average(self) -> Doing:
        """One replica of each process does this: meets the others', and sends."""
        yield from self.everybody.wait(Thread(Cores(self.env, None, 0.0)), self._send())

    def _send(self) -> Doing:
        yield self.env.timeout(self.setting.network.all_reduce_seconds(len(self.groups)))

    def _tell(self, replica: Replica) -> None:
        self.made += 1
        told = self.told
        if self.made > self.warm_up:
            told.updates += 1
            told.staleness += replica.staleness
            told.staleness_max = max(told.staleness_max, replica.staleness)
            told.lock_wait += replica.lock_wait
            told.barrier_wait += replica.barrier_wait
            told.core_wait += replica.thread.core_wait
            told.again += replica.again
        elif self.made == self.warm_up:
            self.began = self.env.now
        replica.lock_wait = replica.barrier_wait = replica.thread.core_wait = 0.0
        replica.again = 0
        if self.made == self.wanted:
            self.done.succeed()

    def _outcome(self) -> Outcome:
        told, seconds = self.told, self.env.now - self.began
        made, kept = self.made, self._kept()
        if self.setting.mode in LOSING:
            # Of those that were written last some may not be told of yet.
            made = sum(len(group.variables[-1].writers) for group in self.groups)
        return Outcome(
            micro_steps_per_second=told.updates / seconds if seconds else math.inf,
            lock_wait_seconds=told.lock_wait / told.updates,
            barrier_wait_seconds=told.barrier_wait / told.updates,
            core_wait_seconds=told.core_wait / told.updates,
            staleness_mean=told.staleness / told.updates,
            staleness_max=told.staleness_max,
            made=made,
            kept=kept,
            again_share=told.again / told.updates,
        )

    def _kept(self) -> int | None:
        if self.setting.mode in NOT_TOLD:
            return None
        if self.setting.mode not in LOSING:
            return self.made
        return sum(updates_kept(group.variables) for group in self.groups)


def simulate(pieces: Pieces, setting: Setting, seed: int = 0) -> Outcome:
    """Simulate.

    Args:
        pieces: of the mode.
        seed: same seed, same outcome.
    """
    if setting.cores is not None and setting.cores >= setting.replicas:
        setting = replace(setting, cores=None, cores_per_replica=1.0)
    return Simulation(pieces, setting, seed).run()


def _nothing() -> Doing:
    yield from ()

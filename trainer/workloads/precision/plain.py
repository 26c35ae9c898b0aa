"""Replicas that are plain threads: as fast as they can, or in the order of a schedule."""

from __future__ import annotations

import threading
import time
from functools import partial

from trainer.audit.records import RunRecord
from trainer.config import Config
from trainer.schedule.locks import Barrier, modelled
from trainer.schedule.order import Order
from trainer.strategies.controlled_threads import turnstile
from trainer.strategies.hosting import StopFlag, Watcher
from trainer.workloads.defaults.free_threads import take_steps
from trainer.workloads.precision.calls import Layer
from trainer.workloads.precision.findings import fill
from trainer.workloads.precision.program import Stops
from trainer.workloads.precision.rounds import Rounds


def run(config: Config, record: RunRecord, watcher: Watcher, stop: StopFlag) -> Rounds:
    """Have all threads begin each round together and go through it freely.

    Raises:
        RunBroken: a replica raised, or none finished a round for `watchdog.seconds`.
    """
    rounds = Rounds(config, Layer())
    meeting = threading.Barrier(config.num_replicas)
    # As a program that knows of the others would do; without it hardly any thread is interrupted within a few lines.
    stops = Stops(pause=lambda: time.sleep(0), meet=meeting.wait)

    def take(own: int, step: int) -> None:
        stops.meet()
        if step:
            rounds.clear(own)
            stops.meet()
        rounds.take(own, step, stops)

    rounds.start()
    take_steps(take, config, record, stop, report=lambda: watcher.progress(record), abort=meeting.abort)
    return rounds


class PlainCase:
    """The rounds in one order after another (`trainer/schedule/case.py`)."""

    joint = copies = False

    def __init__(self, config: Config) -> None:
        self.num_replicas = config.num_replicas
        self._config, self._layer = config, Layer()

    def run(self, order: Order, record: RunRecord) -> None:
        with modelled():
            rounds = Rounds(self._config, self._layer)
            # Every point is where others may come in between: nobody has to pause for that.
            stops = Stops(pause=lambda: None, meet=Barrier(self.num_replicas, "all replicas").wait)
        rounds.start()
        turnstile(order, self._config).run([partial(take_all, rounds, own, stops) for own in range(self.num_replicas)])
        fill(record, self._config, rounds)


def take_all(rounds: Rounds, own: int, stops: Stops) -> None:
    """All rounds of one replica, under a schedule."""
    for step in range(rounds.num_rounds):
        if step:
            stops.meet()
            rounds.clear(own)
            stops.meet()
        rounds.take(own, step, stops)

"""Replicas of MirroredStrategy, which run one at a time and switch in cross-replica calls: freely, or as scheduled."""

from __future__ import annotations

import _thread
import re
import sys
import threading
import time
from typing import Any

import tensorflow as tf

from trainer.audit.records import RunRecord
from trainer.config import Config
from trainer.schedule.locks import modelled
from trainer.schedule.order import Order
from trainer.schedule.turn_table import TurnTable
from trainer.schedule.turnstile import stacks
from trainer.strategies.hosting import RunBroken, StopFlag, Watcher
from trainer.strategies.in_replica import replica_id
from trainer.strategies.reduction import DirectReduction
from trainer.workloads.precision.calls import Layer
from trainer.workloads.precision.findings import fill
from trainer.workloads.precision.plain import take_all
from trainer.workloads.precision.program import Stops
from trainer.workloads.precision.rounds import Rounds

POLL_SECONDS = 0.05
# Of a stack: file, number and text of the lines that are our own.
_OURS = re.compile(r'/(trainer/[^"]*)", line (\d+), in .*\n *(.*)')


def _cross_replica_call() -> None:
    """What synchronized normalization does inside a layer, and an optimizer inside a step."""
    tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, tf.constant(1.0))


STOPS = Stops(pause=_cross_replica_call, meet=_cross_replica_call)


def _strategy(num_replicas: int) -> Any:
    """Over GPUs where there are enough, else over logical CPU devices."""
    gpus = tf.config.list_logical_devices("GPU")
    devices = gpus if len(gpus) >= num_replicas else tf.config.list_logical_devices("CPU")
    names = [device.name for device in devices[:num_replicas]]
    return tf.distribute.MirroredStrategy(names, cross_device_ops=DirectReduction())


def run(config: Config, record: RunRecord, watcher: Watcher, stop: StopFlag) -> Rounds:
    """Run each round as one call of `strategy.run`, eagerly.

    Raises:
        RunBroken: a replica raised, or no round was finished for `watchdog.seconds`.
    """
    rounds = Rounds(config, Layer())
    rounds.start()
    _Free(config, rounds, record, stop).run(watcher)
    return rounds


class _Free:
    """All rounds in a thread of their own, which can be left behind where replicas wait for each other for ever."""

    def __init__(self, config: Config, rounds: Rounds, record: RunRecord, stop: StopFlag) -> None:
        self._rounds, self._record, self._stop = rounds, record, stop
        self._stall_seconds = config.watchdog.seconds
        self._strategy = _strategy(config.num_replicas)
        self._replicas: dict[int, int] = {}  # of threads by their identity
        self._error: Exception | None = None

    def run(self, watcher: Watcher) -> None:
        thread = threading.Thread(target=self._host, name="replicas", daemon=True)
        thread.start()
        moved, moved_at = -1, time.monotonic()
        while thread.is_alive() and not self._stop.is_set():
            watcher.progress(self._record)
            done = self._record.steps_done
            if done != moved:
                moved, moved_at = done, time.monotonic()
            elif time.monotonic() - moved_at > self._stall_seconds:
                raise self._stalled()
            thread.join(POLL_SECONDS)
        watcher.progress(self._record)
        if self._error is not None:
            raise self._error

    def _host(self) -> None:
        try:
            for step in range(self._rounds.num_rounds):
                if self._stop.is_set():
                    break
                self._replicas.clear()
                self._strategy.run(self._replica, args=(step,))
                self._rounds.clear()
                for replica in self._record.replicas:
                    replica.steps_done = step + 1
        except Exception as error:
            self._error = error

    def _replica(self, step: int) -> None:
        own = replica_id()
        self._replicas[_thread.get_ident()] = own
        self._rounds.take(own, step, STOPS)

    def _stalled(self) -> RunBroken:
        """Where each replica waits: the last of our own lines in its stack, and the stacks on standard error."""
        waits = []
        for own, stack in stacks(self._replicas, sorted(self._replicas.values())).items():
            print(f"replica {own}:\n{stack}", file=sys.stderr)
            file, number, line = (_OURS.findall(stack) or [("its own file", "?", "a line that cannot be told")])[-1]
            waits.append(f"replica {own} waits at '{line}' ({file}:{number})")
        return RunBroken(
            "deadlock",
            f"no round was finished for {self._stall_seconds:g} s (watchdog.seconds): {'; '.join(waits)}; the "
            "stacks are in console.log",
            step=self._record.steps_done,
        )


class MirroredCase:
    """The rounds in one order after another (`trainer/schedule/case.py`). The strategy and the layer are kept."""

    joint = copies = False

    def __init__(self, config: Config) -> None:
        self.num_replicas = config.num_replicas
        self._config, self._layer = config, Layer()
        self._strategy = _strategy(config.num_replicas)

    def run(self, order: Order, record: RunRecord) -> None:
        with modelled():
            rounds = Rounds(self._config, self._layer)
        rounds.start()
        table = TurnTable(order, self._config.watchdog.seconds)
        table.run(self._strategy, lambda: take_all(rounds, replica_id(), STOPS))
        fill(record, self._config, rounds)

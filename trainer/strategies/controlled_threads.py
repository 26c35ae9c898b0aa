"""Runs of `strategy=threads` in one order after another: `trainer/schedule/case.py` for the training step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trainer.audit.records import Floats, RunRecord
from trainer.config import Config, Custom
from trainer.engines.capture import capture
from trainer.schedule.attributes import announced
from trainer.schedule.fingerprint import MOST_ELEMENTS, fingerprint, held
from trainer.schedule.locks import known_to_the_schedule, modelled
from trainer.schedule.order import Order
from trainer.schedule.pieces import Pieces
from trainer.schedule.replay import cut
from trainer.schedule.turnstile import Turnstile
from trainer.schedule.visible import watched
from trainer.strategies.hosting import StopFlag, Watcher, turned_on
from trainer.strategies.steps import Steps
from trainer.strategies.threads import Threads, build_mode, kind_of
from trainer.updates.all_reduce import AllReduce
from trainer.updates.shared_vector import Replica, SharedVector
from trainer.workloads.train import Training

STALL_SECONDS = 20.0
MOST_REMEMBERED_BYTES = 64 * 2**20


class ThreadsCase:
    """The training step, from the initial weights on, with everything that replicas share made anew for each order.

    What costs time and is the same every time is kept: the model, the captured steps and the captured rule.
    """

    copies = False

    def __init__(self, config: Config, training: Training, watcher: Watcher, stop: StopFlag) -> None:
        self.num_replicas = training.num_replicas
        # Its module may make locks, and take what makes them from `threading` by name.
        with modelled("module's "), known_to_the_schedule():
            kind = kind_of(config)
        self.joint = issubclass(kind, AllReduce)
        self._kind = announced(kind)
        self._config, self._training = config, training
        self._watcher, self._stop = watcher, stop
        self._steps: Steps | None = None
        self._rule: Callable[..., Tensor] | None = None

    def run(self, order: Order, record: RunRecord) -> None:
        training, config = self._training, self._config
        with ExitStack() as scope:
            scope.enter_context(modelled())
            training.renew()
            if isinstance(config.update_mode, Custom):
                scope.enter_context(known_to_the_schedule())
            with turned_on(training):
                mode = build_mode(config, training, kind=self._kind, captured=self._captured, watch=self._watch)
                steps = self._steps or RememberedSteps
                threads = Threads(config, training, record, self._watcher, self._stop, mode=mode, steps=steps)
                if isinstance(config.update_mode, Custom):
                    order.state = state_of(mode[0], mode[1], mode[2])
                threads.begin(again=self._steps is not None)
                self._steps = threads.steps
                bodies = [partial(threads.replica, own) for own in range(self.num_replicas)]
                turnstile(order, config).run(bodies)
            record.mode_left = training.mode_left
        threads.finish()
        threads.complete()

    def _captured(self, function: Callable[..., Tensor], *example: Tensor) -> Callable[..., Tensor]:
        """The optimizer's rule, captured the first time; it depends on nothing that an order changes."""
        if self._rule is None:
            self._rule = capture(function, *example)
        return self._rule

    def _watch(self, shared: SharedVector) -> None:
        watch(shared, self._config, joint=self.joint)


class RememberedSteps(Steps):
    """Steps that are taken again, for the audit, only once from each snapshot: orders have most of theirs in common.

    Thread-safety: `again` is the main thread's.
    """

    def __init__(self, config: Config, training: Training) -> None:
        super().__init__(config, training)
        self._known: dict[tuple[Any, ...], Floats] = {}
        self._bytes = 0

    def again(self, own: int, snapshot: Floats, number: int, samples: Tensor, positions: Tensor, dtype: str) -> Floats:
        batch = (samples.numpy().tobytes(), positions.numpy().tobytes())
        key = (own, number, dtype, snapshot.tobytes(), batch)
        if key not in self._known:
            found = super().again(own, snapshot, number, samples, positions, dtype)
            found.setflags(write=False)  # other orders' records have it, too
            if self._bytes > MOST_REMEMBERED_BYTES:
                self._known, self._bytes = {}, 0
            self._bytes += snapshot.nbytes + found.nbytes
            self._known[key] = found
        return self._known[key]


def state_of(shared: SharedVector, user: object, replicas: Sequence[Replica]) -> Callable[[], bytes | None]:
    """What a user's own code and the replicas hold; nothing where that is too much to look at.

    Args:
        user: the user's update mode or loop.
    """
    if shared.plain.numel() * (1 + 2 * len(replicas)) > MOST_ELEMENTS:
        return lambda: None

    def state() -> bytes:
        own = [part for each in replicas for part in (each.snapshot, each.contribution, each.delta)]
        return fingerprint([shared.plain, *held(user), *own])

    return state


def turnstile(order: Order, config: Config) -> Turnstile:
    """What lets the replicas' threads go on one at a time."""
    # From one announcement to the next takes less than a free run's step, for a replica runs alone.
    seconds = min(config.watchdog.seconds, STALL_SECONDS)
    return Turnstile(order, seconds, pins=torch.get_num_threads() == 1)


def watch(shared: SharedVector, config: Config, *, joint: bool) -> None:
    """Let replicas have the vector so that each access to it is announced."""
    granularity, chunks = cut(config)
    cuts: set[Any] = set()
    if joint:
        # Where the shares of a joint update meet, in the middle of a variable.
        shares = shared.layout.shares(shared.layout.num_replicas)
        cuts = {end for share in shares for span in share.spans for end in (span.start, span.stop)}
    pieces = Pieces(shared.layout, chunks=chunks, cuts=sorted(cuts))
    shared.vector = watched(shared.plain, pieces, splits_updates=granularity == "memory")

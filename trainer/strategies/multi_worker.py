"""`strategy=multi_worker`: replicas of TensorFlow's MultiWorkerMirroredStrategy, in several processes.

Every worker runs the same program, `mirrored.py`, over its own replicas, and each collective waits for all of them: one
call more or less in one worker and the others hang. So what a worker would decide by its own clock or its own signals,
how many steps a call takes and when to stop, is decided by what all of them say after each call. With it go what their
replicas came to, so that every worker has the whole record: the first one judges and reports it, and all of them
compute gradients again from it in the same order.
"""

from __future__ import annotations

import functools
import hashlib
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import TypeVar

import numpy as np
import tensorflow as tf

from trainer.audit import copies
from trainer.audit.records import Digests, Floats, Noted, RunRecord
from trainer.checkpoint.checkpoints import Checkpoints
from trainer.config import Config
from trainer.processes import Place, here, hosted
from trainer.state.settings import Difference
from trainer.strategies import mirrored
from trainer.strategies.hosting import RunBroken, StopFlag, Watcher, turned_on
from trainer.strategies.mirrored import Mirrored
from trainer.strategies.mirrored_calls import Outcome
from trainer.strategies.traced_mirrored import calls_traced
from trainer.strategies.worker_devices import MultiWorkerMirroredStrategy
from trainer.strategies.worker_exchange import Exchange
from trainer.workloads.train import Training

# What TensorFlow raises in a worker when another one is gone.
LOST = (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.CancelledError, tf.errors.DeadlineExceededError)
# For whoever started the workers to say which of them failed, and why, and to end the others.
SECONDS_TO_BE_ENDED = 10.0
T = TypeVar("T")


def prepare(num_replicas: int, threads_per_replica: int) -> None:
    """Set what the process must have before it computes anything, and join the other workers."""
    mirrored.prepare(num_replicas, threads_per_replica)
    _strategy(num_replicas)


@functools.cache
def _strategy(num_replicas: int) -> MultiWorkerMirroredStrategy:
    """The process's one strategy: its server cannot be started again."""
    gpus = len(tf.config.list_physical_devices("GPU"))
    heeded = signal.getsignal(signal.SIGTERM)
    try:
        return MultiWorkerMirroredStrategy(num_replicas, "GPU" if gpus >= num_replicas else "CPU")
    finally:
        # TensorFlow's server takes SIGTERM for itself, and this process would never hear of it.
        signal.signal(signal.SIGTERM, heeded)


def tell_all(config: Config, own: T) -> list[T]:
    """What each worker says, which is JSON, by rank, in all of them; all have to call this as often."""
    exchange = Exchange(_strategy(config.num_replicas), here(config))
    told = exchange(own)
    _part(exchange)
    return [each.words for each in told]


def _part(exchange: Exchange) -> None:
    """Go on when all workers have what was told last: who ends sooner takes with it what another is still fetching.

    Whoever comes to this has it. So it does not matter if this does not reach one of them any more.
    """
    with suppress(*LOST):
        exchange(None)


def train(
    config: Config,
    training: Training,
    record: RunRecord,
    watcher: Watcher,
    stop: StopFlag,
    checkpoints: Checkpoints | None = None,
) -> None:
    """Train this worker's replicas, and fill `record` with what all workers' did."""
    with _without_others(here(config), record), turned_on(training):
        run = MultiWorker(config, training, record, watcher, stop, checkpoints)
        with calls_traced(run), run.told():
            run.run()
    record.mode_left = training.mode_left


@contextmanager
def _without_others(place: Place, record: RunRecord) -> Iterator[None]:
    """Tell that another worker is gone as just that: what it broke at, it says itself."""
    try:
        yield
    except LOST as error:
        if not place.launched:
            # Its own reason is the run's, not that this worker misses it.
            time.sleep(SECONDS_TO_BE_ENDED)
        told = str(error).strip().partition("\n")[0]
        message = f"another worker is gone, and its own verdict or log says why ({type(error).__name__}: {told})"
        raise RunBroken("crash", message, step=record.steps_done) from error


class MultiWorker(Mirrored):
    """This worker's replicas. What is said of replicas outside of a step is said of all workers' replicas."""

    def __init__(
        self,
        config: Config,
        training: Training,
        record: RunRecord,
        watcher: Watcher,
        stop: StopFlag,
        checkpoints: Checkpoints | None = None,
    ) -> None:
        self.place_here = here(config)
        self.exchange = Exchange(_strategy(config.num_replicas), self.place_here)
        super().__init__(config, training, record, watcher, stop, checkpoints)
        record.num_processes = self.place_here.size

    def hosted(self) -> range:
        return hosted(self.config)

    def make_strategy(self) -> tf.distribute.Strategy:
        return _strategy(self.config.num_replicas)

    @contextmanager
    def told(self) -> Iterator[None]:
        """As elsewhere; that another worker is gone is no replica's doing."""
        try:
            with super().told():
                yield
        except RunBroken as broken:
            if isinstance(broken.__cause__, LOST):
                raise broken.__cause__ from None
            raise

    def run(self) -> None:
        super().run()
        if self.training.audited:
            self._tell_settings()
        if self.checkpoints is not None:
            failed = [each.words for each in self.exchange(self.checkpoints.failed)]
            if not self.place_here.rank:
                self.checkpoints.note_others(failed)
        _part(self.exchange)

    def agree(self, seconds: float) -> tuple[float, bool]:
        """By the slowest worker; all are through when one is to stop."""
        told = [each.words for each in self.exchange([seconds, self.stop.is_set()])]
        if stopping := [rank for rank, (_, stops) in enumerate(told) if stops]:
            _part(self.exchange)
            raise RunBroken("interrupted", f"process {stopping[0]}: told to stop", step=self.record.steps_done)
        return max(took for took, _ in told), False

    def call(self, first: int, last: int, kept: Sequence[int], roles: Sequence[int] | None = None) -> list[Outcome]:
        before = {own: len(self.noted[own]) for own in self.own_ids}
        own_results = super().call(first, last, kept, roles)
        new = [self.noted[own][before[own] :] for own in self.own_ids]
        arrays = {
            f"{field}_{own}": part
            for own, result in zip(self.own_ids, own_results, strict=True)
            for field, part in result._asdict().items()
            if part is not None
        }
        results = []
        for rank, (noted, found) in enumerate(self.exchange(new, **arrays)):
            for at, own in enumerate(range(len(noted) * rank, len(noted) * (rank + 1))):
                results.append(Outcome(*(found.get(f"{name}_{own}") for name in Outcome._fields)))  # type: ignore[arg-type]
                if rank != self.place_here.rank:
                    self.noted[own] += [Noted(*each) for each in noted[at]]
        return results

    def copies(self) -> Floats:
        return np.concatenate([found["copies"] for _, found in self.exchange(None, copies=self.own_copies())])

    def kept(self, own: Floats) -> Floats:
        found: Floats = np.min([found["kept"] for _, found in self.exchange(None, kept=super().kept(own))], axis=0)
        return found

    def _next_stop(self, first: int, last: int) -> int:
        """As elsewhere, and no later than copies are to be compared."""
        every = self.config.audit.digest_every
        compared = (first // every + 1) * every if self.training.audited else last
        return min(compared, super()._next_stop(first, last))

    def _report(self, step: int) -> None:
        super()._report(step)
        if self.training.audited and step % self.config.audit.digest_every == 0 and step < self.config.train.steps:
            self._compare(step)

    def _compare(self, step: int) -> None:
        """Compare the workers' copies, by a digest of what each worker's own have."""
        kinds = copies.transacted(self.record)
        # Copies that are alike are one; those of a worker whose copies are not have a digest that no other has.
        own = {self.layout.values_of(copy, kinds=kinds).tobytes() for copy in self.own_copies()}
        digest = hashlib.blake2b(b"".join(sorted(own)), digest_size=8).hexdigest()
        found = tuple(each.words for each in self.exchange(digest))
        self.record.digests_compared += 1
        if len(set(found)) > 1:
            self.record.digests_off.append(Digests(step, found))

    def evaluate(self, step: int) -> None:
        if self.place_here.rank == 0:
            super().evaluate(step)

    def _tell_settings(self) -> None:
        """Put down which settings differed in the replicas of all workers."""
        own = [[asdict(each) for each in self.record.settings.get(own, [])] for own in self.own_ids]
        every = [found for told in self.exchange(own) for found in told.words]
        self.record.settings = {own: [Difference(**each) for each in found] for own, found in enumerate(every)}

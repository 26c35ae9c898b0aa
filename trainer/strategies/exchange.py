"""What the processes of `strategy=ddp` tell each other, over torch.distributed.

One all-reduce carries all of it: values, digests of the copies, and the losses of the steps since the last one, each
process filling in its own and leaving zeros elsewhere. What has gone wrong is told through the store by which they met,
where a process that is stuck can be asked too.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from trainer.audit.records import Average, Digests, RunRecord
from trainer.config import Config
from trainer.processes import MEETING, Place, here
from trainer.strategies.hosting import RunBroken

log = logging.getLogger(__name__)

FAILED = "failed"  # the store's key for what went wrong first
POLL = timedelta(seconds=0.1)
# For whoever broke a connection, or the process that started this one, to say what has happened.
PATIENCE_SECONDS = 1.0
WORDS = 4  # of 16 bits in a digest, each exact in float32
T = TypeVar("T")


class Lost(RuntimeError):
    """Another process is gone, or does not answer."""


class Group:
    """The processes of this run. Made once in a process, by the main thread.

    Attributes:
        device: where torch.distributed sums: each process's own GPU where there is one for each, else the CPU.
    """

    def __init__(self, config: Config) -> None:
        self.place = here(config)
        self.store = _meet(self.place)
        has_gpus = torch.cuda.is_available() and torch.cuda.device_count() >= self.place.local_size
        self.device = torch.device("cuda", self.place.local_rank) if has_gpus else torch.device("cpu")
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if has_gpus else "gloo",
            store=PrefixStore("group", self.store),
            rank=self.place.rank,
            world_size=self.place.size,
            # Beyond what the replicas are given, so that it is they who are told of.
            timeout=timedelta(seconds=config.watchdog.seconds + 60),
        )

    def gather(self, own: T) -> list[T] | None:
        """What each process has, by rank, in the first; None in the others."""
        found: list[T] | None = [own] * self.place.size if self.place.rank == 0 else None
        dist.gather_object(own, found)
        return found

    def tell_all(self, own: T) -> list[T]:
        """What each process has, by rank, in all of them."""
        found: list[T] = [own] * self.place.size
        dist.all_gather_object(found, own)
        return found

    def meet(self) -> None:
        """Wait until all processes are here."""
        dist.all_reduce(torch.zeros(1))

    def tell(self, broken: RunBroken) -> None:
        """Let the others know what has gone wrong here, unless they know of something already."""
        told = {"kind": broken.kind, "message": broken.message, "replica": broken.replica, "step": broken.step}
        self.store.compare_set(FAILED, "", json.dumps(told))

    def told(self) -> RunBroken | None:
        """What has gone wrong first in any process, if anything has."""
        if not self.store.check([FAILED]):
            return None
        found = json.loads(self.store.get(FAILED))
        return RunBroken(found["kind"], found["message"], found["replica"], found["step"])


def _meet(place: Place) -> Store:
    """The store by which processes find each other: the file of those that were started here, or the launcher's."""
    store: Store
    if MEETING in os.environ:
        store = dist.FileStore(os.environ[MEETING], place.size)  # type: ignore[attr-defined]
    else:
        store, _, _ = next(rendezvous("env://"))
    # The launcher's outlives the processes: what those left that failed must not reach the ones started after them.
    return PrefixStore(f"attempt_{place.restarts}", store)


def wait(work: dist.Work, ended: threading.Event) -> None:
    """Wait in pieces until something is done or has failed, or nobody needs it any more.

    Raises:
        BrokenBarrierError: `ended` was set first.
        RuntimeError: it failed.
    """
    while not work.is_completed():
        # A piece that is over raises what a failure raises; that it is done by then says nothing of how it ended.
        with suppress(RuntimeError):
            work.wait(POLL)
        if ended.is_set() and not work.is_completed():
            raise threading.BrokenBarrierError
    work.wait()


class Exchange:
    """The way to the other processes (`trainer/updates/between_processes.py`: `Sums`).

    Attributes:
        values: float32 [size], a view of what is sent.
        lost: why torch.distributed gave up, once it has.

    Args:
        hosted: the replicas of this process.
        length: of `values`.
        window: most steps whose losses are sent at a time.
        digest_every: steps between digests; 0 compares none.

    Thread-safety: one replica's thread at a time, while no other replica of the process writes its record; `abort` any.
    """

    def __init__(
        self, group: Group, record: RunRecord, hosted: Sequence[int], length: int, window: int, digest_every: int
    ) -> None:
        self._group, self._record, self._hosted = group, record, hosted
        self.size = group.place.size
        self._digest_every, self._next_digest = digest_every, 0
        self._shown = -1  # the step of the digest that is to be sent
        digests = self.size * WORDS
        self._payload = torch.zeros(length + digests + window * record.num_replicas)
        self._sent = self._payload.to(group.device)  # the payload itself on the CPU
        self.values = self._payload[:length]
        tail = self._payload[length:].numpy()
        self._digests = tail[:digests].reshape(self.size, WORDS)
        self._losses = tail[digests:].reshape(record.num_replicas, window)
        self._told_steps = 0
        self._ended = threading.Event()
        self.waits = False
        self.lost = ""

    def show(self, step: int, vector: torch.Tensor) -> None:
        if not self._digest_every or step < self._next_digest:
            return
        self._shown, self._next_digest = step, step + self._digest_every
        digest = hashlib.blake2b(vector.numpy().data, digest_size=2 * WORDS).digest()
        self._digests[:] = 0
        self._digests[self._group.place.rank] = np.frombuffer(digest, "<u2")

    def all_reduce(self) -> None:
        """Raises `Lost` where the others cannot be reached, `threading.BrokenBarrierError` once `abort` was called."""
        steps = self._put_losses()
        self.waits = True
        self._sum()
        self.waits = False
        self._take_losses(steps)
        self._compare()

    def measured(self, average: Average) -> None:
        self._record.averages.append(average)

    def abort(self) -> None:
        self._ended.set()

    @property
    def position(self) -> dict[str, int]:
        """Where this exchange is, for a checkpoint at a step's end; the same in all processes."""
        return {"told_steps": self._told_steps, "next_digest": self._next_digest, "shown": self._shown}

    def go_on(self, position: Mapping[str, int], vector: torch.Tensor) -> None:
        """Be where another run's exchange was.

        Args:
            vector: the copy as it was then. A digest of it may have been about to be sent.
        """
        self._told_steps, self._next_digest = position["told_steps"], position["next_digest"]
        if self._digest_every and position["shown"] >= 0:
            self._next_digest = position["shown"]
            self.show(position["shown"], vector)

    def _sum(self) -> None:
        """Sum the payload. Waits in pieces, so that a thread whose run is over does not stay with a process that is."""
        if self._sent is not self._payload:
            self._sent.copy_(self._payload)
        try:
            wait(dist.all_reduce(self._sent, async_op=True), self._ended)
        except threading.BrokenBarrierError:
            raise
        except RuntimeError as error:
            if self._ended.is_set():
                raise threading.BrokenBarrierError from error
            raise self._gone(error) from error
        if self._sent is not self._payload:
            self._payload.copy_(self._sent)

    def _gone(self, error: RuntimeError) -> Lost:
        # Without the place in its source that gloo puts before what it has to say, and the advice after it.
        self.lost = re.sub(r"^\[[^]]*\] ", "", str(error).splitlines()[0]).partition(". ")[0]
        return Lost(self.lost)

    def _put_losses(self) -> slice:
        """Put down the losses of this process's replicas since the last time; the same steps in all processes."""
        records = self._record.replicas
        steps = slice(self._told_steps, min(records[own].steps_done for own in self._hosted))
        self._losses[:] = 0
        for own in self._hosted:
            self._losses[own, : steps.stop - steps.start] = records[own].losses[steps]
        return steps

    def _take_losses(self, steps: slice) -> None:
        """Note the other processes' losses, so that the run can be watched in each of them."""
        self._told_steps = steps.stop
        for own, record in enumerate(self._record.replicas):
            if own not in self._hosted:
                record.losses[steps] = self._losses[own, : steps.stop - steps.start]
                record.steps_done = steps.stop

    def _compare(self) -> None:
        if self._shown < 0:
            return
        step, self._shown = self._shown, -1
        self._record.digests_compared += 1
        if (self._digests != self._digests[0]).any():
            found = tuple(words.astype("<u2").tobytes().hex() for words in self._digests)
            self._record.digests_off.append(Digests(step, found))
            log.warning("before step %d the processes' copies have digests %s", step, ", ".join(found))
        self._digests[:] = 0

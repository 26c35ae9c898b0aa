"""A user's own multi-threaded PyTorch loop, under the audit.

The loop keeps its threads' body, its data and its locks. It gives up two things: its module, of which every thread has
a copy whose parameters are that thread's snapshot of the shared vector; and its optimizer's step, which becomes one
call on the shared vector. That is where shared state is read and written, so that is where the audit stands.

    class Loop:                                       # workload._target_=my_loop.Loop
        def __init__(self, num_replicas, seed):
            self.module = torch.nn.Sequential(...)    # as before
            self.lock = threading.Lock()              # as before

        def run(self, replica, steps):                # the body of one thread
            for step in range(steps):
                with self.lock:
                    replica.read()                    # before: nothing, the module was shared
                loss = loss_of(replica.module, ...)   # before: self.module
                loss.backward()
                with self.lock:
                    replica.add(loss)                 # before: optimizer.step()
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from trainer.audit.recorder import Recorder
from trainer.audit.records import Noted, RunRecord
from trainer.audit.row import Row
from trainer.bring import bring
from trainer.config import Config, ConfigError
from trainer.schedule.attributes import announced
from trainer.schedule.locks import known_to_the_schedule, modelled
from trainer.schedule.operations import BEGIN, COMPUTE
from trainer.schedule.order import Order
from trainer.schedule.point import mark
from trainer.state import layout as layouts
from trainer.state.layout import Layout
from trainer.strategies.controlled_threads import state_of, turnstile, watch
from trainer.strategies.hosting import RunBroken, StopFlag, Watcher
from trainer.strategies.replica_threads import ReplicaThreads
from trainer.strategies.traced_threads import traced, watch_loop
from trainer.updates import optimizers
from trainer.updates.shared_vector import Replica, SharedVector


class Loop(Protocol):
    """What a user brings: built with `num_replicas`, `seed` and `workload.arguments`. It may also have `abort()`, which
    is to wake threads that wait for each other when the run has to end."""

    module: torch.nn.Module

    def run(self, replica: LoopReplica, steps: int) -> None:
        """The body of one thread: `steps` updates."""


class LoopReplica:
    """One thread's end of the shared variables.

    Attributes:
        module: this thread's copy; parameters and float32 buffers are its snapshot.

    Thread-safety: its own thread only. `read`, `add` and `replace` lock nothing: that is the loop's part.
    """

    def __init__(
        self, replica_id: int, module: torch.nn.Module, shared: SharedVector, recorder: Recorder, ended: threading.Event
    ) -> None:
        self.replica_id = replica_id
        self.module = module
        self._shared, self._recorder, self._ended = shared, recorder, ended
        self._row = _row(shared.layout)
        self.workspace = shared.replica(replica_id, whole=True)
        self._statistics = shared.layout.regions["statistics"]
        self._statistics_read = torch.empty(0)
        self._read_canaries = torch.from_numpy(shared.layout.read_canaries.reshape(-1))
        self._own = torch.from_numpy(shared.layout.own_canaries(replica_id))
        self._parameters = list(module.parameters())
        self._begun = False
        _become(module, shared.layout, self.workspace.snapshot)
        self._note_read()  # the initial values: it is made before there are threads

    def read(self) -> None:
        """Copy the shared variables into this thread's module.

        Raises:
            threading.BrokenBarrierError: the run has to end; let it through.
        """
        if self._ended.is_set():
            raise threading.BrokenBarrierError
        self._begin()
        with torch.no_grad():
            self._shared.copy_to(self.workspace)
            self._note_read()

    def _note_read(self) -> None:
        self._statistics_read = self.workspace.snapshot[self._statistics].clone()
        self._canaries = self.workspace.snapshot.index_select(0, self._read_canaries)

    def add(self, loss: Tensor) -> None:
        """Apply the module's gradients to the current shared values, in place."""
        with torch.no_grad():
            self._contribute()
            self._shared.add(self.workspace, self._shared.delta(self.workspace, base=self._shared.vector))
            self._note(loss)

    def replace(self, loss: Tensor) -> None:
        """Apply the module's gradients to what was read, and put the result in place of the shared values."""
        with torch.no_grad():
            self._contribute()
            read = self.workspace.snapshot.clone()
            read[self._statistics] = self._statistics_read
            self._shared.replace(self.workspace, read + self._shared.delta(self.workspace, base=read))
            self._note(loss)

    def _begin(self) -> None:
        """A step is from the first read after an update to the next update."""
        if not self._begun:
            self._begun = True
            mark(BEGIN)

    def _contribute(self) -> None:
        """Gather gradients and changes of statistics, and clear the gradients."""
        self._begin()
        mark(COMPUTE)
        contribution = self._own.clone()
        for segment, parameter in zip(self._shared.layout.of_kind("weight"), self._parameters, strict=True):
            if parameter.grad is not None:
                contribution[segment.span] = parameter.grad.reshape(-1)
                parameter.grad = None
        # Canaries have not changed in the snapshot, so they stay as they are.
        contribution[self._statistics] += self.workspace.snapshot[self._statistics] - self._statistics_read
        self.workspace.contribution = contribution

    def _note(self, loss: Tensor) -> None:
        self._begun = False
        row = np.full(self._row.canaries.stop, -1, np.float32)
        row[0], row[self._row.canaries] = loss.item(), self._canaries.numpy()
        self._recorder.note(row, Noted(self.workspace.version, self.workspace.staleness, -1, 0, 0, 0))


def train(config: Config, record: RunRecord, watcher: Watcher, stop: StopFlag) -> None:
    """Run the loop that `workload._target_` names in a thread for each replica, and fill `record`.

    Raises:
        ConfigError: what it names is no such loop.
        RunBroken: a thread raised, stalled, or made another number of updates than `train.steps`.
    """
    build = partial(LoopThreads, config, record, bring("workload", config.workload))
    if config.audit.trace_steps:
        steps = config.audit.trace_steps
        traced(record, steps, build, watch_loop, lambda threads: threads.run(watcher, stop))
    else:
        build().run(watcher, stop)


class LoopCase:
    """The loop, made anew for each order (`trainer/schedule/case.py`)."""

    joint = copies = False

    def __init__(self, config: Config) -> None:
        self.num_replicas = config.num_replicas
        self._config = config
        # Its module may make locks, and take what makes them from `threading` by name.
        with modelled("module's "), known_to_the_schedule():
            kind = bring("workload", config.workload)
        self._kind = announced(kind) if isinstance(kind, type) else kind

    def run(self, order: Order, record: RunRecord) -> None:
        config = self._config
        with modelled(), known_to_the_schedule():
            threads = LoopThreads(config, record, self._kind, lambda shared: watch(shared, config, joint=False))
            order.state = state_of(threads.shared, threads.loop, threads.workspaces)
            bodies = [partial(threads.replica, own) for own in range(self.num_replicas)]
            turnstile(order, config).run(bodies)
        threads.finish()


class LoopThreads:
    """The loop, built once, over one shared vector.

    Args:
        kind: the loop's class, or whatever makes one.
        watch: called with the shared vector before anybody else has it.
    """

    def __init__(
        self,
        config: Config,
        record: RunRecord,
        kind: Callable[..., Loop],
        watch: Callable[[SharedVector], None] = lambda shared: None,
    ) -> None:
        self._config, self._record = config, record
        self._key = f"workload._target_={config.workload._target_}"
        self.loop = kind(num_replicas=config.num_replicas, seed=config.train.seed, **config.workload.arguments)
        if not isinstance(getattr(self.loop, "module", None), torch.nn.Module) or not callable(
            getattr(self.loop, "run", None)
        ):
            raise ConfigError(f"{self._key} must have `module`, a torch.nn.Module, and `run(replica, steps)`.")
        self.shared = _shared(config, self.loop.module)
        self.ended = threading.Event()
        record.layout, record.initial = self.shared.layout, self.shared.plain.numpy().copy()
        record.engine = "the loop's own"
        watch(self.shared)
        # Here and not in their threads, where what one copies at first another might be writing already.
        self._recorders = [Recorder(each, _row(self.shared.layout), self.shared.layout) for each in record.replicas]
        self._replicas = [
            LoopReplica(own, copy.deepcopy(self.loop.module), self.shared, recorder, self.ended)
            for own, recorder in enumerate(self._recorders)
        ]

    @property
    def workspaces(self) -> list[Replica]:
        return [replica.workspace for replica in self._replicas]

    def run(self, watcher: Watcher, stop: StopFlag) -> None:
        """Run the threads freely."""
        record, shared = self._record, self.shared

        def report() -> None:
            watcher.progress(record)
            kept = shared.layout.kept(shared.plain.numpy())
            watcher.kept(record.steps_done, float(kept.sum()), sum(shared.commits))

        threads = ReplicaThreads(
            record,
            self.replica,
            self.ended,
            abort=getattr(self.loop, "abort", lambda: None),
            report=report,
            stop=stop,
            stall_seconds=self._config.watchdog.seconds,
        )
        threads.run()
        record.duration_seconds = threads.seconds
        if stop.is_set():
            record.copies = shared.plain.numpy()[np.newaxis].copy()
        else:
            self.finish()

    def replica(self, own: int) -> None:
        """The body of one thread."""
        try:
            self.loop.run(self._replicas[own], self._config.train.steps)
        finally:
            self._recorders[own].flush()

    def finish(self) -> None:
        """Put down what the threads have left.

        Raises:
            RunBroken: one made another number of updates than it was to.
        """
        self._record.copies = self.shared.plain.numpy()[np.newaxis].copy()
        steps = self._config.train.steps
        for replica in self._record.replicas:
            if replica.steps_done != steps:
                made = f"replica {replica.replica_id} made {replica.steps_done} updates"
                raise RunBroken("crash", f"{self._key}: {made}, train.steps={steps}.", replica.replica_id)


def _row(layout: Layout) -> Row:
    """A row of loss and canaries: logits, samples and random numbers are the loop's own affair."""
    return Row(0, 0, layout.read_canaries.size)


def _shared(config: Config, module: torch.nn.Module) -> SharedVector:
    """The module's parameters and float32 buffers as one shared vector."""
    rule = optimizers.build(config.optimizer)
    parameters, statistics = list(module.named_parameters()), _statistics(module)
    layout = layouts.plan(
        [(name, tuple(parameter.shape)) for name, parameter in parameters],
        [(name, tuple(buffer.shape)) for name, buffer in statistics],
        rule.slots,
        counter=rule.counts,
        num_replicas=config.num_replicas,
    )
    values = [tensor.detach().numpy() for _, tensor in (*parameters, *statistics)]
    return SharedVector(layout.pack(values), layout, rule)


def _statistics(module: torch.nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, buffer) for name, buffer in module.named_buffers() if buffer.dtype == torch.float32]


def _become(module: torch.nn.Module, layout: Layout, snapshot: Tensor) -> None:
    """Make parameters and statistics views of the snapshot, so that a copy into it is a copy into the module."""
    tensors = [*module.parameters(), *(buffer for _, buffer in _statistics(module))]
    for segment, tensor in zip(layout.read_segments, tensors, strict=True):
        tensor.data = snapshot[segment.span].view(segment.shape)

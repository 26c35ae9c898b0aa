"""The loop of `train.engine=native` as Python sees it: what it is told, and calls that give up the GIL.

The loop itself is loop.cpp. One call takes many of a replica's steps: batch, snapshot, compiled step, update.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.audit import spans
from trainer.audit.records import Floats
from trainer.state.layout import Layout, Share
from trainer.updates.optimizers import Adam, Momentum, Optimizer, Sgd

# As `Mode`, `Doing`, `Kind` and `Status` in the C++ files have them.
MODES = (
    "all_reduce",
    "serialized",
    "locked",
    "reader_writer",
    "optimistic",
    "per_variable_lock",
    "lock_free",
    "slots_unlocked",
    "write_locked",
    "overwrite",
)
KINDS = (
    *(spans.STEP, spans.DATA, spans.COMPUTE, spans.LOCK_WAIT, spans.CRITICAL_SECTION, spans.BARRIER_WAIT),
    *(spans.READ, spans.WRITE, spans.UPDATE, spans.LOGGING),
)
WEIGHT_CANARIES, WEIGHT_VALUES, STATISTIC_CANARIES, STATISTIC_VALUES, COUNTER = range(5)
DONE, STOPPED, FAILED = range(3)

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Update:
    """How the shared vector is updated.

    Attributes:
        mode: one of `MODES`.
        scale, statistics_scale: what a joint update's sums of gradients and of statistics are multiplied by.
        joint: whether all replicas update together.
        whole_snapshot: whether a snapshot has all of the vector.
        in_place: whether a step reads the vector itself, as nobody writes meanwhile.
    """

    mode: str
    scale: float = 1.0
    statistics_scale: float = 1.0

    @property
    def joint(self) -> bool:
        return self.mode == "all_reduce"

    @property
    def whole_snapshot(self) -> bool:
        return self.mode in ("slots_unlocked", "write_locked", "overwrite")

    @property
    def in_place(self) -> bool:
        return self.mode in ("all_reduce", "serialized")


@dataclass
class Taken:
    """What some steps of a replica have left.

    Attributes:
        rows: float32 [steps, row].
        notes: int64 [steps, 2], version and staleness of each.
        spans: int64 [spans, 4], as many as there was room for: step, index in `KINDS`, and from when to when, in
            nanoseconds of `time.perf_counter_ns`.
        snapshots: float32 [kept, read_size], what the gradients of the steps that are kept were computed from.
        contributions: as `snapshots`, what they came to.
        totals: as `snapshots`, the sums of all replicas' contributions; empty where they do not update together.
    """

    rows: Floats
    notes: Integers
    spans: Integers
    snapshots: Floats
    contributions: Floats
    totals: Floats


class LoopFailed(RuntimeError):
    """A replica's compiled step failed, with this status of `library_call` (library_calls.cpp)."""

    def __init__(self, status: int) -> None:
        super().__init__(f"the compiled step failed with status {status}")
        self.status = status


class NativeLoop:
    """The native loop of one run.

    Args:
        loaded: loop.cpp, compiled.
        vector: float32 [layout.size], the shared vector; written in place.
        keeps: whether steps are ever kept.
        spins: whether every replica has a core, so that who waits at the barrier may do so awake for a while.

    Thread-safety: built by the main thread; then each replica calls `join` once and `run` for itself, and anybody
    calls `stop`. It must outlive the threads that are in it.
    """

    def __init__(
        self,
        loaded: ctypes.CDLL,
        layout: Layout,
        optimizer: Optimizer,
        update: Update,
        vector: Floats,
        *,
        batch_size: int,
        row_size: int,
        keeps: bool,
        spins: bool,
    ) -> None:
        self._loaded = loaded
        self._layout, self._row_size = layout, row_size
        self._joint = update.joint and keeps
        total = np.zeros(layout.read_size if self._joint else 0, np.float32)
        shares = [*layout.shares(layout.num_replicas), *layout.shares(1)]
        pieces, cuts = _cut([_pieces(layout, share) for share in shares], layout, counted=len(shares) - 1)
        variables = [_pieces(layout, share) for share in layout.variables()]
        if optimizer.counts:
            variables.append([])
        of_variables, variable_cuts = _cut(variables, layout, counted=len(layout.variables()))
        # The task has no more than their addresses.
        self._arrays = (vector, total, pieces, cuts, of_variables, variable_cuts)
        task = _Task(
            mode=MODES.index(update.mode),
            num_replicas=layout.num_replicas,
            read_size=layout.read_size,
            snapshot_size=layout.size if update.whole_snapshot else layout.read_size,
            batch_size=batch_size,
            row_size=row_size,
            spins=spins,
            scale=update.scale,
            statistics_scale=update.statistics_scale,
            vector=_address(vector),
            total=_address(total) if self._joint else None,
            pieces=_address(pieces),
            shares=_address(cuts),
            num_variables=len(variables),
            variable_pieces=_address(of_variables),
            variables=_address(variable_cuts),
            optimizer=_optimizer(layout, optimizer),
        )
        create = loaded.loop_create
        create.restype, create.argtypes = ctypes.c_void_p, (ctypes.c_void_p,)
        self._loop = ctypes.c_void_p(create(ctypes.addressof(task)))
        self._run = loaded.loop_run
        self._run.restype = ctypes.c_int64
        loaded.loop_commits.restype = ctypes.c_int64
        # Not at the end of the process: a thread that did not end may still be in it.
        weakref.finalize(self, loaded.loop_delete, self._loop).atexit = False

    def join(
        self, own: int, run: int, frame: Any, samples: Integers, number: Integers, snapshot: Floats | None
    ) -> None:
        """Say what a replica calls its compiled step with.

        Args:
            run, frame: of the step bound to its inputs (`Bound` of library_calls.py).
            samples: int64 [batch_size], the input in which the step finds its batch; number: int64 [1], its number.
            snapshot: float32, what the step reads, filled before each; None where it reads the vector itself.
        """
        arrays = [_address(each) if each is not None else None for each in (samples, number, snapshot)]
        self._loaded.loop_join(
            self._loop, ctypes.c_int64(own), ctypes.c_void_p(run), frame, *map(ctypes.c_void_p, arrays)
        )

    def run(
        self,
        own: int,
        first: int,
        samples: Integers,
        *,
        kept: Sequence[int] = (),
        num_spans: int = 0,
    ) -> Taken:
        """Take steps `first` and on, one for each row of `samples`, int64 [steps, batch_size]; fewer once stopped.

        Args:
            kept: numbers of steps of which vectors are wanted, upwards. Replicas that update together keep the same.
            num_spans: how many there is to be room for, of what the replica did when.

        Raises:
            LoopFailed: the compiled step failed; all replicas are to be stopped.
        """
        steps, read_size = len(samples), self._layout.read_size
        rows, notes = np.empty((steps, self._row_size), np.float32), np.empty((steps, 2), np.int64)
        told = np.empty((num_spans, 4), np.int64)
        wanted = np.array(kept, np.int64)
        snapshots, contributions = (np.empty((len(kept), read_size), np.float32) for _ in range(2))
        totals = np.empty_like(snapshots if self._joint else snapshots[:0])
        chunk = _Chunk(
            first=first,
            num_steps=steps,
            samples=_address(samples),
            rows=_address(rows),
            notes=_address(notes),
            spans=_address(told),
            spans_left=num_spans,
            kept_steps=_address(wanted),
            num_kept=len(wanted),
            snapshots=_address(snapshots),
            contributions=_address(contributions),
            totals=_address(totals) if self._joint else None,
        )
        status = self._run(self._loop, ctypes.c_int64(own), ctypes.byref(chunk))
        if status == FAILED:
            raise LoopFailed(chunk.step_status)
        done = slice(0, chunk.done)
        return Taken(rows[done], notes[done], told[: num_spans - chunk.spans_left], snapshots, contributions, totals)

    def stop(self) -> None:
        """Have every replica end before its next step, or at the barrier where it waits."""
        self._loaded.loop_stop(self._loop)

    def commits(self) -> list[int]:
        """Updates committed by each replica."""
        return [self._loaded.loop_commits(self._loop, ctypes.c_int64(own)) for own in range(self._layout.num_replicas)]


class _Optimizer(ctypes.Structure):
    """As `Optimizer` in sweep.h has it."""

    _fields_ = (
        ("rule", ctypes.c_int64),
        ("num_slots", ctypes.c_int64),
        ("slot_offsets", ctypes.c_int64 * 2),
        ("counter", ctypes.c_int64),
        ("counter_canaries", ctypes.c_int64 * 2),
        ("first_canaries", ctypes.c_int64 * 2),
        ("num_canaries", ctypes.c_int64),
        ("parameters", ctypes.c_float * 6),
    )


class _Task(ctypes.Structure):
    """As `Task` in loop.cpp has it."""

    _fields_ = (
        ("mode", ctypes.c_int64),
        ("num_replicas", ctypes.c_int64),
        ("read_size", ctypes.c_int64),
        ("snapshot_size", ctypes.c_int64),
        ("batch_size", ctypes.c_int64),
        ("row_size", ctypes.c_int64),
        ("spins", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("statistics_scale", ctypes.c_float),
        ("vector", ctypes.c_void_p),
        ("total", ctypes.c_void_p),
        ("pieces", ctypes.c_void_p),
        ("shares", ctypes.c_void_p),
        ("num_variables", ctypes.c_int64),
        ("variable_pieces", ctypes.c_void_p),
        ("variables", ctypes.c_void_p),
        ("optimizer", _Optimizer),
    )


class _Chunk(ctypes.Structure):
    """As `Chunk` in loop.cpp has it."""

    _fields_ = (
        ("first", ctypes.c_int64),
        ("num_steps", ctypes.c_int64),
        ("samples", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
        ("notes", ctypes.c_void_p),
        ("spans", ctypes.c_void_p),
        ("spans_left", ctypes.c_int64),
        ("kept_steps", ctypes.c_void_p),
        ("num_kept", ctypes.c_int64),
        ("snapshots", ctypes.c_void_p),
        ("contributions", ctypes.c_void_p),
        ("totals", ctypes.c_void_p),
        ("done", ctypes.c_int64),
        ("step_status", ctypes.c_int64),
    )


def _optimizer(layout: Layout, optimizer: Optimizer) -> _Optimizer:
    match optimizer:
        case Sgd():
            rule, parameters = 0, [-optimizer.learning_rate]
        case Momentum():
            rule, parameters = 1, [optimizer.momentum, optimizer.learning_rate]
        case Adam(rate, beta_1, beta_2, epsilon):
            rule, parameters = 2, [rate, beta_1, beta_2, 1.0 - beta_1, 1.0 - beta_2, epsilon]
        case _:
            raise TypeError(f"the native loop has no rule for {type(optimizer).__name__}")
    offsets = [layout.regions[name].start - layout.regions["weights"].start for name in layout.slots]
    first = layout.of_kind("weight")[0]
    found = _Optimizer(
        rule=rule, num_slots=len(offsets), counter=-1, num_canaries=layout.num_replicas, parameters=tuple(parameters)
    )
    found.slot_offsets[: len(offsets)] = offsets
    found.first_canaries[:] = [first.start, first.tail]
    for counter in layout.of_kind("counter"):
        found.counter = counter.values
        found.counter_canaries[:] = [counter.start, counter.tail]
    return found


def _pieces(layout: Layout, share: Share) -> list[tuple[int, int, int]]:
    """A share's runs of weights and statistics, cut where canaries end and values begin: kind, start, stop."""
    found = []
    for kind, canaries, values, span in (
        ("weight", WEIGHT_CANARIES, WEIGHT_VALUES, share.weights),
        ("statistic", STATISTIC_CANARIES, STATISTIC_VALUES, share.statistics),
    ):
        for segment in layout.of_kind(kind):
            ends = (segment.start, segment.values, segment.values + segment.size, segment.end)
            for piece, start, stop in zip((canaries, values, canaries), ends, ends[1:], strict=False):
                start, stop = max(start, span.start), min(stop, span.stop)
                if start < stop:
                    found.append((piece, start, stop))
    return found


def _cut(parts: Sequence[list[tuple[int, int, int]]], layout: Layout, *, counted: int) -> tuple[Integers, Integers]:
    """All parts' pieces, int64 [pieces, 3], and where each part begins and ends; `counted` has the counter, too."""
    counters = [(COUNTER, each.start, each.end) for each in layout.of_kind("counter")]
    whole = [[*part, *(counters if index == counted else [])] for index, part in enumerate(parts)]
    pieces = np.array([piece for part in whole for piece in part], np.int64).reshape(-1, 3)
    return pieces, np.cumsum([0, *map(len, whole)]).astype(np.int64)


def _address(array: NDArray[Any]) -> int:
    return int(array.ctypes.data)

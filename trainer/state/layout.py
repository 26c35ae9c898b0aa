"""Where each shared variable lives in the flat vector, and where its canaries stand. NumPy only.

All shared variables of a copy are one float32 vector, in five regions:

    [ weights | statistics | loss scale | optimizer slots, one region shaped like the weights for each | counters ]

The first three are what a step reads, so a snapshot for reading is a prefix. Each variable's segment is

    [ head: a canary per replica, padding | values, padding | tail: a canary per replica, padding ]

with every part padded to 64 bytes, so that no two parts share a cache line. A replica's update raises its own canary by
exactly 1 at both ends of every segment, in the very write that applies its delta: at the end the canaries say how many
of its updates each variable kept; in a snapshot they say which versions were read. They are exact at the canaries and a
sample of the values between them: a kernel can tear in the middle and leave both ends whole.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

NOT_SLOTS = ("weights", "statistics", "loss_scale", "counter")
CACHE_LINE = 16  # float32 values in 64 bytes


def _padded(size: int) -> int:
    return -(-size // CACHE_LINE) * CACHE_LINE


@dataclass(frozen=True)
class Segment:
    """One shared variable: `start` is its first element, values run from `values` to `values + size`."""

    name: str
    kind: str  # weight, statistic, loss_scale, slot or counter
    shape: tuple[int, ...]
    start: int
    values: int
    size: int
    tail: int
    end: int

    @property
    def span(self) -> slice:
        return slice(self.values, self.values + self.size)


@dataclass(frozen=True)
class Share:
    """A part of the flat vector that is updated by itself: a run of weights, the same run of each slot, statistics."""

    weights: slice
    slots: tuple[slice, ...]
    statistics: slice

    @property
    def spans(self) -> tuple[slice, ...]:
        return (self.weights, self.statistics, *self.slots)


def _cut(size: int, part: int, count: int) -> tuple[int, int]:
    lines = size // CACHE_LINE
    return lines * part // count * CACHE_LINE, lines * (part + 1) // count * CACHE_LINE


@dataclass(frozen=True)
class Layout:
    """The map of one copy's flat vector.

    Attributes:
        regions: weights, statistics, loss_scale (empty where there is none), each slot's name, and `counter` where
            there is one.
        apart: the kinds of segments that replicas write by themselves, outside of the update mode's transaction.

    Thread-safety: immutable.
    """

    segments: tuple[Segment, ...]
    num_replicas: int
    regions: Mapping[str, slice]
    apart: frozenset[str] = frozenset()

    @property
    def size(self) -> int:
        return self.segments[-1].end if self.segments else 0

    @property
    def read_size(self) -> int:
        """Length of the prefix that a step reads: weights, statistics and loss scale."""
        return int(self.regions["loss_scale"].stop)

    @property
    def loss_scale(self) -> slice | None:
        """Where `[scale, good]` stand (`trainer/state/loss_scale.py`), if there is one."""
        found = self.of_kind("loss_scale")
        return found[0].span if found else None

    @cached_property
    def transacted(self) -> NDArray[np.bool_]:
        """Which segments the update mode writes, and answers for: bool [segments]."""
        return np.array([segment.kind not in self.apart for segment in self.segments], np.bool_)

    @property
    def slots(self) -> tuple[str, ...]:
        return tuple(name for name in self.regions if name not in NOT_SLOTS)

    def of_kind(self, kind: str) -> tuple[Segment, ...]:
        return tuple(segment for segment in self.segments if segment.kind == kind)

    @cached_property
    def read_segments(self) -> tuple[Segment, ...]:
        return tuple(segment for segment in self.segments if segment.end <= self.read_size)

    @cached_property
    def canaries(self) -> NDArray[np.int64]:
        """Index of every canary: int64 [segments, 2 (head, tail), num_replicas]."""
        slots = np.arange(self.num_replicas)
        return np.stack([[segment.start + slots, segment.tail + slots] for segment in self.segments])

    @cached_property
    def read_canaries(self) -> NDArray[np.int64]:
        """The canaries of the read prefix: int64 [read segments, 2, num_replicas]."""
        return self.canaries[: len(self.read_segments)]

    @cached_property
    def canary_sources(self) -> NDArray[np.int64]:
        """For every canary, the index in a contribution of the canary that it is raised by; shaped as `canaries`.

        A contribution covers what a step reads. A slot's canaries follow those of its weight, the counter's those
        of the first weight: one update touches all of them together.
        """
        rows = [self._source(segment) for segment in self.segments]
        sources: NDArray[np.int64] = self.canaries[rows]
        return sources

    def _source(self, segment: Segment) -> int:
        """Row in `canaries` of the segment that a contribution has, with which a segment's update comes."""
        if segment.end <= self.read_size:
            return self.segments.index(segment)
        if segment.kind == "counter":
            return 0
        return (self.segments.index(segment) - len(self.read_segments)) % len(self.of_kind("weight"))

    def own_canaries(self, replica_id: int) -> Floats:
        """A contribution of nothing but a replica's own canaries, each 1: float32 [read_size]."""
        vector = np.zeros(self.read_size, np.float32)
        vector[self.read_canaries[:, :, replica_id].reshape(-1)] = 1
        return vector

    @cached_property
    def is_value(self) -> NDArray[np.bool_]:
        """Which elements are values, not canaries or padding: bool [size]."""
        mask = np.zeros(self.size, np.bool_)
        for segment in self.segments:
            mask[segment.span] = True
        return mask

    def values_of(self, vector: Floats, kinds: Sequence[str] = ("weight", "statistic")) -> Floats:
        """The values of the segments of these kinds, end to end, without canaries and padding."""
        return np.concatenate(
            [vector[segment.span] for segment in self.segments if segment.kind in kinds and segment.end <= len(vector)]
        )

    def pack(self, values: Sequence[NDArray[np.generic]]) -> Floats:
        """A copy's initial vector: weights then statistics as given, slots, counters and canaries zero."""
        vector = np.zeros(self.size, np.float32)
        for segment, value in zip(self.read_segments, values, strict=True):
            vector[segment.span] = np.asarray(value, np.float32).reshape(-1)
        return vector

    def digest(self, vector: Floats) -> str:
        """SHA-256 of weights and statistics as little-endian float32, in order, canaries and padding left out."""
        return hashlib.sha256(self.values_of(vector).astype("<f4").tobytes()).hexdigest()

    def kept(self, vector: Floats) -> Floats:
        """Per replica, how many of its updates all transacted segments of this copy kept: float32 [num_replicas]."""
        found: Floats = vector[self.canaries[self.transacted]].min(axis=(0, 1))
        return found

    @property
    def nothing(self) -> Share:
        """The empty share."""
        return Share(slice(0, 0), (slice(0, 0),) * len(self.slots), slice(0, 0))

    def variables(self) -> list[Share]:
        """One share for each weight, with the same weight's slots, and one for each statistic.

        None for the loss scale, which is one of `SharedVector.variables` of its own.
        """
        start = self.regions["weights"].start
        shares = []
        for segment in (*self.of_kind("weight"), *self.of_kind("statistic")):
            span = slice(segment.start, segment.end)
            if segment.kind == "statistic":
                shares.append(replace(self.nothing, statistics=span))
            else:
                firsts = [self.regions[name].start - start for name in self.slots]
                slots = tuple(slice(span.start + first, span.stop + first) for first in firsts)
                shares.append(replace(self.nothing, weights=span, slots=slots))
        return shares

    def shares(self, count: int) -> list[Share]:
        """Cut weights, each slot and statistics into `count` runs of cache lines, one of each a share.

        Counter and loss scale belong to no share: they change for all of them at once.
        """
        weights, statistics = self.regions["weights"], self.regions["statistics"]
        shares = []
        for part in range(count):
            lo, hi = _cut(weights.stop - weights.start, part, count)
            slots = tuple(slice(self.regions[name].start + lo, self.regions[name].start + hi) for name in self.slots)
            first, last = _cut(statistics.stop - statistics.start, part, count)
            shares.append(
                Share(
                    slice(weights.start + lo, weights.start + hi),
                    slots,
                    slice(statistics.start + first, statistics.start + last),
                )
            )
        return shares


def plan(
    weights: Sequence[tuple[str, tuple[int, ...]]],
    statistics: Sequence[tuple[str, tuple[int, ...]]],
    slots: Sequence[str],
    *,
    counter: bool,
    num_replicas: int,
    loss_scale: bool = False,
    apart: frozenset[str] = frozenset(),
) -> Layout:
    """Lay out named weights and statistics, and for each slot name a region shaped like the weights'."""
    segments: list[Segment] = []
    regions: dict[str, slice] = {}

    def region(name: str, kind: str, variables: Sequence[tuple[str, tuple[int, ...]]]) -> None:
        first = segments[-1].end if segments else 0
        for variable, shape in variables:
            start = segments[-1].end if segments else 0
            values = start + _padded(num_replicas)
            size = int(np.prod(shape, dtype=np.int64))
            tail = values + _padded(size)
            segments.append(Segment(variable, kind, shape, start, values, size, tail, tail + _padded(num_replicas)))
        regions[name] = slice(first, segments[-1].end if segments else 0)

    region("weights", "weight", weights)
    region("statistics", "statistic", statistics)
    region("loss_scale", "loss_scale", [("loss_scale", (2,))] if loss_scale else [])
    for slot in slots:
        region(slot, "slot", [(f"{name}.{slot}", shape) for name, shape in weights])
    if counter:
        region("counter", "counter", [("iterations", (1,))])
    return Layout(tuple(segments), num_replicas, regions, apart)


# The layout of no variables, before there is a model.
EMPTY = plan([], [], (), counter=False, num_replicas=1)

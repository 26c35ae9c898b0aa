"""What a run leaves for the audit and the reports: arrays and plain records, never framework objects.

Every `ReplicaRecord` is written by its own replica only and may be read by others at any time: losses below
`steps_done`, and the audit's columns, which are read off in blocks and so lag behind, below `computed.total()`. The
writer raises each after the rows are complete.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from trainer.state.layout import Layout

Floats = NDArray[np.float32]

WHOLE, FRACTURED, TORN_TENSOR = 0, 1, 2


@dataclass
class ReplicaRecord:
    """One replica's run, a row a step.

    Attributes:
        losses: float32 [steps], mean loss over the replica's batch, before the update.
        read_version: int64 [steps], updates that all replicas had committed when the snapshot was taken; -1 where not
            recorded. Under mirrored read off float32 counts, so exact below 2**24.
        staleness: int32 [steps], updates that were committed between the snapshot and the write; -1 where not recorded.
        read_state: uint8 [steps], WHOLE, FRACTURED (variables of different versions) or TORN_TENSOR (one variable of
            two versions).
        versions: float32 [steps, num_replicas], the least count in each canary slot of the snapshot: how many updates
            of each replica the gradient was computed from.
        torn_witness: canaries, float32 [read segments, 2, num_replicas], of the first snapshot that was not whole, and
            its step.
        computed: compute dtype read off the activations -> steps.
        steps_done: rows that are complete.
    """

    replica_id: int
    losses: Floats
    read_version: NDArray[np.int64]
    staleness: NDArray[np.int32]
    read_state: NDArray[np.uint8]
    versions: Floats
    torn_witness: tuple[int, Floats] | None = None
    computed: Counter[str] = field(default_factory=Counter)
    steps_done: int = 0

    @staticmethod
    def empty(replica_id: int, steps: int, num_replicas: int) -> ReplicaRecord:
        return ReplicaRecord(
            replica_id,
            losses=np.full(steps, np.nan, np.float32),
            read_version=np.full(steps, -1, np.int64),
            staleness=np.full(steps, -1, np.int32),
            read_state=np.zeros(steps, np.uint8),
            versions=np.zeros((steps, num_replicas), np.float32),
        )


@dataclass
class Reference:
    """One replica's gradient at one step, kept whole, with what it is held to. All vectors are float32 [read_size].

    Attributes:
        snapshot: what the gradient was computed from.
        contribution: the replica's gradient and statistics delta.
        applied: what went to the optimizer: the contribution, or the mean over replicas.
        recomputed: the contribution computed again after the run by a neighbour from the same snapshot and batch.
        joint: the gradient of the joint batch at the snapshot; None where the model has none.
    """

    replica_id: int
    step: int
    snapshot: Floats
    contribution: Floats
    applied: Floats
    recomputed: Floats | None = None
    joint: Floats | None = None


@dataclass
class Evaluation:
    """Accuracy (share, 0 to 1) and mean loss on the held-out samples after `step` steps."""

    step: int
    accuracy: float
    loss: float


@dataclass
class RunRecord:
    """Everything a run has recorded so far; complete once the strategy returns.

    Attributes:
        initial: float32 [layout.size], every copy before the first update; None before there is one.
        copies: float32 [num_copies, layout.size], the shared variables' copies at the end; None before.
        added: float64 [layout.size], the sum of all that replicas set out to add to each copy; only with `audit=full`.
        magnitudes: float64 [layout.size], the sum of each value's magnitude after every addition, with `added`: what
            rounding is in proportion to.
        references_skipped: references that did not fit `audit.reference_mebibytes`.
        duration_seconds: from the first step to the last, start-up and capture left out.
    """

    layout: Layout
    steps: int
    replicas: list[ReplicaRecord]
    engine: str = ""
    threads_per_replica: int = 1
    initial: Floats | None = None
    copies: Floats | None = None
    added: NDArray[np.float64] | None = None
    magnitudes: NDArray[np.float64] | None = None
    references: list[Reference] = field(default_factory=list)
    references_skipped: int = 0
    evaluations: list[Evaluation] = field(default_factory=list)
    duration_seconds: float = 0.0

    @property
    def num_replicas(self) -> int:
        return len(self.replicas)

    @property
    def steps_done(self) -> int:
        """Steps that every replica has completed."""
        return min(replica.steps_done for replica in self.replicas)

    @property
    def micro_steps_done(self) -> int:
        return sum(replica.steps_done for replica in self.replicas)

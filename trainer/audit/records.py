"""What a run leaves for the audit and the reports: arrays and plain records, never framework objects.

Every `ReplicaRecord` is written by its own replica only and may be read by others at any time: losses below
`steps_done`, and the audit's columns, which are read off in blocks and so lag behind, below `computed.total()`. The
writer raises each after the rows are complete.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.audit.spans import Trace
from trainer.state.layout import Layout
from trainer.state.settings import Difference

if TYPE_CHECKING:
    from trainer.audit.findings import Finding

Floats = NDArray[np.float32]

WHOLE, FRACTURED, TORN_TENSOR = 0, 1, 2
# Dtypes as codes: what was read off values, and for a precision mode, where 0 is that nobody turned one on.
DTYPES = ("undetermined", "float32", "bfloat16", "float16")


CODES: Mapping[str | None, int] = {None: 0, **{name: index for index, name in enumerate(DTYPES)}}


def code(mode: str | None) -> int:
    """The code of a precision mode or a compute dtype."""
    return CODES[mode]


class Noted(NamedTuple):
    """What a replica's thread notes of a step beside its row; -1 where a thing was not looked at.

    Attributes:
        read_version: updates that all replicas had committed when the snapshot was taken.
        staleness: updates committed between the snapshot and the write.
        batch: the number of the batch that the cursor gave.
        asked: code of the compute dtype that was asked for.
        entry, exit: code of the precision mode that the replica was in before and after the step.
        mixed: whether the gradient that was read back is not the one that was put there.
        first_call: whether it was made as the first call.
    """

    read_version: int
    staleness: int
    batch: int
    asked: int
    entry: int
    exit: int
    mixed: int = -1
    first_call: int = 0


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
        noted: int64 [steps, len(Noted)], by `Noted`'s fields.
        computed_in, gradients_in: uint8 [steps], codes of the dtypes read off the activations and off a gradient.
        first_samples: int32 [steps], index of the batch's first sample; -1 where not recorded.
        random_words: float32 [steps, 2], of the first random numbers that were drawn; -1 where none were.
        loss_scale: float32 [steps, 2], the loss scale used, and 1 where the gradients overflowed.
        computed: compute dtype read off the activations -> steps.
        steps_done: rows that are complete.
    """

    replica_id: int
    losses: Floats
    read_version: NDArray[np.int64]
    staleness: NDArray[np.int32]
    read_state: NDArray[np.uint8]
    versions: Floats
    noted: NDArray[np.int64]
    computed_in: NDArray[np.uint8]
    gradients_in: NDArray[np.uint8]
    first_samples: NDArray[np.int32]
    random_words: Floats
    loss_scale: Floats
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
            noted=np.full((steps, len(Noted._fields)), -1, np.int64),
            computed_in=np.zeros(steps, np.uint8),
            gradients_in=np.zeros(steps, np.uint8),
            first_samples=np.full(steps, -1, np.int32),
            random_words=np.full((steps, 2), -1, np.float32),
            loss_scale=np.zeros((steps, 2), np.float32),
        )

    @staticmethod
    def elsewhere(replica_id: int, steps: int, num_replicas: int) -> ReplicaRecord:
        """Of a replica in another process: room for the losses that are told meanwhile, and for no other rows."""
        record = ReplicaRecord.empty(replica_id, 0, num_replicas)
        record.losses = np.full(steps, np.nan, np.float32)
        return record

    def column(self, name: str) -> NDArray[np.int64]:
        """One of `Noted`'s fields, of the steps that are read off: int64 [steps]."""
        found: NDArray[np.int64] = self.noted[: self.computed.total(), Noted._fields.index(name)]
        return found


class CompiledStep(NamedTuple):
    """A captured step that was run as a compiled library.

    Attributes:
        id: under which it was looked up.
        wanted, content: digests of the step's own content, and of what was run.
        found: whether it was on disk.
        seconds: that compiling it took, whenever that was.
        distance: of what it computes from what the step does, relative to the latter; infinite where it takes or gives
            other shapes.
    """

    id: str
    wanted: str
    content: str
    found: bool
    seconds: float
    distance: float


@dataclass
class Reference:
    """One replica's gradient at one step, kept whole, with what it is held to. All vectors are float32 [read_size].

    Attributes:
        snapshot: what the gradient was computed from.
        contribution: the replica's gradient and statistics delta.
        applied: what went to the optimizer: the contribution, or the mean over replicas.
        recomputed: the contribution computed again after the run by a neighbour from the same snapshot and batch.
        joint: the gradient of the joint batch at the snapshot; None where the model has none.
        joint_in_float32: the same in float32, where a low precision left a doubt.
        batch: the number of the batch that was used.
        asked: the compute dtype that was asked for.
    """

    replica_id: int
    step: int
    snapshot: Floats
    contribution: Floats
    applied: Floats
    recomputed: Floats | None = None
    joint: Floats | None = None
    joint_in_float32: Floats | None = None
    batch: int = 0
    asked: str = "float32"


class Average(NamedTuple):
    """How far one process's weights and statistics were from the mean of all processes', just before an average.

    Attributes:
        step: steps before it.
        largest: largest absolute difference of an element.
        relative: L2 norm of all differences, relative to that of what the mean has moved since the last average.
    """

    step: int
    largest: float
    relative: float


class Digests(NamedTuple):
    """What each process's copy came to before a step, by rank: 16 hexadecimal digits of its shared variables."""

    step: int
    found: tuple[str, ...]


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
        planned: int32 [replicas x steps], the first sample of every batch in the plan, by number; None before.
        expected_words: float32 [replicas, steps, 2], the random words that were to be drawn; None where nobody can say.
        draws: whether a step draws random numbers.
        batch_size: samples in a batch.
        first_calls: first calls that the main thread made.
        mode_left: the precision mode that was still on in the main thread when all was over.
        frozen: what capturing the step has frozen, in words.
        settings_asked: framework settings that every replica is to run under; none before the run has started.
        settings: framework settings that differed: replica -> differences.
        added: float64 [layout.size], the sum of all that replicas set out to add to each copy; only with `audit=full`.
        magnitudes: float64 [layout.size], the sum of each value's magnitude after every addition, with `added`: what
            rounding is in proportion to.
        compiled: the captured steps that were run as compiled libraries; none where that is not how they were run.
        references_skipped: references that did not fit `audit.reference_mebibytes`.
        joint: whether all replicas make one update together.
        trains: whether replicas train the model: otherwise there are steps that were done and no more in a row.
        findings: guarantee -> what a small workload found about it; None for one whose record tells.
        metrics: a small workload's own, beside those of `verdict.json`.
        ended_in: what a small workload ended in, where orders are to be told apart by it; None before the end.
        duration_seconds: from the first step to the last, start-up and capture left out.
        trace: when replicas did what, of a run that was traced.
        num_processes: that host the replicas, the same number in each; each has a copy where there are several.
        digests_compared: how often processes have compared their copies before the end; `digests_off` has those
            times at which they were not alike.
        averages: how far the process that was furthest off was from the others before each average of copies.
    """

    layout: Layout
    steps: int
    replicas: list[ReplicaRecord]
    engine: str = ""
    threads_per_replica: int = 1
    initial: Floats | None = None
    copies: Floats | None = None
    planned: NDArray[np.int32] | None = None
    expected_words: Floats | None = None
    draws: bool = False
    batch_size: int = 0
    first_calls: int = 0
    mode_left: str | None = None
    frozen: str = ""
    settings_asked: Mapping[str, str] = field(default_factory=dict)
    settings: dict[int, list[Difference]] = field(default_factory=dict)
    added: NDArray[np.float64] | None = None
    magnitudes: NDArray[np.float64] | None = None
    references: list[Reference] = field(default_factory=list)
    compiled: list[CompiledStep] = field(default_factory=list)
    references_skipped: int = 0
    evaluations: list[Evaluation] = field(default_factory=list)
    joint: bool = False
    trains: bool = True
    findings: Mapping[str, Finding] | None = None
    metrics: Mapping[str, float | int | None] = field(default_factory=dict)
    ended_in: bytes | None = None
    duration_seconds: float = 0.0
    trace: Trace | None = None
    num_processes: int = 1
    digests_compared: int = 0
    digests_off: list[Digests] = field(default_factory=list)
    averages: list[Average] = field(default_factory=list)

    @property
    def num_replicas(self) -> int:
        return len(self.replicas)

    @property
    def steps_done(self) -> int:
        """Steps that every replica has completed."""
        return min(replica.steps_done for replica in self.replicas)

    @property
    def ended(self) -> bool:
        """Whether the run came to its end."""
        return self.copies is not None or self.ended_in is not None

    @property
    def micro_steps_done(self) -> int:
        return sum(replica.steps_done for replica in self.replicas)

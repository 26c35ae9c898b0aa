"""What replicas did when, as spans on a lane a replica: what `trainer/report/trace.py` writes down.

Standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from trainer.audit.profile import StepTimes

# Spans of all replicas together that a trace keeps: about 10 MB in a file.
MAX_SPANS = 50_000

STEP, COMPUTE = "step", "compute"
LOCK_WAIT, CRITICAL_SECTION, BARRIER_WAIT = "lock wait", "critical section", "barrier wait"
READ, WRITE, UPDATE = "read", "write", "update"
DATA, LOGGING = "data", "logging"
GRAPH_CALL, EVALUATION = "graph call", "evaluation"
KINDS = (
    *(STEP, COMPUTE, LOCK_WAIT, CRITICAL_SECTION, BARRIER_WAIT, READ, WRITE, UPDATE),
    *(DATA, LOGGING, GRAPH_CALL, EVALUATION),
)


class Span(NamedTuple):
    """One thing that a replica did.

    Attributes:
        replica: or the number of the lane, where lanes are not the replicas.
        step: of the replica's, from 0; -1 before its first.
        kind: one of `KINDS`.
        start, stop: nanoseconds of `time.perf_counter_ns`.
        args: what else there is to say of it; of several steps that were taken together, `steps` says how many.
    """

    replica: int
    step: int
    kind: str
    name: str
    start: int
    stop: int
    args: Mapping[str, Any] = {}


@dataclass
class Trace:
    """The spans of one run.

    Attributes:
        token: of the order that was run, where a schedule made one.
        told_apart: kinds of spans that were looked for in a free run, found or not, so that a profile can be made of
            them; none where a schedule said who goes next, whose times are its own.
        lanes: what lanes are called, where they are not the replicas.
        times: each replica's steps, where they were measured and not made into spans: a profile is made of these then.
    """

    num_replicas: int
    spans: list[Span] = field(default_factory=list)
    token: str = ""
    told_apart: tuple[str, ...] = ()
    lanes: tuple[str, ...] = ()
    times: list[StepTimes] = field(default_factory=list)

"""What replicas did when, as spans on a lane a replica: what `trainer/report/trace.py` writes down.

Standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

# Spans of all replicas together that a trace keeps: about 10 MB in a file.
MAX_SPANS = 50_000

STEP, COMPUTE = "step", "compute"
LOCK_WAIT, CRITICAL_SECTION, BARRIER_WAIT = "lock wait", "critical section", "barrier wait"
READ, WRITE, UPDATE = "read", "write", "update"
KINDS = (STEP, COMPUTE, LOCK_WAIT, CRITICAL_SECTION, BARRIER_WAIT, READ, WRITE, UPDATE)


class Span(NamedTuple):
    """One thing that a replica did.

    Attributes:
        step: of the replica's, from 0; -1 before its first.
        kind: one of `KINDS`.
        start, stop: nanoseconds of `time.perf_counter_ns`.
        args: what else there is to say of it.
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
    """

    num_replicas: int
    spans: list[Span] = field(default_factory=list)
    token: str = ""

"""Where a step's time goes: the seconds that each phase takes of a replica's steps, and their shares.

Phases exclude each other and add up to the step's wall time: a moment that several spans cover belongs to the phase
that comes first in `PHASES`, and what none of them covers is `other`. So the critical section is all the time under a
lock, whatever is done there, but for waits; and reading, computing or logging under a lock is part of it.

Assumption: wall time is not the processor's. A thread that waits for the GIL or for a core does so inside whatever it
was about to do, and no span says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.audit import spans as kinds
from trainer.audit.records import RunRecord
from trainer.audit.spans import STEP, Span, Trace
from trainer.audit.verdict import ProfileRow

Seconds = NDArray[np.float64]

# Phase -> the kinds of spans that it is made of. The first phase that covers a moment has it.
PHASES: Mapping[str, tuple[str, ...]] = {
    "lock_wait": (kinds.LOCK_WAIT,),
    "barrier": (kinds.BARRIER_WAIT,),
    "critical_section": (kinds.CRITICAL_SECTION,),
    "data": (kinds.DATA,),
    "evaluation": (kinds.EVALUATION,),
    "logging": (kinds.LOGGING,),
    "graph_call": (kinds.GRAPH_CALL,),
    "compute": (kinds.COMPUTE,),
    "unlocked_access": (kinds.READ, kinds.WRITE, kinds.UPDATE),
}
OTHER = "other"
# Steps of each replica that are left out of medians and shares: caches, pages and the interpreter's first look.
WARM_UP = 1
# The order in which they are told.
TOLD = (
    *("compute", "graph_call", "lock_wait", "critical_section", "unlocked_access", "barrier"),
    *("data", "logging", "evaluation", OTHER),
)


@dataclass(frozen=True)
class StepTimes:
    """How long one replica's steps took, and what of that each phase took.

    Attributes:
        replica_id: None where one host takes all replicas' steps together.
        wall: float64 [steps], seconds from the end of the step before to a step's end; of the first from its beginning.
        phases: phase of `PHASES` -> float64 [steps], seconds; those that were looked for. No moment in two of them.
        first_step: the number of the first of these steps, which follow each other.

    Raises:
        ValueError: a phase is none of `PHASES`, has another number of steps, or phases take more than the step.
    """

    replica_id: int | None
    wall: Seconds
    phases: Mapping[str, Seconds]
    first_step: int = 0

    def __post_init__(self) -> None:
        for phase, seconds in self.phases.items():
            if phase not in PHASES:
                raise ValueError(f"a step has no phase {phase!r}; it has {', '.join(PHASES)}.")
            if seconds.shape != self.wall.shape:
                raise ValueError(f"{phase} has {len(seconds)} steps and the steps themselves are {len(self.wall)}.")
        # Sums of a step's seconds round in the sixteenth digit.
        if self.wall.size and float((self._told_apart() - self.wall).max()) > 1e-9:
            raise ValueError(f"the phases of a step of replica {self.replica_id} take more time than the step.")

    def seconds(self) -> dict[str, Seconds]:
        """Every phase's, `other` included."""
        return {**self.phases, OTHER: np.maximum(self.wall - self._told_apart(), 0.0)}

    def after(self, steps: int) -> StepTimes:
        """The same without the first steps."""
        phases = {name: seconds[steps:] for name, seconds in self.phases.items()}
        return StepTimes(self.replica_id, self.wall[steps:], phases, self.first_step + steps)

    def _told_apart(self) -> Seconds:
        return np.asarray(sum(self.phases.values(), np.zeros_like(self.wall)))


@dataclass(frozen=True)
class Phase:
    """One phase of the steps that were measured.

    Attributes:
        seconds: median over the micro-steps.
        share: of the time that all those micro-steps took together.
    """

    seconds: float
    share: float


@dataclass(frozen=True)
class Profile:
    """What the measured steps' time went to.

    Attributes:
        steps: of all replicas.
        step_seconds: median of their wall time.
        phases: phase -> over all replicas; shares add up to 1.
        replicas: replica -> its own phases; None -> those of all, where one host takes their steps together.
    """

    steps: int
    step_seconds: float
    phases: dict[str, Phase]
    replicas: dict[int | None, dict[str, Phase]]


def step_times(record: RunRecord) -> list[StepTimes]:
    """What was measured of a run's first steps; nothing where none were traced, or a schedule said who goes next."""
    trace = record.trace
    if trace is None:
        return []
    trace.times = trace.times or times_of(trace)
    return trace.times


def profile(times: Sequence[StepTimes]) -> Profile | None:
    """Sum up what replicas' steps took, but for their first, which warms up; None for no steps.

    Args:
        times: looked at for the same phases, all of them.
    """
    measured = [rest for each in times if (rest := each.after(WARM_UP)).wall.size]
    if not measured:
        return None
    walls = np.concatenate([each.wall for each in measured])
    return Profile(
        steps=len(walls),
        step_seconds=float(np.median(walls)),
        phases=_phases(measured),
        replicas={each.replica_id: _phases([each]) for each in measured},
    )


def by_step(times: Sequence[StepTimes]) -> dict[int, dict[str, float]]:
    """Step -> phase -> seconds, mean over the replicas that it was measured of."""
    found: dict[int, dict[str, list[float]]] = {}
    for each in times:
        for name, seconds in each.seconds().items():
            for step, value in enumerate(seconds.tolist(), each.first_step):
                found.setdefault(step, {}).setdefault(name, []).append(value)
    return {step: {name: sum(values) / len(values) for name, values in found[step].items()} for step in sorted(found)}


def rates(record: RunRecord) -> tuple[float, float] | None:
    """Micro-steps per second of the traced steps but for each replica's first, and of all steps after them.

    The difference is what tracing costs: nothing else changes when a replica is through with its traced steps. None
    where fewer steps are untraced than traced, or spans tell nothing of steps.
    """
    trace = record.trace
    if trace is None or not trace.told_apart or trace.lanes:
        return None  # on a host's lane are a few spans a call, which take nothing of note
    ends: dict[int, list[int]] = {}
    for span in trace.spans:
        if span.kind == STEP:
            ends.setdefault(span.replica, []).append(span.stop)
    steps = sum(map(len, ends.values()))
    left = record.micro_steps_done - steps
    if left < steps or min(map(len, ends.values()), default=0) <= WARM_UP:
        return None
    traced = sum((len(own) - WARM_UP) * 1e9 / (own[-1] - own[WARM_UP - 1]) for own in ends.values())
    begun = min(span.start for span in trace.spans)
    seconds = record.duration_seconds - (max(own[-1] for own in ends.values()) - begun) * 1e-9
    return (traced, left / seconds) if seconds > 0 else None


def metrics(record: RunRecord) -> dict[str, float | int | None]:
    """What `verdict.json` says of all replicas together; nothing for a run that was not traced."""
    found = profile(step_times(record))
    if found is None:
        return {}
    micro_steps = found.steps * (record.num_replicas if None in found.replicas else 1)
    numbers: dict[str, float | int | None] = {"profiled_micro_steps": micro_steps, "step_seconds": found.step_seconds}
    for name, phase in found.phases.items():
        numbers |= {f"{name}_seconds": phase.seconds, f"{name}_share": phase.share}
    numbers["traced_micro_steps_per_second"], numbers["untraced_micro_steps_per_second"] = rates(record) or (None, None)
    return numbers


def rows(record: RunRecord) -> list[ProfileRow]:
    """What `verdict.json` says of each replica."""
    found = profile(step_times(record))
    return [
        ProfileRow(
            own,
            {name: phase.seconds for name, phase in phases.items()},
            {name: phase.share for name, phase in phases.items()},
        )
        for own, phases in (found.replicas.items() if found is not None else ())
    ]


def _phases(times: Sequence[StepTimes]) -> dict[str, Phase]:
    found = [each.seconds() for each in times]
    total = float(sum(each.wall.sum() for each in times))
    joined = {name: np.concatenate([own[name] for own in found]) for name in TOLD if name in found[0]}
    return {
        name: Phase(float(np.median(seconds)), float(seconds.sum()) / total if total else 0.0)
        for name, seconds in joined.items()
    }


# From spans.


def times_of(trace: Trace) -> list[StepTimes]:
    """What a free run's spans say of each replica's steps; nothing of a trace in which no phase was looked for."""
    if not trace.told_apart:
        return []
    by_lane: list[list[Span]] = [[] for _ in range(len(trace.lanes) or trace.num_replicas)]
    for span in trace.spans:
        by_lane[span.replica].append(span)
    return [_times(None if trace.lanes else own, spans, trace.told_apart) for own, spans in enumerate(by_lane)]


def _times(replica_id: int | None, spans: Sequence[Span], told_apart: Iterable[str]) -> StepTimes:
    steps = sorted((span for span in spans if span.kind == STEP), key=lambda span: span.start)
    zero = steps[0].start if steps else 0
    ends = _seconds([step.stop for step in steps], zero)
    # What a replica does between two steps takes time, too: it is the later one's.
    begins = np.concatenate([np.zeros(1), ends[:-1]])[: len(ends)]
    # Of steps that were taken together, each is told as its part.
    together = [span.args.get("steps", 1) for span in steps]
    covered, before = [np.zeros((0, 2))], np.zeros(len(steps))
    phases = {}
    for phase, made_of in PHASES.items():
        if not set(made_of) & set(told_apart):
            continue
        own = [span for span in spans if span.kind in made_of]
        starts, stops = _seconds([span.start for span in own], zero), _seconds([span.stop for span in own], zero)
        covered.append(np.stack([starts, stops], axis=1))
        upto = _covered(np.concatenate(covered), begins, ends)
        phases[phase] = np.repeat(np.maximum(upto - before, 0.0) / together, together)
        before = upto
    return StepTimes(replica_id, np.repeat((ends - begins) / together, together), phases, steps[0].step if steps else 0)


def _seconds(nanoseconds: Sequence[int], zero: int) -> Seconds:
    return np.array([each - zero for each in nanoseconds], np.float64) * 1e-9


def _covered(intervals: Seconds, begins: Seconds, ends: Seconds) -> Seconds:
    """How much of each window some interval covers: float64 [windows].

    Args:
        intervals: float64 [intervals, 2], in no order; they may overlap each other, and windows.
    """
    if not len(intervals):
        return np.zeros_like(begins)
    starts, stops = intervals[np.argsort(intervals[:, 0])].T
    # Each interval without what those before it have covered, so that the rest of it follows theirs.
    starts = np.maximum(starts, np.maximum.accumulate(np.concatenate([[-np.inf], stops[:-1]])))
    stops = np.maximum(starts, stops)
    # Covered time until a moment rises along intervals and is level between them.
    moments = np.stack([starts, stops], axis=1).reshape(-1)
    until = np.stack([np.zeros(len(starts)), np.cumsum(stops - starts)], axis=1).reshape(-1)
    until[2::2] = until[1:-1:2]
    risen: Seconds = np.interp(ends, moments, until) - np.interp(begins, moments, until)
    return risen

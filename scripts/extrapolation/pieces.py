"""What one replica's micro-step is made of, in seconds, as a run with `audit=profile` has measured it.

With `trace.json` beside the verdict each piece is as many values as steps were traced, from which a simulation draws;
without it, one value, the profile's median.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

Seconds = tuple[float, ...]
WARM_UP = 1  # steps of each replica that are left out, as in trainer/audit/profile.py
PIECES = ("read", "compute", "write", "rest", "barrier")


class BadRun(ValueError):
    """A folder that nothing can be learned from, told in one line."""


@dataclass(frozen=True)
class Pieces:
    """One run's.

    Attributes:
        read: copying the shared variables, the lock's own time included where there is one.
        compute: the gradient, and what of the update is made before a lock is taken.
        write: putting the update into the shared variables; of all_reduce a replica's share of that.
        rest: batch, logging, and all that no span covers: the interpreter's part of a step.
        barrier: a barrier's own time, from the last replica's coming; empty where the mode has none.
        command: that made the run.
        rate: micro-steps a second of all replicas while they were traced; 0 where that is not known.
    """

    mode: str
    engine: str
    replicas: int
    cores: int
    read: Seconds
    compute: Seconds
    write: Seconds
    rest: Seconds
    barrier: Seconds = ()
    source: str = "trace.json"
    command: str = ""
    rate: float = 0.0

    @property
    def crowded(self) -> bool:
        """Whether replicas had to wait for a core, which then is in every piece."""
        return self.replicas > self.cores

    def mean(self, piece: str) -> float:
        values: Seconds = getattr(self, piece)
        return sum(values) / len(values) if values else 0.0

    def as_means(self) -> Pieces:
        """The same with each piece always taking as long as on average."""
        means: dict[str, Any] = {name: (self.mean(name),) for name in PIECES if getattr(self, name)}
        return replace(self, **means)


@dataclass(frozen=True)
class Calibration:
    """Runs of one model on one machine.

    A run with more replicas than cores is none to take pieces from, if there is another: it tells what it takes a core
    to go over from one thread to another.
    """

    runs: tuple[Pieces, ...]

    def of(self, mode: str, replicas: int) -> Pieces:
        """Pieces for so many replicas in a mode.

        Of the runs with no more replicas: the mode's own, or else those without a barrier; of these the one with most,
        since what replicas on other cores cost each other is in its pieces.
        """
        runs = [run for run in self.runs if not run.crowded] or list(self.runs)
        few = [run for run in runs if run.replicas <= replicas] or runs
        own = [run for run in few if run.mode == mode] or [run for run in few if not run.barrier] or few
        found = max(own, key=lambda run: run.replicas)
        if found.barrier:
            return found
        with_barrier = next((run for run in (*runs, *self.runs) if run.barrier), None)
        if with_barrier is None:
            return found
        # A barrier's time is that of one replica of those that meet there: see `barrier_seconds`.
        scale = found.replicas / with_barrier.replicas
        return replace(found, barrier=tuple(each * scale for each in with_barrier.barrier))


def read(folder: Path) -> Pieces:
    """What a run's folder has.

    Raises:
        BadRun: it holds no run, one without a profile, or one whose replicas are not threads.
    """
    verdict = _json(folder / "verdict.json", "holds no run: no verdict.json in it")
    run, profile = verdict.get("run") or {}, verdict.get("profile")
    if not profile:
        raise BadRun(f"{folder} has no profile. Make the run with audit=profile.")
    if run.get("strategy") != "threads":
        raise BadRun(f"{folder} is a run of strategy={run.get('strategy')}: what its replicas do is not told apart.")
    pieces = Pieces(
        mode=str(run["update_mode"]),
        engine=str(run["engine"]),
        replicas=int(run["num_replicas"]),
        cores=int(run.get("cores") or 1),
        command=str(run["command"]),
        **_of_profile(verdict["metrics"]),
    )
    trace = folder / "trace.json"
    if not trace.exists():
        return pieces
    steps = steps_of(_json(trace, "cannot be read"))
    if not steps:
        return pieces
    drawn_from: dict[str, Any] = {
        name: tuple(getattr(each, name) for each in steps) for name in ("read", "compute", "write", "rest")
    }
    return replace(pieces, **drawn_from, barrier=_barriers(steps), source="trace.json", rate=rate(steps))


def rate(steps: Sequence[Step]) -> float:
    """Steps a second of all replicas, each over the time of its own."""
    by_replica: dict[int, list[Step]] = {}
    for step in steps:
        by_replica.setdefault(step.replica, []).append(step)
    return sum(len(own) / sum(step.wall for step in own) for own in by_replica.values())


def _json(path: Path, otherwise: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadRun(f"{path.parent} {otherwise}.") from None
    except (OSError, ValueError) as error:
        raise BadRun(f"{path} cannot be read: {error}.") from None
    if not isinstance(found, dict):
        raise BadRun(f"{path} is not as a run leaves it.")
    return found


def _of_profile(metrics: dict[str, Any]) -> dict[str, Any]:
    """Medians. A profile does not tell reading from writing: half of all access is taken for each."""

    def seconds(*phases: str) -> float:
        return float(sum(metrics.get(f"{phase}_seconds") or 0.0 for phase in phases))

    access = seconds("critical_section", "unlocked_access") / 2
    rest = seconds("data", "logging", "other")
    barrier = seconds("barrier") / 2
    return {
        "read": (access,),
        "compute": (seconds("compute"),),
        "write": (access,),
        "rest": (rest,),
        "barrier": (barrier,) if barrier else (),
        "source": "verdict.json",
    }


# From spans.


@dataclass
class Step:
    """One traced step of one replica, in seconds."""

    replica: int
    number: int
    read: float = 0.0
    compute: float = 0.0
    write: float = 0.0
    lock_wait: float = 0.0
    barriers: tuple[float, ...] = ()
    wall: float = 0.0
    stop: float = 0.0

    @property
    def rest(self) -> float:
        known = self.read + self.compute + self.write + self.lock_wait + sum(self.barriers)
        return max(self.wall - known, 0.0)


def steps_of(trace: dict[str, Any]) -> list[Step]:
    """Every traced step but each replica's first ones, in the replicas' and their own order."""
    by_lane: dict[int, list[dict[str, Any]]] = {}
    for event in trace.get("traceEvents", []):
        if event.get("ph") == "X":
            by_lane.setdefault(int(event["tid"]), []).append(event)
    found: list[Step] = []
    for lane, events in sorted(by_lane.items()):
        found += _steps(lane - 1, sorted(events, key=lambda event: (event["ts"], -event["dur"])))
    return found


def _steps(replica: int, events: Sequence[dict[str, Any]]) -> list[Step]:
    by_number: dict[int, list[dict[str, Any]]] = {}
    for event in events:
        by_number.setdefault(int(event["args"]["step"]), []).append(event)
    found: list[Step] = []
    before = None
    for number in sorted(by_number):
        whole = next((event for event in by_number[number] if event["cat"] == "step"), None)
        if whole is None:
            continue
        step = _step(replica, number, by_number[number])
        step.stop = _stop(whole) * 1e-6
        # What a replica does between two steps is the later one's.
        step.wall = step.stop - before if before is not None else whole["dur"] * 1e-6
        before = step.stop
        found.append(step)
    return found[WARM_UP:]


def _step(replica: int, number: int, events: Sequence[dict[str, Any]]) -> Step:
    step = Step(replica, number)
    covered = 0.0  # until when what was seen before has everything
    for event in events:
        kind, seconds = event["cat"], event["dur"] * 1e-6
        if kind == "barrier wait":
            step.barriers += (seconds,)
        elif kind == "lock wait":
            step.lock_wait += seconds
        elif kind == "critical section":
            inside = [each for each in events if event["ts"] <= each["ts"] and _stop(each) <= _stop(event)]
            if any(each["name"] == "compute" for each in inside):
                continue  # a lock round everything: its parts are told by themselves
            reads = any(each["cat"] == "read" for each in inside)
            step.read, step.write = step.read + seconds * reads, step.write + seconds * (not reads)
            covered = max(covered, _stop(event))
        elif event["ts"] >= covered and kind in ("read", "compute"):
            setattr(step, kind, getattr(step, kind) + seconds)
        elif event["ts"] >= covered and kind in ("update", "write"):
            step.write += seconds
    return step


def _stop(event: dict[str, Any]) -> float:
    return float(event["ts"]) + float(event["dur"])


def _barriers(steps: Sequence[Step]) -> Seconds:
    """Each barrier's own time: what the last to come has waited, who waits least."""
    by_barrier: dict[tuple[int, int], list[float]] = {}
    for step in steps:
        for place, seconds in enumerate(step.barriers):
            by_barrier.setdefault((step.number, place), []).append(seconds)
    return tuple(min(waits) for waits in by_barrier.values())


# As a file.


def as_json(calibration: Calibration) -> dict[str, Any]:
    return {"runs": [{**vars(run), **{name: list(getattr(run, name)) for name in PIECES}} for run in calibration.runs]}


def from_json(found: dict[str, Any]) -> Calibration:
    return Calibration(tuple(Pieces(**{**run, **{name: tuple(run[name]) for name in PIECES}}) for run in found["runs"]))

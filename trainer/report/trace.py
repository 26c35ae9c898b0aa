"""`trace.json`: what replicas did when, a lane a replica, for Perfetto (ui.perfetto.dev) and chrome://tracing.

Every span is a complete event (`ph` X); times are in microseconds from the first. On a replica's lane a step encloses
critical sections, which enclose reads and writes. What would overlap on a lane without one enclosing the other, as
locks that are not given back in the order in which they were acquired, stands on a second lane. Of a free run under
`strategy=mirrored` there is one lane, the host's, on which calls of the graph stand whole.

Of an order that a schedule has made, a wait is from announcing an operation to its being granted, whether the lock was
not free or another replica was to go first; whatever else is granted lasts until the replica's next announcement, since
nobody is told when it is through with it. `versions` and `bases` are by place, as in `trainer/schedule/operations.py`.

Source: Trace Event Format, Google 2016.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from trainer.audit.spans import (
    BARRIER_WAIT,
    COMPUTE,
    CRITICAL_SECTION,
    LOCK_WAIT,
    MAX_SPANS,
    STEP,
    Span,
    Trace,
)
from trainer.schedule.operations import (
    ACQUIRE,
    BARRIER,
    BEGIN,
    MARKS,
    REENTRANT,
    RELEASE,
    SHARE,
    TRY,
    UNSHARE,
    Event,
    History,
    Operation,
)
from trainer.schedule.operations import COMPUTE as COMPUTE_MARK
from trainer.schedule.order import DONE
from trainer.whole_file import whole

FILE_NAME = "trace.json"
PROCESS = 1  # `pid` of all events; thread 0 is special to some viewers, so that replica 0 is thread 1


def save(trace: Trace, folder: Path, steps: int) -> Path:
    """Write `trace.json`, so that a reader sees all of it or none.

    Args:
        steps: that each replica was to take.
    """
    path = folder / FILE_NAME
    with whole(path) as partial, partial.open("w", encoding="utf-8") as stream:
        json.dump(as_json(trace, steps), stream, allow_nan=False, separators=(",", ":"))
    return path


def as_json(trace: Trace, steps: int) -> dict[str, Any]:
    """The trace as the format has it. `otherData` says how many steps of each replica are not in it."""
    spans = _bounded(trace.spans)
    first = min((span.start for span in spans), default=0)
    taken = max((span.step + span.args.get("steps", 1) for span in spans), default=0)
    events: list[dict[str, Any]] = [_metadata("process_name", {"name": "replicas"})]
    for lane, (name, on_lane) in enumerate(_lanes(trace, spans), start=1):
        events.append(_metadata("thread_name", {"name": name}, lane))
        events.append(_metadata("thread_sort_index", {"sort_index": lane}, lane))
        events.extend(_complete(span, first, lane, trace.token) for span in on_lane)
    about: dict[str, Any] = {
        "num_replicas": trace.num_replicas,
        "steps": steps,
        "steps_left_out": max(0, steps - taken),
    }
    if trace.token:
        about["token"] = trace.token
    return {"traceEvents": events, "displayTimeUnit": "ns", "otherData": about}


def _bounded(spans: Sequence[Span]) -> Sequence[Span]:
    """As many of the first steps as fit whole; of a first step that does not, its beginning."""
    if len(spans) <= MAX_SPANS:
        return spans
    in_order = sorted(spans, key=lambda span: span.start)
    left_out = min(span.step for span in in_order[MAX_SPANS:])
    return [span for span in in_order if span.step < left_out] or in_order[:MAX_SPANS]


def _metadata(name: str, args: dict[str, Any], lane: int = 0) -> dict[str, Any]:
    return {"name": name, "ph": "M", "pid": PROCESS, "tid": lane, "args": args}


def _complete(span: Span, first: int, lane: int, token: str) -> dict[str, Any]:
    args = {"step": span.step, **span.args}
    if token and span.kind == STEP:
        args["token"] = token
    return {
        "name": span.name,
        "cat": span.kind,
        "ph": "X",
        "ts": (span.start - first) / 1000,
        "dur": (span.stop - span.start) / 1000,
        "pid": PROCESS,
        "tid": lane,
        "args": args,
    }


def _lanes(trace: Trace, spans: Sequence[Span]) -> Iterator[tuple[str, list[Span]]]:
    """Every replica's lane, and further ones for what does not nest on it."""
    for own, called in enumerate(trace.lanes or [f"replica {own}" for own in range(trace.num_replicas)]):
        # The longer first, of what begins together: it encloses the other.
        left = sorted((span for span in spans if span.replica == own), key=lambda span: (span.start, -span.stop))
        name = called
        while left or name == called:
            nested, left = _nested(left)
            yield name, nested
            name = f"{called}, overlapping"


def _nested(spans: Sequence[Span]) -> tuple[list[Span], list[Span]]:
    """Spans of which any two are apart or one encloses the other, and those that are not so with them."""
    nested: list[Span] = []
    others: list[Span] = []
    around: list[Span] = []
    for span in spans:
        while around and around[-1].stop <= span.start:
            around.pop()
        if around and span.stop > around[-1].stop:
            others.append(span)
        else:
            nested.append(span)
            around.append(span)
    return nested, others


def of_history(history: History, token: str = "") -> Trace:
    """The spans of an order that a schedule has made."""
    lanes = [_Lane(own) for own in range(history.num_replicas)]
    inside: dict[str, list[_Lane]] = {}  # of each lock, the first to come in first
    for event, (announced, granted) in zip(history.events, history.times, strict=True):
        lane, operation = lanes[event.replica], event.operation
        lane.go_on(announced)
        others = inside.setdefault(operation.name, [])
        if operation.kind in MARKS:
            lane.mark(event)
        elif operation.kind in (RELEASE, UNSHARE):
            _leave(others, lane, operation.name, granted)
        elif operation.kind == BARRIER:
            lane.wait(operation, announced, granted)
        elif operation.kind in (ACQUIRE, SHARE, TRY):
            # One that was tried, or for a time only, may have come to nothing.
            free = not others or operation.kind == SHARE or (REENTRANT in operation.value and others[-1] is lane)
            if operation.kind != TRY:
                lane.wait(operation, announced, granted, granted=free)
            if free:
                lane.enter(event, granted)
                others.append(lane)
        else:
            lane.do(event, granted)
    # Whatever was announced last is the last that happened, where it was not granted.
    latest = [*(granted for _, granted in history.times), *(when for _, when in history.announced.values())]
    for lane in lanes:
        lane.finish(history.announced.get(lane.replica), max(latest, default=0))
    return Trace(history.num_replicas, [span for lane in lanes for span in lane.spans], token)


def _leave(inside: list[_Lane], lane: _Lane, name: str, granted: int) -> None:
    """Whoever gives a lock back comes out, the last time that it went in; of a lock that another holds, that one."""
    if inside:
        place = max((at for at, each in enumerate(inside) if each is lane), default=len(inside) - 1)
        inside.pop(place).leave(name, granted)


class _Lane:
    """One replica's spans in the making."""

    def __init__(self, replica: int) -> None:
        self.replica = replica
        self.spans: list[Span] = []
        self._now = 0
        self._step = -1
        self._began: int | None = None
        self._doing: tuple[str, str, int, dict[str, Any]] | None = None
        self._inside: dict[str, list[tuple[Event, int]]] = {}

    def go_on(self, now: int) -> None:
        """What was granted or marked last is over."""
        self._now = now
        if self._doing is not None:
            kind, name, start, args = self._doing
            self._add(kind, name, start, now, args)
            self._doing = None

    def mark(self, event: Event) -> None:
        if event.operation.kind == COMPUTE_MARK:
            self._doing = (COMPUTE, "compute", self._now, {})
        elif event.operation.kind == BEGIN:
            self._end_step()
            self._step, self._began = event.step, self._now

    def do(self, event: Event, granted: int) -> None:
        operation = event.operation
        args = {"of": operation.of, "versions": dict(zip(operation.places, event.versions, strict=True))}
        if event.bases:
            args["bases"] = dict(zip(operation.places, event.bases, strict=True))
        if operation.value:
            args["value"] = operation.value
        self._doing = (operation.kind, operation.told, granted, args)

    def wait(self, operation: Operation, announced: int, until: int, *, granted: bool = True) -> None:
        kind, told = (BARRIER_WAIT, "wait at") if operation.kind == BARRIER else (LOCK_WAIT, "wait for")
        args = _shared(operation) | _unless(granted, "granted")
        self._add(kind, f"{told} {operation.name}", announced, until, args)

    def enter(self, event: Event, granted: int) -> None:
        self._inside.setdefault(event.operation.name, []).append((event, granted))

    def leave(self, name: str, now: int, *, released: bool = True) -> None:
        event, since = self._inside[name].pop()
        args = _shared(event.operation) | _unless(released, "released")
        self.spans.append(Span(self.replica, event.step, CRITICAL_SECTION, name, since, now, args))

    def finish(self, last: tuple[Operation, int] | None, end: int) -> None:
        """End what has not ended: the last step; in a deadlock what it waits for and what it holds."""
        if last is not None and last[1] > self._now:
            operation, announced = last
            self.go_on(announced)
            if operation is DONE:
                end = announced
            elif operation.kind in (ACQUIRE, SHARE, BARRIER):
                self.wait(operation, announced, end, granted=False)
        for name, entered in self._inside.items():
            while entered:
                self.leave(name, end, released=False)
        self.go_on(end)
        self._end_step()

    def _end_step(self) -> None:
        if self._began is not None:
            self._add(STEP, f"step {self._step}", self._began, self._now, {})

    def _add(self, kind: str, name: str, start: int, stop: int, args: dict[str, Any]) -> None:
        self.spans.append(Span(self.replica, self._step, kind, name, start, stop, args))


def _shared(operation: Operation) -> dict[str, Any]:
    return {"shared": True} if operation.kind == SHARE else {}


def _unless(so: bool, name: str) -> dict[str, Any]:
    return {} if so else {name: False}

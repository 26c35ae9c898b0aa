"""Free runs of `strategy=mirrored` whose first steps are traced (`audit.trace_steps`): a span for what the host does.

What goes on inside a call of the graph, its replicas' computing, reduction and updates, nobody outside can tell apart.
A call takes several steps, each of which is told as having taken its part of the time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from trainer.audit.spans import EVALUATION, GRAPH_CALL, LOGGING
from trainer.audit.tracer import Tracer, steps_named

if TYPE_CHECKING:
    from trainer.strategies.mirrored import Mirrored

HOST = "host"


@contextmanager
def calls_traced(run: Mirrored) -> Iterator[None]:
    """Trace the calls that a run makes until `audit.trace_steps` steps are done, into its record's `trace`."""
    steps, record = run.config.audit.trace_steps, run.record
    if not steps or run.first_step:
        yield
        return
    tracer = Tracer(record.num_replicas, steps, lanes=(HOST,))
    _watch(tracer, run)
    try:
        yield
    finally:
        record.trace = tracer.trace()


def _watch(tracer: Tracer, run: Mirrored) -> None:
    tracer.time(run, "call", GRAPH_CALL, lambda first, last, *_: steps_named(first, last - first))
    tracer.time(run, "read_off", LOGGING, lambda *_: "read rows off")
    tracer.time(run, "add_up", LOGGING, lambda *_: "sum deltas")
    tracer.time(run, "keep_references", LOGGING, lambda *_: "keep gradients")
    tracer.time(run, "evaluate", EVALUATION, lambda step: "evaluate")
    tracer.time(run, "_report", LOGGING, lambda step: "report")
    called = 0  # steps of the calls that have ended

    def over_call(call: Callable[..., Any]) -> Callable[..., Any]:
        def begun(first: int, last: int, *given: Any) -> Any:
            if last > first:  # or nothing is done but tracing the graph
                tracer.begin(0)
            return call(first, last, *given)

        return begun

    def over_report(report: Callable[[int], None]) -> Callable[[int], None]:
        def reported(step: int) -> None:
            nonlocal called
            report(step)
            tracer.end(step - called)
            called = step

        return reported

    tracer.cover(run, "call", over_call)
    tracer.cover(run, "_report", over_report)

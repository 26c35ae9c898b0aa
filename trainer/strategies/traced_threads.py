"""Free runs of `strategy=threads` whose first steps are traced (`audit.trace_steps`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

from trainer.audit.recorder import Recorder
from trainer.audit.records import RunRecord
from trainer.audit.spans import COMPUTE, DATA, LOGGING, READ, UPDATE, WRITE
from trainer.audit.tracer import Tracer
from trainer.schedule.locks import shown_to
from trainer.state.cursor import Cursor
from trainer.updates.shared_vector import Part, Replica, SharedVector

if TYPE_CHECKING:
    from trainer.strategies.threads import Threads
    from trainer.workloads.own_loop import LoopReplica, LoopThreads

T = TypeVar("T")


def traced(
    record: RunRecord, steps: int, build: Callable[[], T], watch: Callable[[Tracer, T], None], run: Callable[[T], None]
) -> None:
    """Build what runs the replicas, and run it with their first steps traced into `record.trace`, unless whoever runs
    them leaves a trace of its own there."""
    tracer = Tracer(record.num_replicas, steps)
    with shown_to(tracer.see):
        threads = build()
    watch(tracer, threads)
    try:
        run(threads)
    finally:
        record.trace = record.trace or tracer.trace()


def watch_training(tracer: Tracer, threads: Threads) -> None:
    _watch_vector(tracer, threads.shared)
    tracer.see_locks_of(threads.mode)
    joint = getattr(threads.mode, "joint", None)
    if joint is not None:
        tracer.time(joint, "add_share", UPDATE, lambda replica: f"update share {replica.replica_id}", _committed)
        tracer.time(joint, "count", UPDATE, lambda: "update iterations")
    if threads.apart is not None:
        tracer.time(threads.apart, "write", WRITE, lambda replica: "write what is apart")
    tracer.time(threads.steps, "take", COMPUTE, lambda *given: "compute")
    _watch_cursor(tracer, threads.cursor)

    def over_cursor(make: Callable[[], Cursor[Tensor]]) -> Callable[[], Cursor[Tensor]]:
        def made() -> Cursor[Tensor]:
            cursor = make()
            _watch_cursor(tracer, cursor)
            return cursor

        return made

    tracer.cover(threads, "_cursor", over_cursor)  # main makes another one after a first call of its own

    def over(take_step: Callable[..., None]) -> Callable[..., None]:
        def traced_step(replica: Replica, recorder: Recorder, step: int, *given: Any) -> None:
            if not step:
                _watch_recorder(tracer, recorder)  # which each replica makes for itself
            tracer.begin(replica.replica_id)
            try:
                take_step(replica, recorder, step, *given)
            finally:
                tracer.end()

        return traced_step

    tracer.cover(threads, "_take_step", over)


def watch_loop(tracer: Tracer, threads: LoopThreads) -> None:
    """A loop of the user's own: its locks by the names of its attributes, and what it does to the shared vector.

    What else it does, computing included, nobody can tell apart.
    """
    _watch_vector(tracer, threads.shared)
    tracer.told_apart.discard(COMPUTE)  # a delta's is the least of it
    tracer.see_locks_of(threads.loop)

    def over(run: Callable[[LoopReplica, int], None]) -> Callable[[LoopReplica, int], None]:
        def traced_run(replica: LoopReplica, steps: int) -> None:
            def over_note(note: Callable[..., None]) -> Callable[..., None]:
                def noted(*given: Any) -> None:
                    note(*given)
                    tracer.end()
                    tracer.begin(replica.replica_id)

                return noted

            _watch_recorder(tracer, replica._recorder)
            tracer.cover(replica, "_note", over_note)  # which ends a step
            tracer.begin(replica.replica_id)
            run(replica, steps)

        return traced_run

    tracer.cover(threads.loop, "run", over)


def _watch_cursor(tracer: Tracer, cursor: Cursor[Tensor]) -> None:
    tracer.time(cursor, "take", DATA, lambda replica_id, step: "take batch")


def _watch_recorder(tracer: Tracer, recorder: Recorder) -> None:
    tracer.time(recorder, "note", LOGGING, lambda *given: "note step")
    tracer.time(recorder, "flush", LOGGING, lambda: "read rows off")


def _watch_vector(tracer: Tracer, shared: SharedVector) -> None:
    def named(verb: str) -> Callable[[Replica, Part], str]:
        return lambda replica, part: f"{verb} {part.name}"

    tracer.time(shared, "copy_to", READ, lambda replica: "read snapshot", _read)
    tracer.time(shared, "copy_part", READ, named("read"), lambda replica, part: _read(replica))
    # The optimizer's rule: part of the critical section wherever it is made inside one.
    tracer.time(shared, "prepare", COMPUTE, lambda replica: "prepare delta")
    tracer.time(shared, "delta", COMPUTE, lambda replica, base=None: "compute delta")
    tracer.time(shared, "add", UPDATE, lambda replica, delta: "update all", lambda replica, _: _committed(replica))
    tracer.time(shared, "add_part", UPDATE, named("update"), lambda replica, part: _committed(replica))
    tracer.time(shared, "add_weights", UPDATE, lambda *_: "update weights", lambda replica, _: _committed(replica))
    tracer.time(shared, "replace", WRITE, lambda *_: "write all", lambda replica, _: _committed(replica))
    tracer.time(shared, "replace_slots", WRITE, lambda values: "write slots")


def _read(replica: Replica) -> Mapping[str, int]:
    return {"version": replica.version}


def _committed(replica: Replica) -> Mapping[str, int]:
    return {"snapshot_version": replica.version, "staleness": replica.staleness}

"""`trace.json`: what the format asks for, what was done in the order, and that tracing a free run leaves nothing."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from command import ROOT, Command, verdict

from trainer.audit import spans as spans_module
from trainer.audit.spans import (
    COMPUTE,
    CRITICAL_SECTION,
    DATA,
    EVALUATION,
    GRAPH_CALL,
    LOCK_WAIT,
    LOGGING,
    READ,
    STEP,
    UPDATE,
    Span,
    Trace,
)
from trainer.audit.tracer import TracedBarrier, TracedLock, TracedReadWriteLock, Tracer
from trainer.config import OPTIONS, Audit, Config, ConfigError, Schedule, Search, Strategy
from trainer.report import trace as trace_module
from trainer.report.trace import FILE_NAME, as_json, of_history, save
from trainer.rules import validate
from trainer.schedule.locks import Barrier, Lock, RLock, SharedLock, modelled, shown_to
from trainer.schedule.operations import BEGIN, WRITE
from trainer.schedule.operations import COMPUTE as COMPUTED
from trainer.schedule.operations import READ as READING
from trainer.schedule.operations import UPDATE as UPDATED
from trainer.schedule.order import Deadlock, Order
from trainer.schedule.point import mark, point
from trainer.schedule.turnstile import Turnstile

Body = Callable[[], None]
Event = dict[str, Any]


# Whether a trace is one.


def complete(trace: dict[str, Any]) -> list[Event]:
    return [event for event in trace["traceEvents"] if event["ph"] == "X"]


def lane_names(trace: dict[str, Any]) -> dict[int, str]:
    return {each["tid"]: each["args"]["name"] for each in trace["traceEvents"] if each["name"] == "thread_name"}


def by_replica(trace: dict[str, Any], replica: int) -> list[Event]:
    """A replica's spans, on whatever lane, in the order in which they began."""
    names = lane_names(trace)
    own = [event for event in complete(trace) if names[event["tid"]].split(",")[0] == f"replica {replica}"]
    return sorted(own, key=lambda event: (event["ts"], -event["dur"]))


def check(trace: dict[str, Any]) -> None:
    """Hold a trace to the documented format, and to what cannot be otherwise."""
    assert json.loads(json.dumps(trace, allow_nan=False)) == trace
    assert set(trace) == {"traceEvents", "displayTimeUnit", "otherData"}
    assert trace["displayTimeUnit"] in ("ms", "ns")
    names = lane_names(trace)
    for event in trace["traceEvents"]:
        assert event["ph"] in ("X", "M")
        assert event["name"]
        assert isinstance(event["name"], str)
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        assert isinstance(event["args"], dict)
        if event["ph"] == "X":
            assert event["tid"] in names
            assert event["cat"] in spans_module.KINDS
            assert event["ts"] >= 0
            assert event["dur"] >= 0
    assert min((event["ts"] for event in complete(trace)), default=0) == 0
    for lane in names:
        _check_nesting([event for event in complete(trace) if event["tid"] == lane])
    for own in range(trace["otherData"]["num_replicas"]):
        assert f"replica {own}" in names.values()
        _check_locks(by_replica(trace, own))
    _check_exclusion([event for event in complete(trace) if event["cat"] == CRITICAL_SECTION])


def end(event: Event) -> float:
    return float(round(event["ts"] + event["dur"], 3))  # to the nanosecond


def _check_nesting(on_lane: Sequence[Event]) -> None:
    """Begins in order; any two are apart, or one encloses the other."""
    around: list[Event] = []
    for before, event in zip([None, *on_lane], on_lane, strict=False):
        assert before is None or event["ts"] >= before["ts"]
        while around and end(around[-1]) <= event["ts"]:
            around.pop()
        assert not around or end(event) <= end(around[-1])
        around.append(event)


def _check_locks(own: Sequence[Event]) -> None:
    """Whoever was granted a lock was inside from then on."""
    granted = [
        (event["name"].removeprefix("wait for "), end(event))
        for event in own
        if event["cat"] == LOCK_WAIT and event["args"].get("granted", True)
    ]
    inside = [(event["name"], event["ts"]) for event in own if event["cat"] == CRITICAL_SECTION]
    assert set(granted) <= set(inside)


def _check_exclusion(sections: Sequence[Event]) -> None:
    """No two replicas were inside one lock, unless both only read under it."""
    for one in sections:
        for other in sections:
            if one["tid"] == other["tid"] or one["name"] != other["name"]:
                continue
            if one["args"].get("shared") and other["args"].get("shared"):
                continue
            assert end(one) <= other["ts"] or end(other) <= one["ts"]


def a_good_trace() -> list[Span]:
    return [
        Span(0, 0, STEP, "step 0", 0, 100),
        Span(0, 0, LOCK_WAIT, "wait for lock", 0, 10),
        Span(0, 0, CRITICAL_SECTION, "lock", 10, 30),
        Span(1, 0, LOCK_WAIT, "wait for lock", 5, 30),
        Span(1, 0, CRITICAL_SECTION, "lock", 30, 50),
    ]


@pytest.mark.parametrize(
    ("at", "planted"),
    [
        (0, Span(0, 0, STEP, "step 0", 100, 0)),
        (0, Span(0, 0, "walk", "step 0", 0, 100)),
        (0, Span(0, 0, STEP, "", 0, 100)),
        (3, Span(1, 0, LOCK_WAIT, "wait for lock", 5, 29)),
        (4, Span(1, 0, CRITICAL_SECTION, "lock", 29, 50)),
        (4, Span(1, 0, CRITICAL_SECTION, "other", 30, 50)),
    ],
)
def test_these_checks_notice_what_is_wrong_with_a_trace(at: int, planted: Span) -> None:
    spans = a_good_trace()
    check(as_json(Trace(2, spans), 1))
    spans[at] = planted
    with pytest.raises(AssertionError):
        check(as_json(Trace(2, spans), 1))


# Orders that a schedule has made.


def ordered(bodies: Sequence[Body], turns: Sequence[int] = ()) -> Order:
    """Run bodies, whoever `turns` names first, else whoever went last."""
    left = list(turns)

    def choose(order: Order) -> int:
        able = order.able()
        while left:
            if (own := left.pop(0)) in able:
                return own
        return order.last if order.last in able else able[0]

    order = Order(len(bodies), choose)
    with suppress(Deadlock):
        Turnstile(order, 30.0).run(bodies)
    return order


def traced(order: Order, steps: int = 1, token: str = "") -> dict[str, Any]:
    trace = as_json(of_history(order.history, token), steps)
    check(trace)
    return trace


def kinds(own: Sequence[Event]) -> list[str]:
    return [event["cat"] for event in own]


def test_an_order_is_shown_with_waits_sections_versions_and_bases() -> None:
    with modelled():
        lock, barrier = Lock("lock"), Barrier(2, "barrier")

    def body() -> None:
        for _ in range(2):
            mark(BEGIN)
            with lock:
                point(READING, "weight")
            mark(COMPUTED)
            with lock:
                point(UPDATED, "weight")
            barrier.wait()

    trace = traced(ordered([body, body], turns=[0, 1]), steps=2, token="s1.2.abc")
    assert trace["otherData"] == {"num_replicas": 2, "steps": 2, "steps_left_out": 0, "token": "s1.2.abc"}
    for own in range(2):
        mine = by_replica(trace, own)
        assert [event["name"] for event in mine if event["cat"] == STEP] == ["step 0", "step 1"]
        assert all(event["args"]["token"] == "s1.2.abc" for event in mine if event["cat"] == STEP)
        assert sorted(kinds(mine[1:7])) == sorted(
            [LOCK_WAIT, CRITICAL_SECTION, READ, COMPUTE, LOCK_WAIT, CRITICAL_SECTION]
        )
        assert [event["name"] for event in mine if event["cat"] == "barrier wait"] == ["wait at barrier"] * 2
    updates = sorted((event for event in complete(trace) if event["cat"] == UPDATE), key=lambda event: event["ts"])
    assert [event["args"]["versions"] for event in updates] == [{"weight": version} for version in (1, 2, 3, 4)]
    assert [event["args"]["bases"] for event in updates] == [{"weight": version} for version in (0, 1, 2, 3)]


def test_a_replica_that_waits_for_a_lock_waits_while_another_is_inside() -> None:
    with modelled():
        lock = Lock("lock")

    def body() -> None:
        with lock:
            point(READING, "weight")

    # Replica 0 goes in, 1 comes to the lock, 0 goes on.
    trace = traced(ordered([body, body], turns=[0]))
    (wait,) = (event for event in by_replica(trace, 1) if event["cat"] == LOCK_WAIT)
    (section,) = (event for event in by_replica(trace, 0) if event["cat"] == CRITICAL_SECTION)
    assert wait["ts"] <= section["ts"]
    assert end(wait) >= end(section)


def test_a_deadlock_is_shown_as_waits_that_never_end_under_locks_that_are_never_given_back() -> None:
    with modelled():
        locks = [Lock("one"), Lock("other")]

    def body(first: int) -> Body:
        def nested() -> None:
            mark(BEGIN)
            with locks[first], locks[1 - first]:
                pass

        return nested

    trace = traced(ordered([body(0), body(1)], turns=[0, 1]))
    waits = [event for event in complete(trace) if event["args"].get("granted") is False]
    held = [event for event in complete(trace) if event["args"].get("released") is False]
    assert sorted(event["name"] for event in waits) == ["wait for one", "wait for other"]
    assert sorted(event["name"] for event in held) == ["one", "other"]
    last = max(end(event) for event in complete(trace))
    assert {end(event) for event in (*waits, *held)} == {last}
    assert kinds(by_replica(trace, 0)).count(STEP) == 1


def test_locks_given_back_in_the_order_in_which_they_were_taken_have_a_lane_for_what_overlaps() -> None:
    with modelled():
        one, other = Lock("one"), Lock("other")

    def hand_over_hand() -> None:
        one.acquire()
        other.acquire()
        one.release()
        other.release()

    trace = traced(ordered([hand_over_hand]))
    assert list(lane_names(trace).values()) == ["replica 0", "replica 0, overlapping"]


def test_a_lock_that_was_tried_in_vain_is_no_critical_section() -> None:
    with modelled():
        lock, again = Lock("lock"), RLock("again")

    def body() -> None:
        assert lock.acquire(blocking=False)
        assert not lock.acquire(blocking=False)
        lock.release()
        with again, again:
            pass

    sections = [event["name"] for event in complete(traced(ordered([body]))) if event["cat"] == CRITICAL_SECTION]
    assert sections == ["lock", "again", "again"]


def test_a_lock_that_was_waited_for_in_vain_is_no_critical_section() -> None:
    with modelled():
        lock = Lock("lock")

    def body() -> None:
        with lock:
            assert not lock.acquire(timeout=0.1)

    found = complete(traced(ordered([body])))
    assert [event["args"] for event in found if event["cat"] == LOCK_WAIT] == [
        {"step": -1},
        {"step": -1, "granted": False},
    ]
    assert kinds(found).count(CRITICAL_SECTION) == 1


def test_readers_are_inside_together() -> None:
    with modelled():
        lock = SharedLock("lock")

    def read() -> None:
        with lock.read():
            point(READING, "weight")

    def write() -> None:
        with lock.write():
            point(WRITE, "weight")

    trace = traced(ordered([read, read, write], turns=[0, 1, 0, 1]))
    sections = [event for event in complete(trace) if event["cat"] == CRITICAL_SECTION]
    assert [event["args"].get("shared", False) for event in sections] == [True, True, False]
    assert sections[1]["ts"] < end(sections[0])


def test_a_lock_that_another_replica_gives_back_ends_its_section() -> None:
    with modelled():
        lock = Lock("lock")

    def take() -> None:
        lock.acquire()

    def give_back() -> None:
        point(READING, "weight")
        lock.release()

    (section,) = (
        event for event in complete(traced(ordered([take, give_back], turns=[0]))) if event["cat"] == CRITICAL_SECTION
    )
    assert "released" not in section["args"]


def test_an_order_that_nobody_finished_is_shown_as_far_as_it_went() -> None:
    def raises() -> None:
        mark(BEGIN)
        point(READING, "weight")
        raise RuntimeError("on purpose")

    order = Order(1, lambda order: 0)
    with pytest.raises(Exception, match="on purpose"):
        Turnstile(order, 30.0).run([raises])
    assert kinds(by_replica(traced(order), 0)) == [STEP, READ]


def test_times_are_no_part_of_what_two_replays_have_in_common() -> None:
    def body() -> None:
        point(READING, "weight")

    assert ordered([body, body]).history == ordered([body, body]).history


# Files.


def steps_of(replica: int, number: int) -> Iterator[Span]:
    for step in range(number):
        yield Span(replica, step, STEP, f"step {step}", step * 1000, step * 1000 + 900)
        yield Span(replica, step, COMPUTE, "compute", step * 1000 + 10, step * 1000 + 500)


def test_a_file_says_how_many_steps_are_not_in_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(trace_module, "MAX_SPANS", 21)
    save(Trace(2, [*steps_of(0, 10), *steps_of(1, 10)]), tmp_path, steps=50)
    trace = json.loads((tmp_path / FILE_NAME).read_text())
    check(trace)
    # Five steps of two replicas are 20 spans.
    assert trace["otherData"]["steps_left_out"] == 45
    assert len(complete(trace)) == 20
    assert os.listdir(tmp_path) == [FILE_NAME]


def test_a_step_that_does_not_fit_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_module, "MAX_SPANS", 3)
    trace = as_json(Trace(1, [Span(0, 0, READ, "read", at, at + 1) for at in range(9)]), 1)
    assert [event["ts"] for event in complete(trace)] == [0, 0.001, 0.002]


def test_a_run_without_a_span_has_a_lane_a_replica() -> None:
    trace = as_json(Trace(3), 1)
    check(trace)
    assert list(lane_names(trace).values()) == ["replica 0", "replica 1", "replica 2"]


def test_a_file_that_cannot_be_written_whole_is_not_there(tmp_path: Path) -> None:
    unheard = Trace(1, [Span(0, 0, READ, "read", 0, 1, {"value": float("nan")})])
    with pytest.raises(ValueError, match="JSON compliant"):
        save(unheard, tmp_path, steps=1)
    assert not (tmp_path / FILE_NAME).exists()


# Free runs.


class Ledger:
    """What replicas share in these tests: a number that is read and written under whatever locks a test wants."""

    def __init__(self, replicas: int = 2) -> None:
        self.lock = Lock("the lock")
        self.locks = [(Lock("first"), 0), (Lock("second"), 1)]
        self.barrier = Barrier(replicas, "the barrier")
        self.shared = SharedLock("the shared lock")
        self.bare = threading.Lock()
        self.value = 0

    def step(self, replica: int) -> None:
        with self.lock:
            self.value = self.read() + 1
        self.barrier.wait()
        with self.shared.read():
            self.read()
        with self.shared.write():
            self.value += 1
        for lock, _ in self.locks:
            with lock:
                pass
        with self.bare:
            pass

    def read(self) -> int:
        return self.value


@contextmanager
def a_traced_ledger(replicas: int, steps: int) -> Iterator[tuple[Ledger, Tracer]]:
    tracer = Tracer(replicas, steps)
    with shown_to(tracer.see):
        ledger = Ledger(replicas)
    tracer.see_locks_of(ledger)
    tracer.time(ledger, "read", READ, lambda: "read value", lambda: {"version": ledger.value})

    def over(step: Callable[[int], None]) -> Callable[[int], None]:
        def traced_step(replica: int) -> None:
            tracer.begin(replica)
            step(replica)
            tracer.end()

        return traced_step

    tracer.cover(ledger, "step", over)
    yield ledger, tracer


def take_steps(ledger: Ledger, replicas: int, number: int) -> None:
    def body(own: int) -> None:
        for _ in range(number):
            ledger.step(own)

    threads = [threading.Thread(target=body, args=(own,)) for own in range(replicas)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)


def plain_types() -> list[type]:
    return [type(value) for value in vars(Ledger()).values()]


def test_the_first_steps_of_a_free_run_are_shown_and_the_sums_are_right() -> None:
    with a_traced_ledger(4, 3) as (ledger, tracer):
        take_steps(ledger, 4, 20)
    assert ledger.value == 2 * 4 * 20
    trace = as_json(tracer.trace(), 20)
    check(trace)
    assert trace["otherData"]["steps_left_out"] == 17
    for own in range(4):
        found = kinds(by_replica(trace, own))
        assert found.count(STEP) == 3
        assert found.count(LOCK_WAIT) == found.count(CRITICAL_SECTION) == 3 * 6
        assert found.count("barrier wait") == 3
        assert found.count(READ) == 6
    names = {event["name"] for event in complete(trace) if event["cat"] == CRITICAL_SECTION}
    assert names == {"the lock", "the shared lock", "first", "second", "bare"}


def test_after_its_steps_a_traced_run_is_as_one_that_never_was() -> None:
    with a_traced_ledger(2, 3) as (ledger, _):
        kept = {name for name, value in vars(ledger).items() if isinstance(value, (TracedLock, TracedBarrier))}
        assert kept == {"lock", "barrier", "bare"}
        assert isinstance(ledger.shared, TracedReadWriteLock)
        take_steps(ledger, 2, 2)
        assert "step" in vars(ledger)
        take_steps(ledger, 2, 1)
    assert set(vars(ledger)) == set(vars(Ledger()))
    assert [type(value) for value in vars(ledger).values()] == plain_types()
    assert [type(lock) for lock, _ in ledger.locks] == [type(lock) for lock, _ in Ledger().locks]


def test_a_lock_that_is_held_while_tracing_ends_is_given_back() -> None:
    with a_traced_ledger(1, 1) as (ledger, tracer):
        tracer.begin(0)
        held = ledger.lock
        held.acquire()
        tracer.end()
        assert ledger.lock is not held
        assert not ledger.lock.acquire(blocking=False)
        held.release()
        assert ledger.lock.acquire(blocking=False)


def test_a_replica_with_too_many_spans_is_traced_no_further(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.audit.tracer.MAX_SPANS", 20)
    with a_traced_ledger(1, 1000) as (ledger, tracer):
        take_steps(ledger, 1, 50)
    assert kinds(by_replica(as_json(tracer.trace(), 50), 0)).count(STEP) == 2
    assert [type(value) for value in vars(ledger).values()] == plain_types()


def test_a_method_that_is_covered_twice_is_bare_again_afterwards() -> None:
    ledger, tracer = Ledger(), Tracer(1, 3, lanes=("host",))
    tracer.time(ledger, "read", READ, lambda: "read")
    tracer.time(ledger, "read", COMPUTE, lambda: "read")
    tracer.begin(0)
    ledger.read()
    tracer.end(2)
    tracer.begin(0)
    tracer.end()
    assert "read" not in vars(ledger)
    trace = tracer.trace()
    assert [(span.kind, span.name, span.step) for span in trace.spans] == [
        (READ, "read", 0),
        (COMPUTE, "read", 0),
        (STEP, "steps 0 to 1", 0),
        (STEP, "step 2", 2),
    ]
    assert set(trace.told_apart) == {STEP, READ, COMPUTE}
    assert as_json(trace, 9)["otherData"]["steps_left_out"] == 6


def test_without_tracing_locks_are_the_plain_ones() -> None:
    assert type(Lock()) is type(threading.Lock())
    assert type(RLock()) is type(threading.RLock())
    assert not isinstance(Barrier(2), TracedBarrier)


# The key.


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Config(audit=Audit(trace_steps=-1)), "audit.trace_steps must be at least 0; got -1."),
        (
            Config(audit=Audit("none", trace_steps=3)),
            "audit.trace_steps=3 needs audit=counters, profile or full: audit=none records nothing.",
        ),
        (
            Config(schedule=Search(), audit=Audit(trace_steps=3)),
            "audit.trace_steps=3 does not go with schedule=search, whose trace.json shows every step. Leave it out.",
        ),
        (
            Config(schedule=Search(), audit=OPTIONS["audit"]["profile"]),
            "audit=profile does not go with schedule=search: what it times is a free run. Try audit=counters.",
        ),
        (
            Config(audit=Audit("profile", trace_steps=0)),
            "audit.trace_steps must be at least 1; got 0. audit=counters traces none.",
        ),
    ],
)
def test_steps_that_cannot_be_traced_are_refused(config: Config, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        validate(config)
    assert str(refused.value) == message


@pytest.mark.parametrize("strategy", ["threads", "mirrored"])
@pytest.mark.parametrize("schedule", [Schedule(), Search()])
def test_the_steps_of_the_full_audit_are_no_reason_to_refuse(strategy: str, schedule: object) -> None:
    assert OPTIONS["audit"]["full"].trace_steps == 20
    validate(Config(strategy=Strategy(strategy), schedule=schedule, audit=OPTIONS["audit"]["full"]))


# Runs.


def run(command: Command, *arguments: str, folder: str = "run") -> dict[str, Any]:
    ended = command(f"hydra.run.dir={folder}", "fail_on=never", *arguments, PYTHONPATH=_path())
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return verdict(command.folder / folder)


def _path() -> str:
    return os.pathsep.join(map(str, (ROOT, ROOT / "scripts" / "examples")))


def written(command: Command, folder: str = "run") -> dict[str, Any]:
    trace: dict[str, Any] = json.loads((command.folder / folder / FILE_NAME).read_text())
    check(trace)
    return trace


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "a_step"),
    [
        ("locked", {LOCK_WAIT: 2, CRITICAL_SECTION: 2, READ: 1, UPDATE: 1, DATA: 1, LOGGING: 1}),
        ("reader_writer", {LOCK_WAIT: 2, CRITICAL_SECTION: 2, READ: 1, UPDATE: 1}),
        ("per_variable_lock", {LOCK_WAIT: 8, CRITICAL_SECTION: 8, READ: 4, UPDATE: 4}),
        ("overwrite", {LOCK_WAIT: 0, CRITICAL_SECTION: 0, READ: 1, "write": 1}),
    ],
)
def test_a_free_run_is_traced_step_by_step(command: Command, mode: str, a_step: dict[str, int]) -> None:
    run(command, f"update_mode={mode}", "train.steps=30", "audit.trace_steps=4")
    trace = written(command)
    assert trace["otherData"] == {"num_replicas": 2, "steps": 30, "steps_left_out": 26}
    for own in range(2):
        found = kinds(by_replica(trace, own))
        assert {kind: found.count(kind) for kind in (STEP, *a_step)} == {
            STEP: 4,
            **{kind: 4 * number for kind, number in a_step.items()},
        }
        assert [event["name"] for event in by_replica(trace, own)].count("compute") == 4


@pytest.mark.slow
def test_a_traced_run_ends_in_the_same_bits_and_an_untraced_one_leaves_no_file(command: Command) -> None:
    arguments = ("train.steps=30", "num_replicas=3", "optimizer=adam")
    plain = run(command, *arguments, folder="plain")
    full = run(command, *arguments, "audit=full", folder="full")
    assert full["final_parameters_sha256"] == plain["final_parameters_sha256"]
    assert not (command.folder / "plain" / FILE_NAME).exists()
    trace = written(command, "full")
    assert trace["otherData"]["steps_left_out"] == 10
    assert kinds(by_replica(trace, 0)).count("barrier wait") == 2 * 20


@pytest.mark.slow
def test_a_free_run_under_mirrored_is_traced_call_by_call(command: Command) -> None:
    run(command, "strategy=mirrored", "train.steps=30", "audit.trace_steps=20", "train.evaluate_every=4")
    trace = json.loads((command.folder / "run" / FILE_NAME).read_text())
    assert set(lane_names(trace).values()) == {"host"}
    _check_nesting(complete(trace))
    steps = [event for event in complete(trace) if event["cat"] == STEP]
    calls = [event for event in complete(trace) if event["cat"] == GRAPH_CALL]
    taken = sum(event["args"].get("steps", 1) for event in steps)
    assert trace["otherData"] == {"num_replicas": 2, "steps": 30, "steps_left_out": 30 - taken}
    assert 20 <= taken < 30
    assert [event["name"] for event in steps] == [event["name"] for event in calls]
    assert {LOGGING, EVALUATION} <= set(kinds(complete(trace)))


@pytest.mark.slow
def test_a_loop_of_ones_own_is_traced_by_the_names_of_its_locks(command: Command) -> None:
    run(command, "workload._target_=own_loop.Loop", "train.steps=20", "audit.trace_steps=3")
    found = by_replica(written(command), 0)
    assert kinds(found).count(STEP) == 3
    assert {event["name"] for event in found if event["cat"] == CRITICAL_SECTION} == {"lock"}


@pytest.mark.slow
def test_a_search_leaves_the_trace_of_the_order_that_it_tells_of(command: Command) -> None:
    case = ("update_mode=overwrite", "model=linear", "train.steps=1")
    found = run(command, *case, "schedule=lost_update")
    token = written(command)["otherData"]["token"]
    assert f"schedule.token={token}" in found["anomalies"][0]["replay"]
    run(command, *case, "schedule=replay", f"schedule.token={token}", folder="again")
    again = written(command, "again")
    assert again["otherData"]["token"] == token
    names = [[event["name"] for event in by_replica(trace, 0)] for trace in (again, written(command))]
    assert names[0] == names[1]
    # Each replica's update is based on the first version: one is lost.
    bases = [event["args"]["bases"] for event in complete(again) if event["name"] == "write linear/logits/bias"]
    assert bases == [{"linear/logits/bias": 0}] * 2


@pytest.mark.slow
def test_an_order_under_mirrored_is_traced(command: Command) -> None:
    run(command, "strategy=mirrored", "model=linear", "train.steps=1", "schedule=search")
    for own in range(2):
        found = kinds(by_replica(written(command), own))
        assert {STEP, READ, COMPUTE, UPDATE, "barrier wait"} <= set(found)

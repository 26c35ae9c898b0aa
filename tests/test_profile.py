"""Where a step's time goes: phases that exclude each other and add up, from spans and from arrays."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import ROOT, Command, verdict
from report_factory import complete, make_config, make_record, make_verdict
from rich.console import Console

from trainer.audit import profile
from trainer.audit import spans as kinds
from trainer.audit.judge import judge
from trainer.audit.profile import OTHER, PHASES, TOLD, StepTimes, times_of
from trainer.audit.records import RunRecord
from trainer.audit.spans import (
    BARRIER_WAIT,
    COMPUTE,
    CRITICAL_SECTION,
    DATA,
    GRAPH_CALL,
    KINDS,
    LOCK_WAIT,
    LOGGING,
    READ,
    STEP,
    UPDATE,
    Span,
    Trace,
)
from trainer.report import console as reports
from trainer.report.tags import DESCRIPTIONS

# Kind, start, stop: milliseconds.
Drawn = tuple[str, int, int]
MILLISECOND = 1_000_000


def traced(*steps: list[Drawn], replicas: int = 1, told_apart: tuple[str, ...] = KINDS) -> Trace:
    """Spans of the steps of each of some replicas; the first span of each step is the step's own."""
    spans = [
        Span(own, number, kind, kind, start * MILLISECOND, stop * MILLISECOND)
        for own in range(replicas)
        for number, step in enumerate(steps)
        for kind, start, stop in step
    ]
    return Trace(replicas, spans, told_apart=told_apart)


def milliseconds(trace: Trace) -> list[dict[str, float]]:
    """What each step of the first replica went to, without phases that took no time."""
    (times, *_) = times_of(trace)
    found = {name: np.round(seconds * 1e3, 6).tolist() for name, seconds in times.seconds().items()}
    return [
        {name: seconds[step] for name, seconds in found.items() if seconds[step]} for step in range(len(times.wall))
    ]


A_STEP: list[Drawn] = [
    (STEP, 0, 100),
    (DATA, 1, 4),
    (LOCK_WAIT, 5, 10),
    (CRITICAL_SECTION, 10, 20),
    (READ, 11, 19),
    (COMPUTE, 20, 60),
    (LOCK_WAIT, 60, 75),
    (CRITICAL_SECTION, 75, 90),
    (UPDATE, 76, 89),
    (LOGGING, 92, 98),
]


def test_phases_exclude_each_other_and_add_up_to_the_step() -> None:
    (found,) = milliseconds(traced(A_STEP))
    assert found == {"data": 3, "lock_wait": 20, "critical_section": 25, "compute": 40, "logging": 6, "other": 6}
    assert sum(found.values()) == 100


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        # All that is done under a lock is the critical section.
        ([(CRITICAL_SECTION, 10, 90), (COMPUTE, 20, 60), (LOGGING, 60, 80)], {"critical_section": 80, "other": 20}),
        # A wait under another lock is a wait, and so is one at a barrier.
        (
            [(CRITICAL_SECTION, 0, 100), (LOCK_WAIT, 10, 30), (BARRIER_WAIT, 50, 60)],
            {"critical_section": 70, "lock_wait": 20, "barrier": 10},
        ),
        # Locks given back in the order in which they were taken.
        ([(CRITICAL_SECTION, 10, 50), (CRITICAL_SECTION, 30, 80)], {"critical_section": 70, "other": 30}),
        # Under no lock.
        ([(READ, 0, 10), (COMPUTE, 10, 90), (UPDATE, 90, 100)], {"unlocked_access": 20, "compute": 80}),
        # A section that was entered before the step and is left after it.
        ([(CRITICAL_SECTION, -50, 200)], {"critical_section": 100}),
        ([(COMPUTE, 0, 0)], {"other": 100}),
        ([], {"other": 100}),
    ],
)
def test_a_moment_belongs_to_one_phase(spans: list[Drawn], expected: dict[str, float]) -> None:
    assert milliseconds(traced([(STEP, 0, 100), *spans])) == [expected]


def test_a_span_over_two_steps_belongs_to_both() -> None:
    steps: list[list[Drawn]] = [[(STEP, 0, 50)], [(STEP, 50, 90), (CRITICAL_SECTION, 30, 60)]]
    assert milliseconds(traced(*steps)) == [
        {"critical_section": 20, "other": 30},
        {"critical_section": 10, "other": 30},
    ]


def test_what_comes_between_two_steps_is_the_later_one_s() -> None:
    steps: list[list[Drawn]] = [[(STEP, 0, 50)], [(STEP, 90, 100), (LOGGING, 55, 75)]]
    assert milliseconds(traced(*steps)) == [{"other": 50}, {"logging": 20, "other": 30}]


def test_steps_that_were_taken_together_have_a_part_each() -> None:
    trace = Trace(
        3,
        [
            Span(0, 0, STEP, "steps 0 to 3", 0, 80 * MILLISECOND, {"steps": 4}),
            Span(0, 0, GRAPH_CALL, "steps 0 to 3", 0, 40 * MILLISECOND),
            Span(0, 4, STEP, "step 4", 80 * MILLISECOND, 90 * MILLISECOND),
        ],
        told_apart=(STEP, GRAPH_CALL),
        lanes=("host",),
    )
    assert milliseconds(trace) == [{"graph_call": 10, "other": 10}] * 4 + [{"other": 10}]
    (times,) = times_of(trace)
    assert times.replica_id is None


def test_any_spans_at_all_add_up() -> None:
    random = np.random.default_rng(0)
    steps: list[list[Drawn]] = []
    for number in range(40):
        inside = [(str(random.choice(KINDS[1:])), *np.sort(random.integers(-20, 120, 2))) for _ in range(12)]
        begins = number * 100
        steps.append([(STEP, begins, begins + 100), *((kind, begins + a, begins + b) for kind, a, b in inside)])
    (times,) = times_of(traced(*steps))
    seconds = times.seconds()
    assert set(seconds) == {*PHASES, OTHER}
    np.testing.assert_allclose(sum(seconds.values()), times.wall, atol=1e-12)
    assert all((each >= 0).all() for each in seconds.values())
    # The same, millisecond by millisecond.
    expected = [dict.fromkeys(seconds, 0) for _ in steps]
    everything = [span for step in steps for span in step[1:]]
    for moment in range(40 * 100):
        covering = {kind for kind, start, stop in everything if start <= moment < stop}
        phase = next((name for name, made_of in PHASES.items() if covering & set(made_of)), OTHER)
        expected[moment // 100][phase] += 1
    for name, each in seconds.items():
        np.testing.assert_allclose(each * 1e3, [step[name] for step in expected], atol=1e-6)


def test_what_nobody_looked_for_is_no_phase() -> None:
    (times,) = times_of(traced(A_STEP, told_apart=(STEP, LOCK_WAIT, CRITICAL_SECTION)))
    assert set(times.phases) == {"lock_wait", "critical_section"}


def test_an_order_of_a_schedule_has_no_profile() -> None:
    record = make_record(make_config())
    record.trace = traced(A_STEP, told_apart=())
    assert profile.step_times(record) == []
    assert profile.metrics(record) == {}
    assert profile.rows(record) == []


# Arrays that whoever ran the steps has measured.


def measured(replicas: int = 2, steps: int = 5) -> list[StepTimes]:
    """Steps of 10 ms, half computing and a tenth times its number waiting, but for the first, of a second."""
    wall = np.full(steps, 0.010)
    wall[0] = 1.0
    return [
        StepTimes(own, wall, {"compute": wall / 2, "lock_wait": np.full(steps, 0.001 * own)}) for own in range(replicas)
    ]


def test_arrays_need_no_spans() -> None:
    record = make_record(make_config())
    record.trace = Trace(2, times=measured())
    found = profile.profile(profile.step_times(record))
    assert found is not None
    assert found.steps == 8
    assert found.step_seconds == pytest.approx(0.010)
    assert found.phases["compute"] == profile.Phase(pytest.approx(0.005), pytest.approx(0.5))
    assert found.phases["lock_wait"].share == pytest.approx(0.05)
    assert [found.replicas[own]["lock_wait"].share for own in range(2)] == [0, pytest.approx(0.1)]
    assert sum(phase.share for phase in found.phases.values()) == pytest.approx(1)
    assert list(found.phases) == [name for name in TOLD if name in found.phases]


def test_a_first_step_is_shown_and_not_summed_up() -> None:
    by_step = profile.by_step(measured())
    assert by_step[0] == pytest.approx({"compute": 0.5, "lock_wait": 0.0005, "other": 0.4995})
    assert by_step[4] == pytest.approx({"compute": 0.005, "lock_wait": 0.0005, "other": 0.0045})
    assert profile.profile(measured(steps=1)) is None


def test_a_step_is_the_mean_over_the_replicas_that_took_it() -> None:
    late = StepTimes(1, np.array([2.0]), {"compute": np.array([1.0])}, first_step=1)
    early = StepTimes(0, np.array([1.0, 1.0]), {"compute": np.array([0.5, 0.0])})
    assert profile.by_step([late, early]) == {0: {"compute": 0.5, "other": 0.5}, 1: {"compute": 0.5, "other": 1.0}}


@pytest.mark.parametrize(
    ("phases", "why"),
    [
        ({"sleep": np.zeros(2)}, "a step has no phase 'sleep'; it has lock_wait, "),
        ({"compute": np.zeros(3)}, "compute has 3 steps and the steps themselves are 2"),
        ({"compute": np.array([0.5, 0.5]), "data": np.array([0.5, 0.6])}, "a step of replica 0 take more time"),
    ],
)
def test_arrays_that_cannot_be_are_refused(phases: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        StepTimes(0, np.ones(2), phases)


# What tracing costs.


def a_run(*, steps: int, traced_steps: int, seconds: float) -> RunRecord:
    config = make_config(steps=steps)
    record = make_record(config)
    complete(record, steps)
    steps_of = [[(STEP, 10 * number, 10 * number + 10)] for number in range(traced_steps)]
    record.trace = traced(*steps_of, replicas=2)
    record.duration_seconds = seconds
    return record


def test_traced_and_untraced_steps_are_set_beside_each_other() -> None:
    # 2 replicas, 100 micro-steps a second each while traced; 80 untraced micro-steps in 0.2 s.
    record = a_run(steps=45, traced_steps=5, seconds=0.05 + 0.2)
    assert profile.rates(record) == (pytest.approx(200), pytest.approx(400))
    numbers = profile.metrics(record)
    assert numbers["traced_micro_steps_per_second"] == pytest.approx(200)
    assert numbers["untraced_micro_steps_per_second"] == pytest.approx(400)


@pytest.mark.parametrize("traced_steps", [0, 1, 45])
def test_where_little_is_untraced_nothing_is_said_of_it(traced_steps: int) -> None:
    assert profile.rates(a_run(steps=45, traced_steps=traced_steps, seconds=1.0)) is None


# Where it is told.


def test_every_phase_has_a_kind_of_span_and_a_description() -> None:
    assert {kind for made_of in PHASES.values() for kind in made_of} == {*KINDS} - {STEP}
    assert set(TOLD) == {*PHASES, OTHER}
    assert {f"speed/{phase}_seconds" for phase in TOLD} <= set(DESCRIPTIONS)
    assert kinds.STEP not in {kind for made_of in PHASES.values() for kind in made_of}


def test_a_verdict_has_the_numbers_and_the_console_a_table() -> None:
    config = make_config()
    record = make_record(config)
    complete(record, config.train.steps)
    record.trace = Trace(2, times=measured())
    found = judge(config, record, None, {})
    assert found.metrics["compute_seconds"] == pytest.approx(0.005)
    assert found.metrics["compute_share"] == pytest.approx(0.5)
    assert [row.replica for row in found.profile] == [0, 1]
    assert json.loads(found.to_json())["profile"][1]["share"]["lock_wait"] == pytest.approx(0.1)
    text = shown(found)
    assert "where a step's time goes" in text
    lines = {line.split("  ")[0]: line.split()[-6:] for line in text.splitlines()}
    assert lines["compute"] == ["5,000", "us", "50.0%", "50.0%", "to", "50.0%"]
    assert lines["lock wait"] == ["500", "us", "5.0%", "0.0%", "to", "10.0%"]
    assert "Of 8 micro-steps" in text


def test_a_run_that_was_not_traced_has_no_table() -> None:
    config = make_config()
    record = make_record(config)
    complete(record, config.train.steps)
    untraced = make_verdict(config, record)
    assert untraced.profile == []
    assert "where a step's time goes" not in shown(untraced)


def shown(found: Any) -> str:
    stream = io.StringIO()
    reports.show(Console(file=stream, width=120, highlight=False), found, Path("run"), "violated")
    return stream.getvalue()


# Runs.


def run_plain(command: Command, folder: str, *arguments: str, **environment: str) -> dict[str, Any]:
    ended = command(f"hydra.run.dir={folder}", "fail_on=never", "train.steps=30", *arguments, **environment)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return verdict(command.folder / folder)


def run(command: Command, *arguments: str, **environment: str) -> dict[str, Any]:
    found = run_plain(command, "run", *arguments, **environment)
    shares = [value for name, value in found["metrics"].items() if name.endswith("_share")]
    assert sum(shares) == pytest.approx(1)
    for row in found["profile"]:
        assert sum(row["share"].values()) == pytest.approx(1)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "has", "lacks"),
    [
        ("locked", ("compute", "lock_wait", "critical_section", "data", "logging"), ("barrier", "unlocked_access")),
        ("all_reduce", ("compute", "unlocked_access", "barrier"), ("lock_wait", "critical_section")),
        ("lock_free", ("compute", "unlocked_access"), ("lock_wait", "critical_section", "barrier")),
        ("serialized", ("lock_wait", "critical_section"), ("compute", "unlocked_access", "barrier")),
    ],
)
def test_a_mode_spends_time_in_what_it_is_made_of(
    command: Command, mode: str, has: tuple[str, ...], lacks: tuple[str, ...]
) -> None:
    found = run(command, f"update_mode={mode}", "audit.trace_steps=10")
    metrics = found["metrics"]
    assert metrics["profiled_micro_steps"] == 2 * (10 - profile.WARM_UP)
    assert all(metrics[f"{phase}_share"] > 0 for phase in has)
    assert all(metrics[f"{phase}_share"] == 0 for phase in lacks)


@pytest.mark.slow
def test_under_mirrored_a_call_is_told_whole(command: Command) -> None:
    found = run(command, "strategy=mirrored", "audit=profile", "train.evaluate_every=10")
    metrics = found["metrics"]
    assert metrics["profiled_micro_steps"] == 2 * (30 - profile.WARM_UP)
    assert all(metrics[f"{phase}_share"] > 0 for phase in ("graph_call", "logging", "evaluation", "other"))
    assert not {"compute_share", "barrier_share", "lock_wait_share"} & set(metrics)
    assert [row["replica"] for row in found["profile"]] == [None]
    assert metrics["traced_micro_steps_per_second"] is None


@pytest.mark.slow
def test_what_a_loop_of_ones_own_computes_is_its_own_affair(command: Command) -> None:
    path = os.pathsep.join(map(str, (ROOT, ROOT / "scripts" / "examples")))
    found = run(command, "workload._target_=own_loop.Loop", "audit.trace_steps=8", PYTHONPATH=path)
    assert found["metrics"]["critical_section_share"] > 0
    assert not {"compute_share", "data_share"} & set(found["metrics"])


@pytest.mark.slow
def test_a_profiled_run_ends_in_the_bits_of_one_that_was_not(command: Command) -> None:
    plain, profiled = (run_plain(command, name, f"audit={name}") for name in ("counters", "profile"))
    assert plain["final_parameters_sha256"] == profiled["final_parameters_sha256"]
    assert plain["profile"] == []
    assert len(profiled["profile"]) == 2

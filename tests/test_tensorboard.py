"""What stands in the event file, as this project's own tests, TensorBoard's reader and TensorBoard's server read it."""

from __future__ import annotations

import json
import os
import re
import signal
import struct
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from report_factory import (
    NAMES,
    SAFE,
    UNSAFE,
    add_references,
    complete,
    make_config,
    make_record,
    make_verdict,
    read_off,
    report_run,
    seen,
)
from tensorboard.compat.proto import event_pb2
from tensorboard.plugins.custom_scalar import layout_pb2

from trainer import config as schema
from trainer.audit import profile
from trainer.audit.profile import PHASES
from trainer.audit.records import Average, RunRecord, code
from trainer.audit.spans import Trace
from trainer.audit.verdict import Anomaly, Error, Guarantee, Verdict
from trainer.report import board, buckets, markdown, tensorboard
from trainer.report.charts import CATEGORIES, EACH, HURT, SCALED, TOGETHER, TRACED, categories
from trainer.report.events import Category
from trainer.report.tags import DESCRIPTIONS, HYPERPARAMETERS, LOST, METRICS, hyperparameters
from trainer.report.tensorboard import RunEvents
from trainer.updates.mechanisms import MODES

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import browser  # noqa: E402

PREFIXES = ("train/", "updates/", "gradients/", "precision/", "replicas/", "speed/")
# TensorBoard reads files through TensorFlow where it is installed, unless a module of this name exists.
WITHOUT_TENSORFLOW = "import sys, types; sys.modules['tensorboard.compat.notf'] = types.ModuleType('notf'); "

NOBODY, FLOAT32, BFLOAT16, FLOAT16 = (code(dtype) for dtype in (None, "float32", "bfloat16", "float16"))

Points = dict[str, list[tuple[int, float]]]


def events(folder: Path) -> Iterator[Any]:
    """Every whole record of the one event file in a folder."""
    (path,) = folder.glob("events.out.tfevents.*")
    content = path.read_bytes()
    while len(content) >= 16:
        (length,) = struct.unpack_from("<Q", content)
        yield event_pb2.Event.FromString(content[12 : 12 + length])
        content = content[16 + length :]


def points(folder: Path) -> Points:
    """The points of every scalar tag, in the order in which they were written."""
    found: Points = defaultdict(list)
    for event in events(folder):
        for value in event.summary.value:
            if value.tensor.float_val:
                found[value.tag].append((event.step, value.tensor.float_val[0]))
    return dict(found)


def texts(folder: Path) -> dict[str, str]:
    return {
        value.tag: value.tensor.string_val[0].decode()
        for event in events(folder)
        for value in event.summary.value
        if value.metadata.plugin_data.plugin_name == "text"
    }


def images(folder: Path) -> dict[str, list[tuple[int, int, int, bytes]]]:
    """Step, width, height and PNG file of every image, in the order in which they were written."""
    found: dict[str, list[tuple[int, int, int, bytes]]] = defaultdict(list)
    for event in events(folder):
        for value in event.summary.value:
            if value.metadata.plugin_data.plugin_name == "images":
                width, height, png = value.tensor.string_val
                found[value.tag].append((event.step, int(width), int(height), png))
    return dict(found)


def described(folder: Path) -> dict[str, str]:
    """What each tag's first point says that it shows; not of texts, layouts and the HParams table's own."""
    found: dict[str, str] = {}
    for event in events(folder):
        for value in event.summary.value:
            if value.metadata.plugin_data.plugin_name in ("scalars", "histograms", "images"):
                found.setdefault(value.tag, value.metadata.summary_description)
    return found


def charts(folder: Path) -> list[Any]:
    """The layouts of the Custom Scalars page that stand in the file."""
    return [
        layout_pb2.Layout.FromString(value.tensor.string_val[0])
        for event in events(folder)
        for value in event.summary.value
        if value.tag == "custom_scalars__config__"
    ]


def histograms(folder: Path) -> dict[str, list[tuple[int, list[list[float]]]]]:
    """Step and buckets (left edge, right edge, count) of every histogram, in the order in which they were written."""
    found: dict[str, list[tuple[int, list[list[float]]]]] = defaultdict(list)
    for event in events(folder):
        for value in event.summary.value:
            shape = [each.size for each in value.tensor.tensor_shape.dim]
            if len(shape) == 2:
                buckets = np.frombuffer(value.tensor.tensor_content, "<f8").reshape(shape)
                found[value.tag].append((event.step, buckets.tolist()))
    return dict(found)


@pytest.fixture
def record() -> RunRecord:
    return make_record(make_config())


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[RunEvents]:
    writer = RunEvents(make_config(), tmp_path)
    yield writer
    writer.close()


def run_python(*arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))}
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=60, cwd=ROOT, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_reporting_a_run_imports_no_framework(tmp_path: Path) -> None:
    assert run_python("tests/report_factory.py", str(tmp_path)).strip() == "[]"


def test_the_file_is_named_as_tensorboard_names_its_own(tmp_path: Path, writer: RunEvents) -> None:
    (path,) = tmp_path.iterdir()
    assert re.fullmatch(rf"events\.out\.tfevents\.\d{{10}}\..+\.{os.getpid()}\.\d+", path.name)
    assert "=" not in path.name


def test_rows_are_written_as_steps_are_completed(tmp_path: Path, writer: RunEvents, record: RunRecord) -> None:
    complete(record, 15)
    writer.rows(record)
    assert [step for step, _ in points(tmp_path)["train/loss"]] == [0, 10]
    complete(record, 21)
    writer.rows(record)
    found = points(tmp_path)
    assert [step for step, _ in found["train/loss"]] == [0, 10, 20]
    for replica in record.replicas:
        written = [loss for _, loss in found[f"train/loss/replica_{replica.replica_id}"]]
        assert written == replica.losses[[0, 10, 20]].tolist()
    mean = np.mean([replica.losses[20] for replica in record.replicas])
    assert found["train/loss"][-1][1] == pytest.approx(mean, rel=1e-6)


def test_the_slowest_replica_decides_which_rows_are_complete(
    tmp_path: Path, writer: RunEvents, record: RunRecord
) -> None:
    complete(record, 30)
    record.replicas[1].steps_done = 5
    writer.rows(record)
    assert [step for step, _ in points(tmp_path)["train/loss"]] == [0]


def test_the_last_row_is_written_once_whether_or_not_it_is_due(tmp_path: Path) -> None:
    for steps, expected in ((45, [0, 10, 20, 30, 40, 44]), (41, [0, 10, 20, 30, 40]), (1, [0])):
        config = make_config(steps=steps)
        folder, record = tmp_path / str(steps), make_record(config)
        folder.mkdir()
        writer = RunEvents(config, folder)
        complete(record, steps)
        writer.finished(record, make_verdict(config, record))
        writer.close()
        assert [step for step, _ in points(folder)["train/loss"]] == expected
        assert [step for step, _ in points(folder)["updates/torn_reads"]] == expected


def test_what_the_audit_has_not_read_off_yet_is_not_written_as_if_it_were(
    tmp_path: Path, writer: RunEvents, record: RunRecord
) -> None:
    complete(record, 30, audited=False)
    writer.rows(record)
    assert {tag for tag in points(tmp_path) if not tag.startswith("train/loss")} == set()
    complete(record, 30, torn=True)
    writer.rows(record)
    assert points(tmp_path)["updates/torn_reads"] == [(0, 2.0), (10, 22.0), (20, 42.0)]


def test_staleness_is_the_mean_since_the_previous_point(tmp_path: Path, writer: RunEvents, record: RunRecord) -> None:
    complete(record, 21)
    record.replicas[0].staleness[:21] = [4, *range(10), *[-1] * 10]
    writer.rows(record)
    assert points(tmp_path)["updates/staleness/replica_0"] == [(0, 4.0), (10, 4.5)]
    # Over all replicas: replica 1 was late by 1 and 0 in turn, from its first step on.
    every = [(0, 2.5), (10, pytest.approx((45 + 5) / 20)), (20, 0.5)]
    assert points(tmp_path)["updates/staleness"] == every


def test_staleness_histograms_are_written_live_and_hold_every_update(
    tmp_path: Path, writer: RunEvents, record: RunRecord
) -> None:
    # 45 steps in at most 20 stretches: 3 steps each.
    complete(record, 8)
    writer.rows(record)
    assert [step for step, _ in histograms(tmp_path)["updates/staleness_histogram"]] == [2, 5]
    complete(record, 44)
    record.replicas[1].staleness[6:9] = [0, 3, -1]
    writer.rows(record)
    writer.rows(record, last=True)
    found = histograms(tmp_path)
    assert [step for step, _ in found["updates/staleness_histogram"]] == [*range(2, 44, 3), 43]
    assert found["updates/staleness_histogram/replica_0"][0] == (2, [[-0.5, 0.5, 2], [0.5, 1.5, 1]])
    assert found["updates/staleness_histogram/replica_1"][2] == (
        8,
        [[-0.5, 0.5, 1], [0.5, 1.5, 0], [1.5, 2.5, 0], [2.5, 3.5, 1]],
    )
    counted = sum(bucket[2] for _, own in found["updates/staleness_histogram"] for bucket in own)
    # One of them was not recorded.
    assert counted == 2 * 44 - 1


def test_gradient_norms_are_one_histogram_at_the_end(tmp_path: Path) -> None:
    report_run(tmp_path / "run", UNSAFE)
    found, norms = histograms(tmp_path / "run"), points(tmp_path / "run")
    for replica in range(2):
        # The same gradient at each of the three reference steps.
        ((step, ((least, largest, count),)),) = found[f"gradients/norm_histogram/replica_{replica}"]
        assert (step, count) == (45, 3)
        assert least == largest == pytest.approx(norms[f"gradients/norm/replica_{replica}"][0][1])
    ((step, both),) = found["gradients/norm_histogram"]
    assert step == 45
    assert (both[0][2], both[-1][2], sum(count for *_, count in both)) == (3, 3, 6)


def test_a_gradient_that_is_not_finite_is_in_no_histogram(tmp_path: Path) -> None:
    config = make_config()
    record = make_record(config)
    complete(record, config.train.steps)
    add_references(record)
    for reference in record.references:
        if reference.replica_id == 1:
            reference.contribution = np.full_like(reference.contribution, np.inf)
    writer = RunEvents(config, tmp_path)
    writer.finished(record, make_verdict(config, record))
    writer.close()
    assert [tag for tag in histograms(tmp_path) if tag.startswith("gradients/")] == [
        "gradients/norm_histogram/replica_0",
        "gradients/norm_histogram",
    ]


def test_an_unrecorded_staleness_has_no_histogram(tmp_path: Path, writer: RunEvents, record: RunRecord) -> None:
    complete(record, 20)
    for replica in record.replicas:
        replica.staleness[:] = -1
    writer.rows(record)
    assert histograms(tmp_path) == {}


@pytest.mark.parametrize(
    ("staleness", "expected"),
    [
        ([0, 0], [[-0.5, 0.5, 2]]),
        ([2, 0, 2], [[-0.5, 0.5, 1], [0.5, 1.5, 0], [1.5, 2.5, 2]]),
        ([15], [*([n - 0.5, n + 0.5, 0] for n in range(15)), [14.5, 15.5, 1]]),
        ([16, 3], [*([n - 0.5, n + 0.5, n == 3] for n in range(16)), [15.5, 16.5, 1]]),
        ([40, 31, 32], [*([n - 0.5, n + 0.5, 0] for n in range(16)), [15.5, 31.5, 1], [31.5, 40.5, 2]]),
    ],
)
def test_staleness_is_exact_up_to_15_and_coarser_beyond(staleness: list[int], expected: list[list[float]]) -> None:
    assert buckets.of_counts(np.array(staleness, np.int32)).tolist() == expected


def test_no_number_falls_outside_its_buckets() -> None:
    random = np.random.default_rng(0)
    for size in (1, 2, 30, 1000):
        values = random.normal(5, 2, size)
        found = buckets.of_numbers(values)
        assert found[:, 2].sum() == size
        assert (found[0, 0], found[-1, 1]) == (values.min(), values.max())
        assert found[1:, 0].tolist() == found[:-1, 1].tolist()
        counts = (random.pareto(1, size) * 10).astype(np.int32)
        found = buckets.of_counts(counts)
        assert found[:, 2].sum() == size
        assert found[-1, 1] == counts.max() + 0.5


def test_every_run_names_the_same_charts_once(tmp_path: Path) -> None:
    for mode, name in NAMES.items():
        report_run(tmp_path / name, mode)
    safe, unsafe = (charts(tmp_path / name) for name in NAMES.values())
    assert safe == unsafe
    assert len(safe) == 1
    found = [(category.title, [chart.title for chart in category.chart]) for category in safe[0].category]
    assert found == titles(HURT, TOGETHER, EACH)


def titles(*categories: Category) -> list[tuple[str, list[str]]]:
    return [(category.title, [chart.title for chart in category.charts]) for category in categories]


def test_a_run_names_no_charts_that_would_stay_empty() -> None:
    config = make_config()
    assert categories(config) == (HURT, TOGETHER, EACH)
    assert categories(make_config(precision="mixed_float16")) == (HURT, TOGETHER, EACH, SCALED)
    config.audit = schema.OPTIONS["audit"]["profile"]
    assert categories(config) == (HURT, TOGETHER, EACH, TRACED)
    config.schedule = schema.OPTIONS["schedule"]["seeded"]
    assert TRACED not in categories(config)  # an order that is given has no times of its own
    config.workload = schema.OPTIONS["workload"]["bank"]
    assert categories(config) == ()


def test_every_chart_finds_what_a_run_writes_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(1000))
    monkeypatch.setattr(tensorboard, "time", SimpleNamespace(monotonic=lambda: next(now)))
    wall = np.ones(3)
    phases = {phase: wall / 100 for phase in PHASES if phase not in ("graph_call", "evaluation")}
    monkeypatch.setattr(profile, "step_times", lambda record: [profile.StepTimes(0, wall, phases)])
    report_run(tmp_path / "run", UNSAFE, precision="mixed_float16")
    written = set(points(tmp_path / "run"))
    for category in CATEGORIES:
        for chart in category.charts:
            for tag in chart.tags:
                # As TensorBoard looks for them: from the tag's beginning.
                found = {each for each in written if re.match(tag, each)}
                by_replica = {each for each in found if "/replica_" in each}
                assert by_replica == (found if "replica_" in tag else set()), tag
                assert len(found) == (2 if "replica_" in tag else 1), tag


def test_traced_steps_say_where_their_time_went(tmp_path: Path, writer: RunEvents, record: RunRecord) -> None:
    complete(record, 45)
    record.trace = Trace(
        2, times=[profile.StepTimes(own, np.full(2, 8.0), {"compute": np.array([1.0, 2.0]) + own}) for own in range(2)]
    )
    writer.finished(record, make_verdict(make_config(), record))
    found = points(tmp_path)
    assert found["speed/compute_seconds"] == [(0, 1.5), (1, 2.5)]
    assert found["speed/other_seconds"] == [(0, 6.5), (1, 5.5)]
    assert "speed/lock_wait_seconds" not in found
    assert described(tmp_path)["speed/compute_seconds"] == DESCRIPTIONS["speed/compute_seconds"]


def test_precision_shows_the_bits_that_were_computed_in(tmp_path: Path, writer: RunEvents, record: RunRecord) -> None:
    for steps in (10, 21):
        complete(record, steps)
        read_off(record.replicas[1], activations=([BFLOAT16] * 6 + [FLOAT32] * 5 + [FLOAT16] * 10)[:steps])
        writer.rows(record)
    found = points(tmp_path)
    assert found["precision/computed_bits/replica_0"] == [(0, 32.0), (10, 32.0), (20, 32.0)]
    # The mean of the ten steps since the point before.
    assert found["precision/computed_bits/replica_1"] == [(0, 16.0), (10, 24.0), (20, 16.0)]


def test_each_replicas_precision_is_followed_from_what_was_asked_to_what_came_of_it(
    tmp_path: Path, writer: RunEvents, record: RunRecord
) -> None:
    complete(record, 11)
    read_off(
        record.replicas[1],
        asked=[FLOAT32] + [BFLOAT16] * 10,
        entry=[NOBODY] * 6 + [BFLOAT16] * 5,
        exit=[BFLOAT16] * 11,
        gradients=[FLOAT32] + [BFLOAT16] * 10,
    )
    writer.rows(record)
    found = points(tmp_path)
    assert {
        tag.split("/")[1]: values for tag, values in found.items() if re.match(r"precision/.*/replica_1$", tag)
    } == {
        "asked_bits": [(0, 32.0), (10, 16.0)],
        "computed_bits": [(0, 32.0), (10, 32.0)],
        "gradient_bits": [(0, 32.0), (10, 16.0)],
        "mode_at_entry": [(0, 0.0), (10, 8.0)],
        "mode_at_exit": [(0, 16.0), (10, 16.0)],
    }
    assert found["precision/mode_at_exit/replica_0"] == [(0, 0.0), (10, 0.0)]


def test_steps_that_tell_no_dtype_have_no_bits(tmp_path: Path, writer: RunEvents, record: RunRecord) -> None:
    complete(record, 11)
    read_off(record.replicas[0], activations=[0] * 11, gradients=[0] * 6 + [FLOAT16] * 5, entry=[-1] * 11)
    writer.rows(record)
    found = points(tmp_path)
    assert "precision/computed_bits/replica_0" not in found
    assert "precision/mode_at_entry/replica_0" not in found
    assert found["precision/gradient_bits/replica_0"] == [(10, 16.0)]


@pytest.mark.parametrize("precision", ["mixed_float16", "mixed_bfloat16"])
def test_loss_scale_and_overflows_are_written_where_there_is_a_scale(tmp_path: Path, precision: str) -> None:
    config = make_config(precision=precision)
    record, writer = make_record(config), RunEvents(config, tmp_path)
    complete(record, 21)
    record.replicas[0].loss_scale[7:, 0] = 16384
    for step, replica in ((5, 1), (7, 0), (7, 1), (10, 0), (20, 1)):
        record.replicas[replica].loss_scale[step, 1] = 1
    writer.rows(record)
    writer.close()
    found = {tag: values for tag, values in points(tmp_path).items() if "scale" in tag or "overflow" in tag}
    expected = {
        "precision/loss_scale/replica_0": [(0, 32768.0), (10, 16384.0), (20, 16384.0)],
        "precision/loss_scale/replica_1": [(0, 32768.0), (10, 32768.0), (20, 32768.0)],
        "precision/overflows": [(0, 0.0), (10, 4.0), (20, 5.0)],
    }
    assert found == (expected if precision == "mixed_float16" else {})


def test_mixed_gradients_are_counted_where_they_are_read_back(
    tmp_path: Path, writer: RunEvents, record: RunRecord
) -> None:
    complete(record, 1)
    writer.rows(record)
    assert "gradients/mixed" not in points(tmp_path)
    complete(record, 21)
    read_off(record.replicas[0], mixed=[-1] + [1] * 3 + [0] * 17)
    read_off(record.replicas[1], mixed=[-1] + [0] * 18 + [1] * 2)
    writer.rows(record)
    assert points(tmp_path)["gradients/mixed"] == [(10, 3.0), (20, 5.0)]


def finish(folder: Path, change: Any = None) -> Points:
    """The points of a run that has ended, its record and verdict changed before they are written."""
    config = make_config()
    record = make_record(config)
    complete(record, config.train.steps)
    record.expected_words = np.zeros((2, config.train.steps, 2), np.float32)
    verdict = make_verdict(config, record)
    if change is not None:
        change(record, verdict)
    folder.mkdir()
    writer = RunEvents(config, folder)
    writer.finished(record, verdict)
    writer.close()
    return points(folder)


def of_guarantee(verdict: Verdict, name: str) -> Guarantee:
    return next(each for each in verdict.guarantees if each.name == name)


@pytest.mark.parametrize("tag", LOST)
def test_what_a_holder_lost_is_a_number_and_nothing_lost_is_0(tmp_path: Path, tag: str) -> None:
    guarantee, kinds = LOST[tag]

    def break_it(record: RunRecord, verdict: Verdict) -> None:
        verdict.anomalies += [seen(kind, 7, 90) for kind in kinds[:1]]
        of_guarantee(verdict, guarantee).status = "violated"

    assert finish(tmp_path / "safe")[tag] == [(45, 0.0)]
    assert finish(tmp_path / "unsafe", break_it)[tag] == [(45, 7.0)]


@pytest.mark.parametrize("status", ["not_checked", "not_applicable"])
def test_what_was_not_checked_is_not_written_as_if_nothing_were_lost(tmp_path: Path, status: str) -> None:
    def uncheck(record: RunRecord, verdict: Verdict) -> None:
        for each in verdict.guarantees:
            each.status = status  # type: ignore[assignment]

    assert set(LOST) & set(finish(tmp_path / "run", uncheck)) == set()


def test_random_numbers_of_nobody_in_particular_are_not_said_to_be_right(tmp_path: Path) -> None:
    def forget(record: RunRecord, verdict: Verdict) -> None:
        record.expected_words = None

    found = finish(tmp_path / "run", forget)
    assert "train/random_numbers_off" not in found
    assert found["train/random_numbers_repeated"] == [(45, 0.0)]


def test_each_kind_of_anomaly_that_was_seen_is_one_number(tmp_path: Path) -> None:
    def break_it(record: RunRecord, verdict: Verdict) -> None:
        verdict.anomalies += [seen("setting_off", 1, 37), seen("torn_tensor", 5, 90), seen("setting_off", 1, 37)]

    found = finish(tmp_path / "unsafe", break_it)
    assert {tag: values for tag, values in found.items() if "anomalies" in tag} == {
        "replicas/anomalies/setting_off": [(45, 2.0)],
        "replicas/anomalies/torn_tensor": [(45, 5.0)],
    }
    assert not any("anomalies" in tag for tag in finish(tmp_path / "safe"))


def test_throughput_leaves_out_start_up_and_the_audit_at_the_end(
    tmp_path: Path, record: RunRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(tensorboard, "time", SimpleNamespace(monotonic=lambda: now[0]))
    config = make_config()
    writer = RunEvents(config, tmp_path)
    for at, steps in ((0, 0), (100, 5), (101, 25), (102, 45)):
        now[0] = at
        complete(record, steps)
        writer.rows(record)
    now[0] = 900
    writer.finished(record, make_verdict(config, record))
    writer.close()
    assert points(tmp_path)["speed/micro_steps_per_second"] == [(20, 40.0), (40, 40.0)]


def test_gradients_are_written_at_their_reference_steps(tmp_path: Path) -> None:
    config = make_config()
    record = make_record(config)
    complete(record, config.train.steps)
    add_references(record, every=20)
    writer = RunEvents(config, tmp_path)
    writer.finished(record, make_verdict(config, record))
    writer.close()
    found = points(tmp_path)
    assert found["gradients/cosine_min"] == [(step, pytest.approx(1.0)) for step in (0, 20, 40)]
    assert found["gradients/error/replica_1"] == [(step, pytest.approx(0.0)) for step in (0, 20, 40)]
    one, two = (found[f"gradients/norm/replica_{replica}"][0][1] for replica in (0, 1))
    assert two == pytest.approx(2 * one)


def test_what_processes_were_apart_by_is_written_at_each_average(
    tmp_path: Path, writer: RunEvents, record: RunRecord
) -> None:
    complete(record, 45)
    record.averages = [Average(10, 0.5, 0.25), Average(20, 0.125, 0.0625)]
    writer.finished(record, make_verdict(make_config(), record))
    found = points(tmp_path)
    assert found["replicas/divergence_before_average"] == [(10, 0.5), (20, 0.125)]
    assert found["replicas/divergence_before_average_relative"] == [(10, 0.25), (20, 0.0625)]


def test_every_tag_has_a_known_prefix_and_a_description(tmp_path: Path) -> None:
    report_run(tmp_path / "run", UNSAFE, precision="mixed_float16")
    found = described(tmp_path / "run")
    assert set(found) == {
        tag
        for of in (points, histograms, images)
        for tag in of(tmp_path / "run")  # type: ignore[operator]
    }
    assert all(tag.startswith(PREFIXES) for tag in (*found, *texts(tmp_path / "run")))
    assert [tag for tag, description in found.items() if not description] == []
    assert set(LOST) <= set(DESCRIPTIONS)


def test_a_run_that_broke_before_its_first_step_leaves_its_verdict(tmp_path: Path, writer: RunEvents) -> None:
    verdict = Verdict("broken", {}, error=Error("crash", "RuntimeError: no", replica=1, step=0))
    writer.finished(None, verdict)
    assert points(tmp_path) == {"replicas/verdict_level": [(0, 4.0)]}
    assert "crash in replica 1 at step 0: RuntimeError: no" in texts(tmp_path)["replicas/verdict"]


def test_a_killed_run_leaves_the_rows_that_were_flushed(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys; from pathlib import Path; from report_factory import *; "
        "config = make_config(); record = make_record(config); observer = Observer(config, Path(sys.argv[1])); "
        "observer.__enter__(); complete(record, 30); observer.progress(record); os.kill(os.getpid(), signal.SIGKILL)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))}
    killed = subprocess.run([sys.executable, "-c", program, tmp_path], timeout=60, env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert [step for step, _ in points(tmp_path)["train/loss"]] == [0, 10, 20]
    assert list(texts(tmp_path)) == ["train/config"]


def test_markdown_cells_cannot_break_the_table_or_bring_tags() -> None:
    config = make_config()
    verdict = make_verdict(config, make_record(config))
    verdict.guarantees[0].evidence = "a|b <script>x</script>\n*c* __d__"
    line = next(line for line in markdown.verdict(verdict, "violated").splitlines() if "no_lost_updates" in line)
    assert line.count("|") == 4
    assert "<script" not in line
    assert r"\*c\* \_\_d\_\_" in line


def test_a_witness_keeps_its_picture_in_markdown() -> None:
    picture = "  replica 0    replica 1\n> read v @0\n>              write v @1"
    config = make_config()
    verdict = make_verdict(config, make_record(config))
    verdict.anomalies = [Anomaly("lost_update", 4, 6, "orders", f"because of <this>\n{picture}")]
    found = markdown.verdict(verdict, "violated")
    assert f"- witness: because of &lt;this>\n\n```\n{picture}\n```\n" in found


def test_hyperparameters_leave_out_what_the_run_does_not_have() -> None:
    config = make_config()
    assert "normalization" not in hyperparameters(config)
    config.model = schema.Cnn()
    found = hyperparameters(config)
    assert found["normalization"] == "batch"
    assert list(found) == [column.name for column in HYPERPARAMETERS]
    config.workload = schema.Custom()
    assert "state" not in hyperparameters(config)  # a loop of the user's own holds it


@pytest.mark.parametrize(
    ("state", "told"),
    [
        ({}, "safe"),
        ({"gradients": "per_replica", "precision": "explicit"}, "safe"),
        ({"cursor": "naive", "precision": "locked_global"}, "precision=locked_global cursor=shared_iterator"),
        ({"batch_statistics": "reduced"}, "batch_statistics=reduced"),
        # float32 has no loss scale to share.
        ({"loss_scale": "naive"}, "safe"),
        (dict.fromkeys(vars(schema.State()), "naive"), "naive"),
    ],
)
def test_the_table_tells_how_state_was_really_held(state: dict[str, str], told: str) -> None:
    config = make_config("all_reduce")
    config.state = schema.State(**state)
    assert hyperparameters(config)["state"] == told


def test_tensorboards_own_reader_finds_the_same_points(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    report_run(folder, UNSAFE)
    program = WITHOUT_TENSORFLOW + (
        "import json; from tensorboard.backend.event_processing import event_accumulator as reader; "
        "run = reader.EventAccumulator(sys.argv[1], {reader.TENSORS: 0}).Reload(); "
        "print(json.dumps({tag: [[e.step, e.tensor_proto.float_val[0]] for e in run.Tensors(tag)] "
        "for tag in run.Tags()['tensors'] if run.Tensors(tag)[0].tensor_proto.float_val}))"
    )
    read = json.loads(run_python("-c", program, str(folder)))
    assert read == {tag: [list(point) for point in found] for tag, found in points(folder).items()}


def test_tensorboards_own_reader_finds_every_picture(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    report_run(folder, UNSAFE)
    program = WITHOUT_TENSORFLOW + (
        "from tensorboard.backend.event_processing import event_accumulator as reader; "
        "from tensorboard.plugins.image import metadata; "
        "run = reader.EventAccumulator(sys.argv[1], {reader.TENSORS: 0}).Reload(); "
        "[print(tag, event.step, *map(int, event.tensor_proto.string_val[:2]), event.tensor_proto.string_val[2].hex()) "
        "for tag in run.PluginTagToContent(metadata.PLUGIN_NAME) for event in run.Tensors(tag)]"
    )
    read = sorted(run_python("-c", program, str(folder)).splitlines())
    written = images(folder)
    assert len(read) == len(written) == 3
    assert read == sorted(
        f"{tag} {step} {wide} {high} {png.hex()}" for tag, ((step, wide, high, png),) in written.items()
    )


class Server:
    """TensorBoard on loopback over a folder, in a process of its own."""

    def __init__(self, folder: Path) -> None:
        program = WITHOUT_TENSORFLOW + "from tensorboard.main import run_main; run_main()"
        arguments = ("--logdir", str(folder), "--host", "127.0.0.1", "--port", "0", "--reload_interval", "1")
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, *arguments], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        )
        self.said: list[str] = []
        self.address: str | None = None
        self._known = threading.Event()
        # Reads on to the end, so that the server never waits for a full pipe.
        self._listener = threading.Thread(target=self._listen)
        self._listener.start()
        assert self._known.wait(45), "".join(self.said)
        assert self.address, "".join(self.said)
        # Past any proxy: loopback is not its business.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def _listen(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line)
            if found := re.search(r"http://127\.0\.0\.1:\d+/", line):
                self.address = found[0]
                self._known.set()
        self._known.set()

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(20)
        self._listener.join(20)
        assert self.process.stderr is not None
        self.process.stderr.close()

    def get(self, path: str, **query: str) -> Any:
        return self._ask(f"{path}?{urllib.parse.urlencode(query)}", None)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        return self._ask(path, json.dumps(body).encode())

    def content(self, path: str) -> bytes:
        with self._opener.open(f"{self.address}data/plugin/{path}", timeout=20) as answer:
            found: bytes = answer.read()
        return found

    def _ask(self, path: str, body: bytes | None) -> Any:
        request = urllib.request.Request(
            f"{self.address}data/plugin/{path}", body, {"Content-Type": "application/json"}
        )
        with self._opener.open(request, timeout=20) as answer:
            return json.load(answer)

    def wait_for_runs(self, names: set[str]) -> None:
        deadline = time.monotonic() + 45
        while {run for run, found in self.get("text/tags").items() if "replicas/verdict" in found} < names:
            assert time.monotonic() < deadline, f"TensorBoard shows {self.get('text/tags')}"
            time.sleep(0.2)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    for mode, name in NAMES.items():
        report_run(folder / name, mode)
    board.write(folder, list(NAMES.values()))
    return folder


@pytest.fixture(scope="module")
def server(sweep: Path) -> Iterator[Server]:
    server = Server(sweep)
    try:
        server.wait_for_runs(set(NAMES.values()))
        yield server
    finally:
        server.stop()


def test_the_server_has_every_scalar(server: Server, sweep: Path) -> None:
    shown = server.get("scalars/tags")
    for name in NAMES.values():
        written = points(sweep / name)
        assert set(shown[name]) == set(written)
        assert "mean over replicas" in shown[name]["train/loss"]["description"]
        answer = server.get("scalars/scalars", run=name, tag="train/loss")
        assert [(step, value) for _, step, value in answer] == [
            (step, pytest.approx(value)) for step, value in written["train/loss"]
        ]


def test_the_server_renders_verdict_and_configuration(server: Server) -> None:
    name = NAMES[UNSAFE]
    ((verdict,), (config,)) = (
        server.get("text/text", run=name, tag=tag) for tag in ("replicas/verdict", "train/config")
    )
    assert "<table>" in verdict["text"]
    assert "<code>no_lost_updates</code>" in verdict["text"]
    assert "45 of 90 updates are missing at the end" in verdict["text"]
    assert "update_mode=locked updates the current values under a lock" in verdict["text"]
    assert re.search(r"<pre><code>.*overwrite.*</code></pre>", config["text"], re.DOTALL)


def test_a_sweep_is_one_sortable_table(server: Server) -> None:
    def groups(order: str) -> list[dict[str, Any]]:
        body = {
            "experimentName": "",
            "allowedStatuses": ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING"],
            "colParams": [{"metric": {"group": "", "tag": "updates/kept_share"}, "order": order}],
            "startIndex": 0,
            "sliceSize": 10,
        }
        found: list[dict[str, Any]] = server.post("hparams/session_groups", body)["sessionGroups"]
        return found

    rising = groups("ORDER_ASC")
    assert [group["hparams"]["update_mode"] for group in rising] == [UNSAFE, SAFE]
    assert [group["hparams"]["update_mode"] for group in groups("ORDER_DESC")] == [SAFE, UNSAFE]
    unsafe = rising[0]
    assert unsafe["name"] == NAMES[UNSAFE]
    assert unsafe["hparams"]["num_replicas"] == 2
    metrics = {metric["name"]["tag"]: metric["value"] for metric in unsafe["metricValues"]}
    assert metrics["updates/kept_share"] == 0.5
    assert metrics["replicas/verdict_level"] == 2
    assert [session["status"] for session in unsafe["sessions"]] == ["STATUS_SUCCESS"]
    experiment = server.post("hparams/experiment", {"experimentName": ""})
    assert {column["name"] for column in experiment["hparamInfos"]} == {column.name for column in HYPERPARAMETERS}
    assert [column["name"]["tag"] for column in experiment["metricInfos"]] == [metric.tag for metric in METRICS]


def test_the_server_shows_all_runs_in_one_set_of_charts(server: Server) -> None:
    layout = server.get("custom_scalars/layout")
    found = [(category["title"], [chart["title"] for chart in category["chart"]]) for category in layout["category"]]
    assert found == titles(HURT, TOGETHER, EACH)
    kept = [r"updates/(kept|expected)$"]
    last: dict[tuple[str, str], float] = {}
    for name in NAMES.values():
        for tag in kept:
            answer = server.get("custom_scalars/scalars", run=name, tag=tag)
            assert answer["regex_valid"]
            last |= {(name, found_tag): series[-1][2] for found_tag, series in answer["tag_to_events"].items()}
    assert last == {
        (NAMES[SAFE], "updates/kept"): 90,
        (NAMES[SAFE], "updates/expected"): 90,
        (NAMES[UNSAFE], "updates/kept"): 45,
        (NAMES[UNSAFE], "updates/expected"): 90,
    }


def test_the_server_has_every_histogram(server: Server, sweep: Path) -> None:
    shown = server.get("histograms/tags")
    for name in NAMES.values():
        written = histograms(sweep / name)
        assert set(shown[name]) == set(written)
        assert "which staleness" in shown[name]["updates/staleness_histogram"]["description"]
        for tag, expected in written.items():
            answer = server.get("histograms/histograms", run=name, tag=tag)
            assert [(step, own) for _, step, own in answer] == expected


def test_the_server_shows_every_picture(server: Server, sweep: Path) -> None:
    shown = server.get("images/tags")
    for name in NAMES.values():
        written = images(sweep / name)
        assert (
            set(shown[name]) == set(written) == {"precision/heatmap", "gradients/cosines", "updates/kept_by_variable"}
        )
        for tag, ((step, _, _, png),) in written.items():
            assert shown[name][tag]["samples"] == 1
            assert DESCRIPTIONS[tag][:40] in shown[name][tag]["description"]
            (answer,) = server.get("images/images", run=name, tag=tag, sample="0")
            assert answer["step"] == step == 45
            assert server.content(f"images/individualImage?{answer['query']}") == png


def test_the_server_shows_all_runs_of_a_sweep_beside_each_other(server: Server, sweep: Path) -> None:
    # TensorBoard's name for the folder that it was given.
    assert list(server.get("images/tags")["."]) == ["at_a_glance/runs"]
    assert sorted(server.get("text/tags")["."]) == ["at_a_glance/runs_in_words", "at_a_glance/update_modes"]
    ((said,), (modes,)) = (
        server.get("text/text", run=".", tag=f"at_a_glance/{tag}") for tag in ("runs_in_words", "update_modes")
    )
    assert "<strong>1 of 2 runs were hurt.</strong>" in said["text"]
    assert f"{NAMES[UNSAFE]}: anomaly</h4>" in said["text"]
    assert "witness: step 12: replica 1 wrote over replica 0's update" in said["text"]
    assert re.search(f"{NAMES[SAFE]}.*<strong>upheld</strong>.*90 of 90", said["text"], re.DOTALL)
    for mode in set(MODES) - {"custom"}:
        assert f"<code>{mode}</code>" in modes["text"]
    # They are no row of the HParams table.
    assert "." not in server.get("scalars/tags")


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.skipif(browser.find() is None, reason=f"needs a browser on PATH: {', '.join(browser.NAMES)}")
def test_a_browser_shows_what_was_hurt(server: Server) -> None:
    path = browser.find()
    assert path is not None
    with browser.Browser(path, 1280, 1200, seconds=150) as window:
        window.open(f"{server.address}#text")
        witness = "step 12: replica 1 wrote over replica 0's update"
        said = window.wait_for("1 of 2 runs were hurt.", "overwritten_update", witness, "lock_free", "replicas/verdict")
        assert "no_lost_updates" in said
        window.open("about:blank")  # another fragment alone would load nothing
        window.open(f"{server.address}#custom_scalars")
        window.wait_for(*(category.title for category in (HURT, TOGETHER, EACH)), *(c.title for c in HURT.charts))

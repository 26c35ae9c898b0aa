"""The judge on hand-made records: a clean one is upheld, and a planted defect breaks its own guarantee only."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from trainer.audit.judge import judge
from trainer.audit.precision_findings import computed_precision
from trainer.audit.recorder import Recorder
from trainer.audit.records import (
    FRACTURED,
    TORN_TENSOR,
    Evaluation,
    Noted,
    Reference,
    ReplicaRecord,
    RunRecord,
    code,
)
from trainer.audit.row import Row
from trainer.audit.verdict import Error, Verdict, exit_status, save
from trainer.config import Audit, Cnn, Config, Precision, Strategy, Train, UpdateMode
from trainer.state.layout import plan
from trainer.state.settings import Difference

STEPS, REPLICAS = 12, 2
ROW = Row(num_logits=4, num_gradients=4, num_canaries=2 * 2 * REPLICAS)
NOISE = np.random.default_rng(0)


def config_of(mode: str = "all_reduce", strategy: str = "mirrored", **fields: object) -> Config:
    train = Train(steps=STEPS)
    return Config(
        strategy=Strategy(strategy), update_mode=UpdateMode(mode), train=train, num_replicas=REPLICAS, **fields
    )


def clean_record(config: Config) -> RunRecord:
    """What a faultless all-reduce leaves."""
    copies = 2 if config.strategy.name == "mirrored" else 1
    layout = plan([("kernel", (4, 3)), ("bias", (3,))], [], ("velocity",), counter=False, num_replicas=REPLICAS)
    record = RunRecord(layout, STEPS, [ReplicaRecord.empty(own, STEPS, REPLICAS) for own in range(REPLICAS)])
    for replica in record.replicas:
        recorder = Recorder(replica, ROW, layout)
        for step in range(STEPS):
            batch = step * REPLICAS + replica.replica_id
            row = np.zeros(ROW.canaries.stop, np.float32)
            row[0] = 2.0 / (step + 1)
            row[ROW.logits], row[ROW.gradients] = NOISE.normal(size=4), NOISE.normal(size=4)
            row[ROW.sample], row[ROW.random], row[ROW.canaries] = 100 + batch, (batch, 1), step
            recorder.note(row, Noted(step * REPLICAS, 0, batch, code("float32"), 0, 0))
        recorder.flush()
        record.settings[replica.replica_id] = []
    record.first_calls, record.batch_size, record.draws = 1, 8, True
    record.planned = np.arange(100, 100 + STEPS * REPLICAS, dtype=np.int32)
    record.expected_words = np.stack([replica.random_words for replica in record.replicas])
    record.settings_asked = {"a setting": "x"}
    vector = layout.pack([NOISE.normal(size=(4, 3)), NOISE.normal(size=3)])
    vector[layout.canaries] = STEPS
    record.copies = np.stack([vector] * copies)
    for step in (0, 5):
        joint = gradient_vector(record)
        for own in range(REPLICAS):
            one = gradient_vector(record)
            record.references.append(
                Reference(own, step, vector[: layout.read_size], one, joint.copy(), one.copy(), joint)
            )
    record.evaluations.append(Evaluation(STEPS, 0.75, 0.5))
    record.duration_seconds = 2.0
    return record


def gradient_vector(record: RunRecord) -> np.ndarray:
    vector = np.zeros(record.layout.read_size, np.float32)
    for segment in record.layout.read_segments:
        vector[segment.span] = NOISE.normal(size=segment.size)
    return vector


def statuses(verdict: Verdict) -> dict[str, str]:
    return {guarantee.name: guarantee.status for guarantee in verdict.guarantees}


def lose_an_update(record: RunRecord) -> None:
    record.copies[:, record.layout.canaries[2, 1, 0]] -= 1


def multiply_updates(record: RunRecord) -> None:
    record.copies[:, record.layout.canaries[:, :, 1]] *= 3


def drop_updates(record: RunRecord) -> None:
    record.copies[0, record.layout.canaries[:, :, 1]] = 0
    record.replicas[0].versions[:, 1] = 0


def overflow(record: RunRecord) -> None:
    record.copies[:, record.layout.canaries[:, :, 0]] = np.inf
    record.copies[:, record.layout.canaries[:, :, 1]] = np.nan


def sum_every_element(record: RunRecord) -> None:
    """What `audit=full` adds: nothing was lost anywhere."""
    record.added = NOISE.normal(size=record.layout.size)
    record.initial = (record.copies[0] - record.added).astype(np.float32)
    record.magnitudes = STEPS * np.abs(record.initial.astype(np.float64)) + np.abs(record.copies[0])


def lose_inside_a_tensor(record: RunRecord) -> None:
    sum_every_element(record)
    record.copies[:, record.layout.segments[0].values + 5] -= 1e-3


def fracture_a_read(record: RunRecord) -> None:
    canaries = np.full((2, 2, REPLICAS), 3, np.float32)
    canaries[1, :, 0] = 4
    record.replicas[1].read_state[3] = FRACTURED
    record.replicas[1].torn_witness = (3, canaries)


def tear_a_tensor(record: RunRecord) -> None:
    canaries = np.full((2, 2, REPLICAS), 3, np.float32)
    canaries[0, 1, 0] = 4
    record.replicas[1].read_state[3] = TORN_TENSOR
    record.replicas[1].torn_witness = (3, canaries)


def cross_the_order(record: RunRecord) -> None:
    record.replicas[0].versions[4] = (5, 3)
    record.replicas[0].versions[5] = (4, 5)


def read_late(record: RunRecord) -> None:
    record.replicas[1].staleness[7] = 2


def scale_what_is_applied(record: RunRecord) -> None:
    for reference in record.references:
        reference.applied *= 2


def mix_a_gradient(record: RunRecord) -> None:
    values = np.flatnonzero(record.layout.is_value[: record.layout.read_size])
    contribution = record.references[1].contribution
    contribution[values[0]] = np.nextafter(contribution[values[0]], np.float32(9))


def drift_apart(record: RunRecord) -> None:
    record.copies[1, record.layout.segments[2].values] += 1e-3  # in a slot: weights alone are not all there is


def compute_in_bfloat16(record: RunRecord) -> None:
    record.replicas[1].computed_in[3] = code("bfloat16")


def compute_a_kernels_gradient_in_bfloat16(record: RunRecord) -> None:
    record.replicas[1].gradients_in[3] = code("bfloat16")


def leave_a_mode_on(record: RunRecord) -> None:
    record.mode_left = "bfloat16"


def make_the_first_call_again(record: RunRecord) -> None:
    column(record, 1, "first_call")[0] = 1


def column(record: RunRecord, own: int, name: str) -> np.ndarray:
    return record.replicas[own].noted[:, Noted._fields.index(name)]


def read_back_another_gradient(record: RunRecord) -> None:
    for own in range(REPLICAS):
        column(record, own, "mixed")[:] = 0
    column(record, 1, "mixed")[2:4] = 1


def draw_what_another_step_drew(record: RunRecord) -> None:
    record.replicas[1].random_words[3] = record.replicas[0].random_words[2]
    record.expected_words[1, 3] = record.replicas[0].random_words[2]


def draw_other_numbers(record: RunRecord) -> None:
    record.replicas[1].random_words[3] = (999, 999)


def take_a_batch_twice(record: RunRecord) -> None:
    column(record, 1, "batch")[4] = column(record, 0, "batch")[4]
    record.replicas[1].first_samples[4] = record.replicas[0].first_samples[4]


def see_other_samples(record: RunRecord) -> None:
    record.replicas[1].first_samples[4] += 1


def run_under_another_setting(record: RunRecord) -> None:
    record.settings[1].append(Difference("a setting", "thread", "x", "y"))


def compute_a_gradient_in_bfloat16(record: RunRecord) -> None:
    kernel = record.layout.segments[0].span
    bits = record.references[2].contribution[kernel].view(np.uint32) & 0xFFFF0000
    record.references[2].contribution[kernel] = bits.view(np.float32)
    record.references[2].recomputed = record.references[2].contribution.copy()


DEFECTS: list[tuple[Callable[[RunRecord], None], str, str, int]] = [
    (lose_an_update, "no_lost_updates", "overwritten_update", 1),
    (drop_updates, "no_lost_updates", "dropped_update", STEPS),
    (multiply_updates, "no_lost_updates", "multiplied_update", STEPS),
    (overflow, "no_lost_updates", "multiplied_update", 2 * STEPS),
    (lose_inside_a_tensor, "no_lost_updates", "unconserved_element", 2),
    (fracture_a_read, "no_torn_reads", "fractured_read", 1),
    (tear_a_tensor, "no_torn_reads", "torn_tensor", 1),
    (cross_the_order, "atomic_updates", "write_cycle", 1),
    (read_late, "fresh_gradients", "stale_gradient", 1),
    (scale_what_is_applied, "joint_gradient", "not_joint", 4),
    (mix_a_gradient, "gradients_unmixed", "mixed_gradient", 1),
    (drift_apart, "replicas_identical", "divergence", 1),
    (compute_in_bfloat16, "precision_as_asked", "precision_off", 1),
    (compute_a_kernels_gradient_in_bfloat16, "precision_as_asked", "gradient_precision_off", 1),
    (leave_a_mode_on, "precision_as_asked", "mode_left_on", 1),
    (make_the_first_call_again, "initialized_once", "repeated_first_call", 1),
    (read_back_another_gradient, "gradients_unmixed", "mixed_gradient", 2),
    (draw_what_another_step_drew, "rng_independent", "repeated_random_numbers", 1),
    (draw_other_numbers, "rng_independent", "underived_random_numbers", 1),
    (take_a_batch_twice, "samples_once", "repeated_samples", 8),
    (take_a_batch_twice, "samples_once", "missed_samples", 8),
    (see_other_samples, "samples_once", "wrong_samples", 8),
    (run_under_another_setting, "settings_as_asked", "setting_off", 1),
    (compute_a_gradient_in_bfloat16, "precision_as_asked", "gradient_precision_off", 1),
]


@pytest.mark.parametrize("full", [False, True])
def test_a_clean_record_is_upheld(full: bool) -> None:
    config = config_of()
    record = clean_record(config)
    if full:
        sum_every_element(record)
    verdict = judge(config, record, None, {})
    assert verdict.verdict == "upheld"
    assert verdict.anomalies == []
    assert statuses(verdict)["no_lost_updates"] == "upheld"
    assert statuses(verdict)["same_bits"] == "not_checked"
    assert verdict.metrics["updates_kept"] == verdict.metrics["updates_expected"] == STEPS * REPLICAS
    assert exit_status(verdict, "inconclusive") == 0


@pytest.mark.parametrize(
    ("plant", "guarantee", "kind", "count"), DEFECTS, ids=[plant.__name__ for plant, *_ in DEFECTS]
)
def test_a_planted_defect_is_caught(plant: Callable[[RunRecord], None], guarantee: str, kind: str, count: int) -> None:
    config = config_of()
    record = clean_record(config)
    plant(record)
    verdict = judge(config, record, None, {})
    assert verdict.verdict == "violated"
    violated = {name for name, status in statuses(verdict).items() if status == "violated"}
    assert violated == {guarantee}
    found = {anomaly.kind: anomaly.count for anomaly in verdict.anomalies}
    assert found[kind] == count
    assert all(anomaly.witness and anomaly.where for anomaly in verdict.anomalies)
    assert [exit_status(verdict, fail_on) for fail_on in ("violated", "anomaly", "inconclusive", "never")] == [
        1,
        1,
        1,
        0,
    ]


def test_what_an_unsafe_mode_does_not_claim_is_an_anomaly_until_it_is_required() -> None:
    config = config_of("overwrite", "threads")
    record = clean_record(config)
    lose_an_update(record)
    verdict = judge(config, record, None, {})
    assert (verdict.verdict, statuses(verdict)["no_lost_updates"]) == ("anomaly", "anomaly")
    assert verdict.anomalies[0].remedy == "update_mode=locked updates the current values under a lock"
    assert [exit_status(verdict, fail_on) for fail_on in ("violated", "anomaly")] == [0, 1]

    verdict = judge(replace(config, require=["no_lost_updates"]), record, None, {})
    assert (verdict.verdict, statuses(verdict)["no_lost_updates"]) == ("violated", "violated")


def test_copies_that_overflowed_alike_are_identical() -> None:
    config = config_of("reassigned_sum")
    record = clean_record(config)
    overflow(record)
    record.copies[:, record.layout.segments[0].values] = (np.inf, np.inf)
    record.copies[:, record.layout.segments[0].values + 1] = (np.nan, np.nan)
    verdict = judge(config, record, None, {})
    assert statuses(verdict)["replicas_identical"] == "upheld"
    assert verdict.metrics["replica_divergence_max"] == 0
    assert "shows an overflow" in verdict.anomalies[0].witness


def test_runs_that_end_in_different_bits_break_same_bits() -> None:
    config = config_of(audit=Audit(repeat=3))
    record = clean_record(config)
    assert judge(config, record, None, {}, ["a", "a", "a"]).verdict == "upheld"
    verdict = judge(config, record, None, {}, ["a", "b", "a"])
    assert (verdict.verdict, verdict.outcomes_distinct) == ("violated", 2)
    assert statuses(verdict)["same_bits"] == "violated"
    assert [(anomaly.kind, anomaly.count, anomaly.of) for anomaly in verdict.anomalies] == [("different_bits", 1, 3)]


def test_an_unsafe_mode_that_shows_nothing_is_inconclusive_about_what_it_might_break() -> None:
    config = config_of("overwrite", "threads")
    verdict = judge(config, clean_record(config), None, {})
    assert statuses(verdict)["no_lost_updates"] == "not_seen"
    assert verdict.verdict == "inconclusive"


def test_staleness_is_given_up_by_locked_and_held_against_it_only_when_required() -> None:
    config = config_of("locked", "threads")
    record = clean_record(config)
    read_late(record)
    verdict = judge(config, record, None, {})
    assert (verdict.verdict, statuses(verdict)["fresh_gradients"]) == ("upheld", "not_applicable")
    required = judge(replace(config, require=["fresh_gradients"]), record, None, {})
    assert (required.verdict, statuses(required)["fresh_gradients"]) == ("violated", "violated")
    remedy = "update_mode=all_reduce,serialized,optimistic,unscaled_sum claim fresh_gradients"
    assert [anomaly.remedy for anomaly in required.anomalies] == [remedy]


def test_order_is_not_read_off_counts_that_were_overwritten() -> None:
    config = config_of("write_locked", "threads")
    record = clean_record(config)
    cross_the_order(record)
    record.copies[:, record.layout.canaries[0, 0, 0]] -= 1
    assert statuses(judge(config, record, None, {}))["atomic_updates"] == "not_checked"


def test_each_replicas_own_batch_normalization_has_no_joint_gradient() -> None:
    config = config_of(model=Cnn(normalization="batch"))
    record = clean_record(config)
    scale_what_is_applied(record)
    verdict = judge(config, record, None, {})
    assert (verdict.verdict, statuses(verdict)["joint_gradient"]) == ("upheld", "not_applicable")


def test_a_step_that_overflowed_applied_nothing_and_is_held_to_nothing() -> None:
    config = config_of()
    record = clean_record(config)
    for reference in record.references[:REPLICAS]:  # one step's
        reference.applied *= 2
    assert statuses(judge(config, record, None, {}))["joint_gradient"] == "violated"
    record.replicas[1].loss_scale[record.references[0].step] = (1024, 1)
    verdict = judge(config, record, None, {})
    assert statuses(verdict)["joint_gradient"] == "upheld"
    assert verdict.verdict == "upheld"


@pytest.mark.parametrize(("rounded", "status"), [(0.04, "violated"), (0.05, "upheld")])
def test_a_joint_gradient_that_rounds_more_than_usual_allows_for_three_times_that(rounded: float, status: str) -> None:
    config = config_of(precision=Precision("mixed_bfloat16"))
    record = clean_record(config)
    for reference in record.references:
        reference.asked = "float32"  # as in the record, where nothing was off
        reference.applied *= np.float32(1.13)
        reference.joint_in_float32 = reference.joint * np.float32(1 + rounded)
    verdict = judge(config, record, None, {})
    assert statuses(verdict)["joint_gradient"] == status
    told = next(each.evidence for each in verdict.guarantees if each.name == "joint_gradient")
    assert f"tolerance 5e-02, or 3 times the joint gradient's own rounding, {rounded:.1e}" in told


@pytest.mark.parametrize("mixed", [0, 1])
def test_a_gradient_that_another_was_added_to_says_nothing_about_the_precision(mixed: int) -> None:
    record = clean_record(config_of())
    record.replicas[1].gradients_in[3] = code("bfloat16")
    column(record, 1, "mixed")[:] = mixed
    for reference in record.references:
        column(record, reference.replica_id, "mixed")[reference.step] = mixed
        kernel = record.layout.segments[0].span
        reference.contribution[kernel] = (reference.contribution[kernel].view(np.uint32) & 0xFFFF0000).view(np.float32)
    (finding, _) = computed_precision(record)
    assert [each.kind for each in finding.anomalies] == ([] if mixed else ["gradient_precision_off"])


def test_bfloat16_that_was_asked_for_is_upheld() -> None:
    config = config_of(precision=Precision("mixed_bfloat16"))
    record = clean_record(config)
    for own in range(REPLICAS):
        column(record, own, "asked")[:] = code("bfloat16")
    assert statuses(judge(config, record, None, {}))["precision_as_asked"] == "violated"
    for own, replica in enumerate(record.replicas):
        replica.computed_in[:] = replica.gradients_in[:] = column(record, own, "asked")[:] = code("bfloat16")
    kernel = record.layout.segments[0].span
    for reference in record.references:
        reference.contribution[kernel] = (reference.contribution[kernel].view(np.uint32) & 0xFFFF0000).view(np.float32)
        reference.asked = "bfloat16"
    assert statuses(judge(config, record, None, {}))["precision_as_asked"] == "upheld"


def test_without_an_audit_everything_claimed_stays_unchecked() -> None:
    config = config_of(audit=Audit("none"))
    verdict = judge(config, clean_record(config), None, {})
    assert verdict.verdict == "inconclusive"
    assert set(statuses(verdict).values()) == {"not_checked"}
    assert verdict.metrics["updates_kept"] is None
    assert exit_status(verdict, "inconclusive") == 1


def test_a_broken_run_upholds_nothing() -> None:
    config = config_of()
    verdict = judge(config, clean_record(config), Error("crash", "boom"), {})
    assert verdict.verdict == "broken"
    assert set(statuses(verdict).values()) == {"not_checked"}
    assert verdict.final_parameters_sha256 is None
    assert exit_status(verdict, "never") == 3


def test_a_saved_verdict_is_plain_json_whatever_the_numbers(tmp_path) -> None:
    config = config_of()
    record = clean_record(config)
    record.replicas[0].losses[-1] = np.inf
    verdict = judge(config, record, None, {"command": "python -m trainer"})
    found = json.loads(save(verdict, tmp_path).read_text())
    assert list(found)[:4] == ["schema", "verdict", "error", "run"]
    assert found["schema"] == 1
    assert found["metrics"]["loss"] is None
    assert [path.name for path in tmp_path.iterdir()] == ["verdict.json"]


@pytest.mark.parametrize("num_steps", [1, 255, 256, 257, 600])
def test_a_recorder_reads_off_every_row_in_its_place(num_steps: int) -> None:
    record = ReplicaRecord.empty(0, num_steps, REPLICAS)
    layout = plan([("kernel", (4, 3)), ("bias", (3,))], [], (), counter=False, num_replicas=REPLICAS)
    recorder = Recorder(record, ROW, layout)
    for step in range(num_steps):
        row = np.full(ROW.canaries.stop, step, np.float32)
        row[ROW.logits] = 0.1
        if step == num_steps - 1:
            row[-1] += 1
        recorder.note(row, Noted(2 * step, step % 3, 7 * step, code("float32"), 0, 0))
    recorder.flush()
    assert record.column("batch").tolist() == [7 * step for step in range(num_steps)]
    assert record.first_samples.tolist() == list(range(num_steps))
    assert record.losses.tolist() == list(range(num_steps))
    assert record.read_version.tolist() == [2 * step for step in range(num_steps)]
    assert record.staleness.tolist() == [step % 3 for step in range(num_steps)]
    assert record.versions[:, 0].tolist() == list(range(num_steps))
    assert np.flatnonzero(record.read_state).tolist() == [num_steps - 1]
    assert record.torn_witness is not None
    assert record.torn_witness[0] == num_steps - 1
    assert record.computed == {"float32": num_steps}

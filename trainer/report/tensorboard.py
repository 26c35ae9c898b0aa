"""Which of a run's numbers go under which TensorBoard tag.

The step of a point is the number of steps that came before what it shows: row 0 is the first step, at the initial
weights, and an evaluation "at 200" is one after 200 steps.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer.audit import profile
from trainer.audit.gradients import GradientRow, gradient_rows
from trainer.audit.records import WHOLE, Average, Evaluation, RunRecord
from trainer.audit.verdict import WORDS, Verdict
from trainer.config import Config
from trainer.report import buckets, cosines, elements, grid, heatmap, kept_updates, markdown
from trainer.report.buckets import Buckets
from trainer.report.charts import categories
from trainer.report.dtypes import heat_map
from trainer.report.events import EventFile
from trainer.report.state_scalars import StateScalars
from trainer.report.tags import DESCRIPTIONS, HYPERPARAMETERS, LOST, METRICS, hyperparameters

# Final scalars: tag -> name among the verdict's metrics.
FINAL_SCALARS = {
    "updates/expected": "updates_expected",
    "updates/kept": "updates_kept",
    "updates/staleness_mean": "staleness_mean",
    "updates/staleness_max": "staleness_max",
    "gradients/error_max": "gradient_error_max",
    "replicas/divergence_max": "replica_divergence_max",
    "speed/micro_steps_per_second_mean": "micro_steps_per_second",
}


# Histograms of the staleness in a run: enough to see it change, few enough to be drawn one behind the other.
HISTOGRAMS = 20


def pictures(record: RunRecord) -> dict[str, bytes]:
    """What there is to draw of a run, as PNG files by tag."""
    found: dict[str, bytes] = {}
    if (shown := heat_map(record)) is not None:
        found["precision/heatmap"] = heatmap.png(shown)
    if (matrices := cosines.matrices(record)) is not None:
        found["gradients/cosines"] = grid.png(matrices)
    if (kept := kept_updates.by_variable(record)) is not None:
        found["updates/kept_by_variable"] = grid.png(kept)
    if maps := elements.maps(record):
        found["updates/kept_by_element"] = elements.png(maps)
    return found


class _Points:
    """Which rows to write as points: the `first`, every `every`-th after it, and the very last at the end.

    Each is a slice that ends with the row and starts after the previous one, for tags that sum up what lies between.
    """

    def __init__(self, every: int, first: int = 0) -> None:
        self._every = every
        self._next = first
        self._written = 0

    def due(self, complete: int, *, last: bool) -> list[slice]:
        """The points that `complete` rows allow and that were not due before."""
        rows = list(range(self._next, complete, self._every))
        if rows:
            self._next = rows[-1] + self._every
        if last and complete > max(self._written, *(row + 1 for row in rows), 0):
            rows.append(complete - 1)
        ends = [self._written, *(row + 1 for row in rows)]
        self._written = ends[-1]
        return [slice(start, stop) for start, stop in itertools.pairwise(ends)]


class RunEvents:
    """One run's event file: rows while it goes on, the audit's numbers and the texts at its end.

    Thread-safety: none; one thread writes. Replicas may write their records meanwhile: only complete rows are read.
    """

    def __init__(self, config: Config, folder: Path) -> None:
        self._file = EventFile(folder, DESCRIPTIONS)
        self._file.session_started(hyperparameters(config), HYPERPARAMETERS, METRICS)
        if shown := categories(config):
            self._file.charts(shown)
        self._file.text(0, "train/config", markdown.config(config))
        self._file.flush()
        self._fail_on = config.fail_on
        self._losses = _Points(config.train.log_every)
        self._audited = _Points(config.train.log_every)
        stretch = -(-config.train.steps // HISTOGRAMS)
        self._stretches = _Points(stretch, first=stretch - 1)
        self._torn_reads = 0
        self._state = StateScalars()
        self._clock: tuple[float, int] | None = None
        self._success = False

    def rows(self, record: RunRecord, *, last: bool = False) -> None:
        """Write the points that are due since the previous call; `last` adds the last row."""
        losses = self._losses.due(record.steps_done, last=last) if record.trains else []
        for point in losses:
            self._file.scalars(point.stop - 1, _losses(record, point.stop - 1))
        # None at the end: what the audit took by then is not the replicas' time.
        if not last and (speed := self._speed(record.micro_steps_done, due=bool(losses))):
            self._file.scalars(losses[-1].stop - 1, speed)
        complete = _rows_audited(record)
        stretches = self._stretches.due(complete, last=last)
        for point in stretches:
            self._file.histograms(point.stop - 1, _staleness_histograms(record, point))
        audited = self._audited.due(complete, last=last)
        for point in audited:
            self._file.scalars(point.stop - 1, self._updates(record, point) | self._state.of(record, point))
        if losses or audited or stretches:
            self._file.flush()

    def kept(self, step: int, kept: float, made: int, apart: float | None = None) -> None:
        self._file.scalars(step, _kept(kept, made) | ({} if apart is None else {"replicas/divergence": apart}))
        self._file.flush()

    def evaluated(self, evaluation: Evaluation) -> None:
        values = {"train/accuracy": evaluation.accuracy, "train/held_out_loss": evaluation.loss}
        self._file.scalars(evaluation.step, values)
        self._file.flush()

    def finished(self, record: RunRecord | None, verdict: Verdict) -> None:
        """Write what only the end knows: the audit's numbers and the verdict."""
        if record is not None:
            self.rows(record, last=True)
            references = gradient_rows(record)
            for reference in references:
                self._file.scalars(reference.step, _gradients(reference))
            self._file.histograms(record.steps_done, _norm_histograms(references))
            for average in record.averages:
                self._file.scalars(average.step, _apart(average))
            for step, phases in profile.by_step(profile.step_times(record)).items():
                self._file.scalars(step, {f"speed/{name}_seconds": seconds for name, seconds in phases.items()})
            self._file.images(record.steps_done, pictures(record))
        step = record.steps_done if record is not None else 0
        self._file.scalars(step, _final(verdict) | _lost(record, verdict))
        self._file.text(step, "replicas/verdict", markdown.verdict(verdict, self._fail_on))
        self._file.flush()
        self._success = verdict.error is None

    def close(self) -> None:
        """End the run's row in the HParams table, as failed if it did not finish or broke, and close the file."""
        self._file.session_ended(success=self._success)
        self._file.close()

    def _updates(self, record: RunRecord, point: slice) -> dict[str, float]:
        values = {tag: float(staleness.mean()) for tag, staleness in _staleness("updates/staleness", record, point)}
        for replica in record.replicas:
            self._torn_reads += int(np.count_nonzero(replica.read_state[point] != WHOLE))
        return {**values, "updates/torn_reads": self._torn_reads}

    def _speed(self, done: int, *, due: bool) -> dict[str, float]:
        now = time.monotonic()
        if self._clock is None:
            # Start-up and capture came before the first micro-steps that are seen.
            self._clock = (now, done) if done else None
            return {}
        then, before = self._clock
        if not due or now <= then:
            return {}
        self._clock = now, done
        return {"speed/micro_steps_per_second": (done - before) / (now - then)}


def _rows_audited(record: RunRecord) -> int:
    """Rows whose audit columns are complete in every replica; they are read off in blocks, `computed` last."""
    return min(replica.computed.total() for replica in record.replicas)


def _losses(record: RunRecord, row: int) -> dict[str, float]:
    losses = {f"train/loss/replica_{replica.replica_id}": float(replica.losses[row]) for replica in record.replicas}
    return {**losses, "train/loss": sum(losses.values()) / len(losses)}


def _staleness(tag: str, record: RunRecord, rows: slice) -> Iterator[tuple[str, NDArray[np.int32]]]:
    """The staleness that was recorded in some rows: each replica's, and all replicas' under the tag itself."""
    recorded = {f"{tag}/replica_{replica.replica_id}": replica.staleness[rows] for replica in record.replicas}
    recorded[tag] = np.concatenate(list(recorded.values()))
    for name, staleness in recorded.items():
        if (known := staleness[staleness >= 0]).size:
            yield name, known


def _staleness_histograms(record: RunRecord, rows: slice) -> dict[str, Buckets]:
    found = _staleness("updates/staleness_histogram", record, rows)
    return {tag: buckets.of_counts(staleness) for tag, staleness in found}


def _norm_histograms(references: Sequence[GradientRow]) -> dict[str, Buckets]:
    """Each replica's gradient norms, and all replicas'; none that are not finite, which have no place on an axis."""
    norms: dict[str, list[float]] = defaultdict(list)
    for reference in references:
        for replica, norm in reference.norms.items():
            if math.isfinite(norm):
                norms[f"gradients/norm_histogram/replica_{replica}"].append(norm)
    everyone = [norm for own in norms.values() for norm in own]
    if everyone:
        norms["gradients/norm_histogram"] = everyone
    return {tag: buckets.of_numbers(np.array(own)) for tag, own in norms.items()}


def _gradients(reference: GradientRow) -> dict[str, float]:
    values = {f"gradients/norm/replica_{replica}": norm for replica, norm in reference.norms.items()}
    values |= {f"gradients/error/replica_{replica}": error for replica, error in reference.errors.items()}
    return values if reference.cosine_min is None else {**values, "gradients/cosine_min": reference.cosine_min}


def _apart(average: Average) -> dict[str, float]:
    tag = "replicas/divergence_before_average"
    return {tag: average.largest, f"{tag}_relative": average.relative}


def _kept(kept: float, made: int) -> dict[str, float]:
    values = {"updates/kept": kept, "updates/expected": float(made)}
    return {**values, "updates/kept_share": kept / made} if made else values


def _final(verdict: Verdict) -> dict[str, float]:
    metrics = verdict.metrics
    values = {tag: float(value) for tag, name in FINAL_SCALARS.items() if (value := metrics.get(name)) is not None}
    kept, expected = metrics.get("updates_kept"), metrics.get("updates_expected")
    if kept is not None and expected:
        values |= _kept(kept, int(expected))
    if (apart := metrics.get("replica_divergence_max")) is not None:
        values["replicas/divergence"] = float(apart)
    values["replicas/verdict_level"] = len(WORDS) - 1 - WORDS.index(verdict.verdict)
    for row in verdict.precision:
        values[f"precision/steps_off/replica_{row.replica}"] = row.steps_off
    return values


def _lost(record: RunRecord | None, verdict: Verdict) -> dict[str, float]:
    """How often each kind of anomaly was seen, and what the holders of replica state lost."""
    seen: Counter[str] = Counter()
    for anomaly in verdict.anomalies:
        seen[anomaly.kind] += anomaly.count
    checked = {each.name for each in verdict.guarantees if each.status not in ("not_checked", "not_applicable")}
    values = {f"replicas/anomalies/{kind}": float(count) for kind, count in seen.items()}
    if record is None or not record.trains:
        return values  # a small workload counts in kinds of its own
    for tag, (guarantee, kinds) in LOST.items():
        # A shared generator's numbers may be nobody's in particular: then only repeated ones are looked for.
        known = tag != "train/random_numbers_off" or record.expected_words is not None
        if guarantee in checked and known:
            values[tag] = sum(seen[kind] for kind in kinds)
    return values

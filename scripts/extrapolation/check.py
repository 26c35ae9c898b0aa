"""Predictions beside what real runs measure: the same modes, replicas and cores, one run each."""

from __future__ import annotations

import json
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench_speed.processes import TimedOut, run

from extrapolation.pieces import BadRun, rate, steps_of
from extrapolation.predict import Prediction

ROOT = Path(__file__).resolve().parent.parent.parent
# Overrides that each run of a check has of its own.
OWN = ("update_mode", "num_replicas", "audit", "train.steps", "hydra", "fail_on", "+hydra", "resume")
MICRO_STEPS = 4000  # that a run takes, about
FEWEST_STEPS, MOST_STEPS = 60, 1000  # of each replica
LIMIT_SECONDS = 300.0
# Figures, and from what measured value on their error is told as a share of it.
FIGURES = {"micro_steps_per_second": 0.0, "lock_wait_us": 2.0, "staleness_mean": 0.05, "lost_percent": 0.5}


@dataclass(frozen=True)
class Measured:
    """One run. None: the mode has no such figure."""

    mode: str
    replicas: int
    micro_steps_per_second: float
    lock_wait_us: float
    staleness_mean: float
    lost_percent: float | None
    command: str


@dataclass(frozen=True)
class Compared:
    """One figure of one run; `error` is a share of what was measured, None where that is next to nothing."""

    mode: str
    replicas: int
    figure: str
    predicted: float
    measured: float
    error: float | None


def overrides_of(command: str) -> list[str]:
    """What a calibrating run was given, but for what a check sets itself."""
    words = shlex.split(command)[3:]
    return [word for word in words if word.partition("=")[0].partition(".")[0] not in OWN and _key(word) not in OWN]


def _key(word: str) -> str:
    return word.partition("=")[0]


def run_of(mode: str, replicas: int, folder: Path, overrides: Iterable[str]) -> tuple[list[str], Path]:
    """A run's command and folder."""
    steps = min(MOST_STEPS, max(FEWEST_STEPS, MICRO_STEPS // replicas))
    where = folder / f"{mode}_{replicas}"
    own = [f"update_mode={mode}", f"num_replicas={replicas}", f"train.steps={steps}", "audit=profile"]
    every = [*overrides, *own, "fail_on=never", f"hydra.run.dir={where}"]
    return [sys.executable, "-m", "trainer", *every], where


def make(mode: str, replicas: int, folder: Path, overrides: Iterable[str]) -> Path:
    """Make one run; returns its folder.

    Raises:
        BadRun: it did not come to its end.
    """
    command, where = run_of(mode, replicas, folder, overrides)
    try:
        ended = run(command, str(ROOT), LIMIT_SECONDS)
    except TimedOut as error:
        raise BadRun(f"update_mode={mode} num_replicas={replicas}: {error}.") from None
    except subprocess.SubprocessError as error:
        raise BadRun(f"update_mode={mode} num_replicas={replicas}: {error}.") from None
    if ended.status != 0:
        lines = ended.errors.strip().splitlines() or [f"ended with status {ended.status}"]
        raise BadRun(f"update_mode={mode} num_replicas={replicas}: {lines[-1]}")
    return where


def measured(where: Path) -> Measured:
    """What a run's traced steps, and its verdict, say."""
    verdict = json.loads((where / "verdict.json").read_text(encoding="utf-8"))
    run, metrics = verdict["run"], verdict["metrics"]
    steps = steps_of(json.loads((where / "trace.json").read_text(encoding="utf-8")))
    expected, kept = metrics["updates_expected"], metrics["updates_kept"]
    return Measured(
        mode=run["update_mode"],
        replicas=run["num_replicas"],
        micro_steps_per_second=rate(steps),
        lock_wait_us=1e6 * statistics.fmean(step.lock_wait for step in steps),
        staleness_mean=metrics["staleness_mean"],
        lost_percent=None if run["update_mode"] == "lock_free" else 100 * (1 - kept / expected),
        command=run["command"],
    )


def compared(prediction: Prediction, found: Measured) -> list[Compared]:
    lines = []
    for figure, least in FIGURES.items():
        predicted, value = getattr(prediction, figure), getattr(found, figure)
        if predicted is None or value is None:
            continue
        error = predicted / value - 1 if value > least else None
        lines.append(Compared(found.mode, found.replicas, figure, predicted, value, error))
    return lines


def medians(lines: Sequence[Compared]) -> dict[str, float]:
    """Figure -> median of its errors' sizes."""
    sizes: dict[str, list[float]] = {}
    for line in lines:
        if line.error is not None:
            sizes.setdefault(line.figure, []).append(abs(line.error))
    return {figure: statistics.median(each) for figure, each in sizes.items()}

"""A prediction: simulations with several seeds, and what they come to."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

from extrapolation.pieces import Calibration, Pieces
from extrapolation.simulate import Outcome, Setting, simulate

MOST_SWITCH_SECONDS, SWITCH_TOLERANCE = 1e-3, 1e-6


@dataclass(frozen=True)
class Prediction:
    """Medians over seeds. Times are of a micro-step, on average.

    Attributes:
        spread_percent: between the fastest and the slowest seed, of the median.
        lost_percent: of all updates; None where that is not told.
        again_percent: gradients that were computed again, of all updates.
    """

    mode: str
    replicas: int
    layout: str
    micro_steps_per_second: float
    spread_percent: float
    lock_wait_us: float
    barrier_wait_us: float
    core_wait_us: float
    staleness_mean: float
    staleness_max: int
    lost_percent: float | None
    again_percent: float


COLUMNS = [field.name for field in fields(Prediction)]


def predict(pieces: Pieces, setting: Setting, seeds: Sequence[int]) -> Prediction:
    outcomes = [simulate(pieces, setting, seed) for seed in seeds]
    speeds = [outcome.micro_steps_per_second for outcome in outcomes]
    speed = statistics.median(speeds)
    return Prediction(
        mode=setting.mode,
        replicas=setting.replicas,
        layout=setting.layout,
        micro_steps_per_second=speed,
        spread_percent=100 * (max(speeds) - min(speeds)) / speed,
        lock_wait_us=1e6 * _median(outcomes, "lock_wait_seconds"),
        barrier_wait_us=1e6 * _median(outcomes, "barrier_wait_seconds"),
        core_wait_us=1e6 * _median(outcomes, "core_wait_seconds"),
        staleness_mean=_median(outcomes, "staleness_mean"),
        staleness_max=max(outcome.staleness_max for outcome in outcomes),
        lost_percent=None if outcomes[0].lost_share is None else 100 * _median(outcomes, "lost_share"),
        again_percent=100 * _median(outcomes, "again_share"),
    )


def switch_seconds(calibration: Calibration, setting: Callable[[str, int], Setting]) -> float:
    """What it takes a core to go over to another thread, so that the run with more replicas than cores is as fast as it
    was; 0 where there is none, or where it was faster than without.

    Args:
        setting: of a mode and a number of replicas.
    """
    crowded = next((run for run in calibration.runs if run.crowded and run.rate), None)
    if crowded is None or all(run.crowded for run in calibration.runs):
        return 0.0
    pieces, one = calibration.of(crowded.mode, crowded.replicas), setting(crowded.mode, crowded.replicas)
    low, high = 0.0, MOST_SWITCH_SECONDS
    while high - low > SWITCH_TOLERANCE:
        middle = (low + high) / 2
        predicted = simulate(pieces, replace(one, switch_seconds=middle)).micro_steps_per_second
        low, high = (middle, high) if predicted > crowded.rate else (low, middle)
    return low


def _median(outcomes: Sequence[Outcome], name: str) -> float:
    return float(statistics.median(getattr(outcome, name) for outcome in outcomes))

"""What the speed is held to, computed from a run's rows: ratios, memory and start-up.

A ratio is taken within each round, where both sides met the machine at about the same time; its median counts.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from cases import CASES

from bench_speed.results import Row, by_round

# `ENGINE` in a contender's name stands for each engine that was measured.
ENGINE = "ENGINE"
REPLICAS = 2
# What a machine that computes in bfloat16 says of itself.
HARDWARE_BFLOAT16 = "with bfloat16"


@dataclass(frozen=True)
class Ratio:
    """`over` is to be at least `least[model]` times as fast as `under`; each is a contender's name and its replicas."""

    told: str
    over: tuple[str, int]
    under: tuple[str, int]
    least: dict[str, float]


def _three(small_mlp: float, mlp: float, cnn: float) -> dict[str, float]:
    return {"small_mlp": small_mlp, "mlp": mlp, "cnn": cnn}


def _two(least: float) -> dict[str, float]:
    return {"mlp": least, "cnn": least}


def _ours(mode: str, more: str = "") -> str:
    return f"threads/{mode}/{ENGINE}{more}"


ALL_REDUCE, LOCKED, LOCK_FREE = _ours("all_reduce"), _ours("locked"), _ours("lock_free")
MIRRORED = "mirrored/all_reduce"

RATIOS = (
    Ratio("all_reduce / DDP", (ALL_REDUCE, 2), ("ddp", 2), _three(20, 4, 2)),
    Ratio("locked / Hogwild", (LOCKED, 2), ("hogwild", 2), _three(4, 1.5, 1.5)),
    Ratio("locked / lock_free", (LOCKED, 2), (LOCK_FREE, 2), _three(0.95, 0.95, 0.95)),
    Ratio("all_reduce / lock_free", (ALL_REDUCE, 2), (LOCK_FREE, 2), _two(0.9)),
    Ratio("all_reduce, 2 replicas / 1 on one core", (ALL_REDUCE, 2), (ALL_REDUCE, 1), _two(1.9)),
    Ratio("locked, 2 replicas / 1 on one core", (LOCKED, 2), (LOCKED, 1), _two(1.9)),
    Ratio("1 replica / plain PyTorch loop", (ALL_REDUCE, 1), ("plain_torch", 1), _three(3, 1.5, 1.5)),
    Ratio("mixed_bfloat16 / float32", (_ours("all_reduce", "/mixed_bfloat16"), 2), (ALL_REDUCE, 2), _two(2)),
    Ratio("counters / no audit", (_ours("all_reduce", "/counters"), 2), (ALL_REDUCE, 2), _three(0.9, 0.97, 0.97)),
    Ratio("mirrored / model.fit under it", (MIRRORED, 2), ("mirrored_fit", 2), _three(20, 4, 3)),
    Ratio("mirrored / hand-written loop under it", (MIRRORED, 2), ("mirrored_loop", 2), _three(5, 1.5, 1.2)),
)

# Of the modes whose replicas need no copy of the weights; on which model; by how much an allocator may round up.
LEAN_MODES, MEMORY_MODEL, MEMORY_SLACK = (ALL_REDUCE, LOCK_FREE), "mlp", 1.1
MEMORY_REPLICAS = (1, 2, 4)
START_MODEL = "small_mlp"
START_SECONDS = {ALL_REDUCE: 4.0, MIRRORED: 6.0}


@dataclass(frozen=True)
class Judged:
    """One goal on one model: what was measured, as median, least and largest of the rounds, and what was asked.

    Attributes:
        at_most: the figure is to stay at or below the goal, not to reach it.
        note: why there is no figure, or what else it takes to read it.
    """

    told: str
    model: str
    engine: str
    goal: float
    unit: str
    at_most: bool
    figures: tuple[float, ...]
    note: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.figures)

    @property
    def reached(self) -> bool | None:
        """None where nothing was measured."""
        if not self.figures:
            return None
        return self.median <= self.goal if self.at_most else self.median >= self.goal


def engines(rows: Sequence[Row]) -> list[str]:
    """Those of the rows, in their order."""
    return list(dict.fromkeys(row.engine for row in rows if row.engine))


def judged(rows: Sequence[Row]) -> list[Judged]:
    """Every goal both of whose sides were tried, on each model and with each engine."""
    return [*_ratios(rows), *_memory(rows), *_starts(rows)]


def _ratios(rows: Sequence[Row]) -> Iterator[Judged]:
    speeds = by_round(rows, "speed", "micro_steps_per_second")
    reasons = {row.key: row.error for row in rows if row.kind == "speed" and row.error}
    for goal in RATIOS:
        for model, least in goal.least.items():
            for engine in _engines_of(goal, rows):
                keys = [(model, name.replace(ENGINE, engine), replicas) for name, replicas in (goal.over, goal.under)]
                if not all(key in speeds or key in reasons for key in keys):
                    continue
                over, under = (speeds.get(key, {}) for key in keys)
                figures = tuple(over[number] / under[number] for number in sorted(over.keys() & under.keys()))
                note = "" if figures else "; ".join(reasons[key] for key in keys if key in reasons)
                if "bfloat16" in goal.told and HARDWARE_BFLOAT16 not in rows[0].machine:
                    note = "for CPUs that compute in bfloat16, which this one does not"
                yield Judged(goal.told, model, engine, least, "x", False, figures, note)


def _engines_of(goal: Ratio, rows: Sequence[Row]) -> list[str]:
    names = goal.over[0] + goal.under[0]
    return engines(rows) if ENGINE in names else [""]


def _memory(rows: Sequence[Row]) -> Iterator[Judged]:
    """Bytes that each replica from the second on adds to the peak, less its activations, against a gradient buffer."""
    peaks = by_round(rows, "memory", "peak_rss_bytes")
    first, last = MEMORY_REPLICAS[0], MEMORY_REPLICAS[-1]
    megabyte = 1e6
    for mode in LEAN_MODES:
        for engine in engines(rows):
            name = mode.replace(ENGINE, engine)
            few, many = (peaks.get((MEMORY_MODEL, name, replicas), {}) for replicas in (first, last))
            rounds = sorted(few.keys() & many.keys())
            extra = [(many[number] - few[number]) / (last - first) - activations(MEMORY_MODEL) for number in rounds]
            if extra:
                buffer = gradient_buffer(MEMORY_MODEL)
                yield Judged(
                    f"{mode.split('/')[1]}, memory of an extra replica",
                    MEMORY_MODEL,
                    engine,
                    MEMORY_SLACK * buffer / megabyte,
                    " MB",
                    True,
                    tuple(each / megabyte for each in extra),
                    f"one gradient buffer: {buffer / megabyte:.2f} MB",
                )


def gradient_buffer(model: str) -> int:
    """Bytes of one float32 gradient of an MLP."""
    sizes = _layer_sizes(model)
    return 4 * sum((inputs + 1) * outputs for inputs, outputs in pairwise(sizes))


def activations(model: str) -> int:
    """Bytes of one batch through an MLP: the input, each layer before and after its activation, and their gradients."""
    inputs, *outputs = _layer_sizes(model)
    return 4 * CASES[model].batch_size * (inputs + 4 * sum(outputs))


def _layer_sizes(model: str) -> list[int]:
    case = CASES[model]
    return [case.features, *case.model.hidden, 10]


def _starts(rows: Sequence[Row]) -> Iterator[Judged]:
    walls = by_round(rows, "start", "wall_seconds")
    for name, limit in START_SECONDS.items():
        for engine in engines(rows) if ENGINE in name else [""]:
            found = walls.get((START_MODEL, name.replace(ENGINE, engine), REPLICAS))
            if found:
                told = f"start to first step, {'torch' if engine else 'TensorFlow'}"
                note = "wall time of a whole run of one step, exit included"
                yield Judged(told, START_MODEL, engine, limit, " s", True, tuple(found.values()), note)

"""What one round measures: by default what the goals need, with `everything` all there is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bench_speed import goals
from bench_speed.contenders import Contender, Ours

# Beside the goals: the engine that a run has by default; and what Keras does alone, on the smallest model and the CNN.
BESIDE = (("threads/all_reduce/torchscript", goals.REPLICAS),)
KERAS, KERAS_MODELS = (("keras_fit/torch", 1), ("keras_fit/tensorflow", 1)), ("small_mlp", "cnn")
# What the table of a model needs that no goal speaks of.
OTHER_MODELS = (
    (goals.ALL_REDUCE, 2),
    (goals.LOCKED, 2),
    (goals.ALL_REDUCE, 1),
    (goals.MIRRORED, 2),
    ("plain_torch", 1),
    ("ddp", 2),
    ("hogwild", 2),
)


@dataclass(frozen=True)
class Measurement:
    kind: str
    contender: Contender
    model: str
    replicas: int


# With more replicas than the goals speak of.
MORE = (goals.ALL_REDUCE, goals.LOCKED, goals.LOCK_FREE, goals.MIRRORED, "ddp", "hogwild", "mirrored_loop")


def default(
    everybody: dict[str, Contender], engines: Sequence[str], models: Sequence[str], replicas: Sequence[int]
) -> list[Measurement]:
    """What the goals need, and a little beside them."""
    wanted = [(model, name, number) for model in models for name, number in _needed(model, engines, replicas)]
    found = [
        Measurement("speed", everybody[name], model, number)
        for model, name, number in dict.fromkeys(wanted)
        if number in replicas
    ]
    return [*found, *_starts(everybody, engines, models), *_memory(everybody, engines, models)]


def everything(
    everybody: dict[str, Contender], engines: Sequence[str], models: Sequence[str], replicas: Sequence[int]
) -> list[Measurement]:
    """Every contender with every number of replicas that it takes, on every model."""
    found = [
        Measurement("speed", contender, model, number)
        for model in models
        for contender in everybody.values()
        for number in replicas
        if contender.takes(number)
    ]
    return [*found, *_starts(everybody, engines, models), *_memory(everybody, engines, models)]


def named(measurements: Sequence[Measurement], names: Sequence[str], engines: Sequence[str]) -> list[Measurement]:
    """Those of the contenders that are called so; or, where none is, whose name begins so, with one of the engines."""
    known = {each.contender.name for each in measurements}
    wanted = {each for name in names for each in ({name} if name in known else _beginning(name, measurements, engines))}
    return [each for each in measurements if each.contender.name in wanted]


def _beginning(name: str, measurements: Sequence[Measurement], engines: Sequence[str]) -> set[str]:
    found = {each.contender for each in measurements if each.contender.name.startswith(f"{name}/")}
    return {each.name for each in found if not isinstance(each, Ours) or each.engine in ("", *engines)}


def in_turn(measurements: Sequence[Measurement], number: int) -> list[Measurement]:
    """The order of a round: every other one backwards, so that nobody always comes after the same neighbour."""
    return list(measurements if number % 2 else reversed(measurements))


def _needed(model: str, engines: Sequence[str], replicas: Sequence[int]) -> Iterator[tuple[str, int]]:
    sides = [side for goal in goals.RATIOS if model in goal.least for side in (goal.over, goal.under)]
    sides += [] if sides else OTHER_MODELS
    sides += [*BESIDE, *(KERAS if model in KERAS_MODELS else ())]
    sides += [(name, number) for number in replicas if number > goals.REPLICAS for name in MORE]
    for name, number in sides:
        for engine in engines:
            yield name.replace(goals.ENGINE, engine), number


def _starts(everybody: dict[str, Contender], engines: Sequence[str], models: Sequence[str]) -> Iterator[Measurement]:
    names = [name.replace(goals.ENGINE, engine) for name in goals.START_SECONDS for engine in engines]
    if goals.START_MODEL in models:
        for name in dict.fromkeys(names):
            yield Measurement("start", everybody[name], goals.START_MODEL, goals.REPLICAS)


def _memory(everybody: dict[str, Contender], engines: Sequence[str], models: Sequence[str]) -> Iterator[Measurement]:
    if goals.MEMORY_MODEL in models:
        for engine in engines:
            for mode in goals.LEAN_MODES:
                for replicas in goals.MEMORY_REPLICAS:
                    contender = everybody[mode.replace(goals.ENGINE, engine)]
                    assert isinstance(contender, Ours)
                    yield Measurement("memory", contender, goals.MEMORY_MODEL, replicas)

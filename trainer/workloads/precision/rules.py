"""What `workload=precision` can be asked for, and what it then claims. Standard library only."""

from __future__ import annotations

from collections.abc import Iterable

from trainer.config import Config, ConfigError, PrecisionMode, Replay, nearest
from trainer.holders import holder, keeps
from trainer.workloads.small import MAX_REPLICAS

# Program -> the key of `state` whose mechanism it is about.
PROGRAMS = {"scope": "precision", "enable": "precision", "inherit": "precision", "first_call": "first_call"}
DTYPES = ("float16", "float32", "bfloat16", "none")


def check(config: Config) -> None:
    """Hold the program and its modes to each other, and the rest to being heeded.

    Raises:
        ConfigError: the first rule that is broken.
    """
    own = _own(config)
    _one_of("workload.program", own.program, PROGRAMS)
    for dtype in own.dtypes:
        _one_of("workload.dtypes", dtype, DTYPES)
    if own.program in ("scope", "enable") and len(set(own.dtypes)) < 2:
        raise ConfigError(
            f"workload.program={own.program} needs two different modes in workload.dtypes; got {_told(own.dtypes)}."
        )
    if not own.dtypes or (own.program != "enable" and own.dtypes[0] == "none"):
        raise ConfigError(
            f"workload.dtypes has to begin with the mode that workload.program={own.program} turns on; got "
            f"{_told(own.dtypes)}. Try [float16,bfloat16]."
        )
    key = PROGRAMS[own.program]
    for other in dict.fromkeys(PROGRAMS.values()):
        if other != key and getattr(config.state, other) != "safe":
            raise ConfigError(
                f"state.{other}={getattr(config.state, other)} does not go with workload.program={own.program}, which "
                f"is about state.{key}. Leave it out."
            )
    if config.strategy.name == "mirrored" and config.num_replicas > MAX_REPLICAS:
        raise ConfigError(
            f"num_replicas must be between 2 and {MAX_REPLICAS} under strategy=mirrored; got {config.num_replicas}."
        )
    if config.audit.repeat > 1 and not isinstance(config.schedule, Replay):
        raise ConfigError(
            f"audit.repeat={config.audit.repeat} needs schedule=replay with workload=precision: a free run makes its "
            "round train.steps times. Leave audit.repeat out."
        )


def claims(config: Config) -> frozenset[str]:
    """What the mechanism that the program is about puts forward under this strategy."""
    wanted = holder(config, PROGRAMS[_own(config).program])
    if config.strategy.name not in wanted.strategies:
        return frozenset()  # it is here to be seen hanging
    return frozenset({"no_deadlock", *([wanted.guarantee] if keeps(config, wanted) else [])})


def _own(config: Config) -> PrecisionMode:
    assert isinstance(config.workload, PrecisionMode)
    return config.workload


def _one_of(key: str, value: str, known: Iterable[str]) -> None:
    if value not in known:
        raise ConfigError(f"{key} must be one of {', '.join(known)}; got '{value}'.{nearest(value, known)}")


def _told(dtypes: Iterable[str]) -> str:
    return f"[{','.join(dtypes)}]"

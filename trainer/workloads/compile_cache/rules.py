"""What `workload=compile_cache` can be asked for, and what it then claims. Standard library only."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer.config import CompileCache, ConfigError, nearest
from trainer.holders import holder, mechanism
from trainer.state.compile_ids import DEFAULT_BITS

if TYPE_CHECKING:
    from trainer.config import Config

STARTS = ("fork", "compile_then_fork", "spawn")
MOST_ROUNDS = 10_000
MOST_BITS = 64


def check(config: Config) -> None:
    """Hold the workload's keys to their ranges, and to each other.

    Raises:
        ConfigError: the first rule that is broken, in one line.
    """
    own: CompileCache = config.workload
    steps = config.train.steps
    if own.start not in STARTS:
        raise ConfigError(
            f"workload.start must be one of {', '.join(STARTS)}; got '{own.start}'.{nearest(own.start, STARTS)}"
        )
    for key, least, most in (("rounds", 1, MOST_ROUNDS), ("offset_bits", 0, MOST_BITS), ("after_fork", 0, steps)):
        value = getattr(own, key)
        if not least <= value <= most:
            told = "train.steps" if key == "after_fork" else f"{most:,}"
            raise ConfigError(f"workload.{key} must be from {least} to {told}; got {value}.")
    if own.after_fork and own.start != "compile_then_fork":
        raise ConfigError(
            f"workload.after_fork={own.after_fork} needs workload.start=compile_then_fork: with workload.start="
            f"{own.start} every step is compiled in the sibling."
        )
    if own.offset_bits != DEFAULT_BITS and mechanism(config, "compile_ids") != "random_offset":
        raise ConfigError(
            f"workload.offset_bits={own.offset_bits} needs state.compile_ids=random_offset: no other draws an offset."
        )


def claims(config: Config) -> frozenset[str]:
    """Both, where ids cannot be another step's."""
    safe = holder(config, "compile_ids").safe == "always"
    return frozenset(("own_compiled_step", "gradients_unmixed") if safe else ())

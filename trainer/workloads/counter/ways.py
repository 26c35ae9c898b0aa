"""How an increment can be written, and which update modes leave it as it is written. Data; standard library only.

An update mode says what a write is based on (`trainer/updates/mechanisms.py`), and so does the way that an increment is
written: without a lock `total += 1` on a tensor is `lock_free`, and `total = total + 1` is `overwrite`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.config import Config

TORCH, TENSORFLOW, AUTO = "torch", "tensorflow", "auto"
# What an increment is based on: the current value, inside one kernel; what was read before; a gradient, which is
# subtracted from the current value inside one kernel.
KERNEL, READ_BEFORE, GRADIENT = "kernel", "read before", "gradient"

# What a gradient is multiplied by before it is subtracted: half, so that a dependent step halves the variable.
RATE = 0.5


@dataclass(frozen=True)
class Way:
    """One way to write an increment.

    Attributes:
        variable: what it is written on, TORCH or TENSORFLOW.
        base: KERNEL, READ_BEFORE or GRADIENT.
        written: the line as a user writes it.
    """

    name: str
    variable: str
    base: str
    written: str


WAYS: dict[str, Way] = {
    way.name: way
    for way in (
        Way("in_place", TORCH, KERNEL, "total += 1"),
        Way("add_", TORCH, KERNEL, "total.add_(1)"),
        Way("rebind", TORCH, READ_BEFORE, "total = total + 1"),
        Way("read_add_write", TORCH, READ_BEFORE, "new = total.clone(); new += 1; total.copy_(new)"),
        Way("assign_add", TENSORFLOW, KERNEL, "total.assign_add(1)"),
        Way("assign", TENSORFLOW, READ_BEFORE, "total.assign(total + 1)"),
        Way("gradient_step", TENSORFLOW, GRADIENT, "v.assign_sub(rate * gradient of sum(v * id))"),
        Way("dependent_gradient_step", TENSORFLOW, GRADIENT, "v.assign_sub(rate * gradient of sum(v * v) / 2)"),
    )
}

# A critical section can be put round any increment.
WITH_SECTIONS = ("serialized", "locked", "reader_writer", "per_variable_lock")
JOINT = ("all_reduce", "unscaled_sum")
# Update mode -> the bases that it leaves an increment with, and in words.
UNDER_THREADS: dict[str, tuple[tuple[str, ...], str]] = {
    **dict.fromkeys((*JOINT, *WITH_SECTIONS), ((KERNEL, READ_BEFORE, GRADIENT), "")),
    "optimistic": ((READ_BEFORE, GRADIENT), "checks at commit whether what was read before is still there"),
    "lock_free": ((KERNEL, GRADIENT), "changes the current value inside one kernel"),
    "write_locked": ((READ_BEFORE,), "writes under the lock what it has read before"),
    "overwrite": ((READ_BEFORE,), "writes what it has read before"),
}
# Update mode -> the ways in which replicas change their copies under it.
UNDER_MIRRORED: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(JOINT, ("assign_add", "gradient_step", "dependent_gradient_step")),
    "unreduced": ("assign_add",),
    "first_replica": ("assign_add",),
    "reassigned_sum": ("assign",),
}


def variable_of(config: Config) -> str:
    """What is counted in: TORCH or TENSORFLOW."""
    asked: str = config.workload.variable
    if asked != AUTO:
        return asked
    return TENSORFLOW if config.strategy.name == "mirrored" else TORCH


def taken(mode: str, strategy: str, variable: str) -> list[str]:
    """The ways that an update mode takes, the one that `auto` stands for first."""
    if strategy == "mirrored":
        return list(UNDER_MIRRORED.get(mode, ()))
    bases, _ = UNDER_THREADS.get(mode, ((), ""))
    return [way.name for way in WAYS.values() if way.variable == variable and way.base in bases]


def way_of(config: Config) -> Way:
    """How this run's increments are written."""
    asked: str = config.workload.operation
    if asked != AUTO:
        return WAYS[asked]
    return WAYS[taken(config.update_mode.name, config.strategy.name, variable_of(config))[0]]


def unprotected(way: Way) -> str:
    """The update mode under which an increment that is written so has nothing held round it."""
    return "overwrite" if way.base == READ_BEFORE else "lock_free"


def num_writers(config: Config) -> int:
    """Replicas that count; the others, the last ones, read or wait."""
    others: int = 1 if config.workload.counts == "down" else config.workload.readers
    return config.num_replicas - others


def start_of(config: Config) -> float:
    """What all elements are before the first increment."""
    if config.workload.counts == "down":
        return num_writers(config) * config.train.steps
    return 1.0 if way_of(config).name == "dependent_gradient_step" else 0.0

"""The cases by which `show modes --prove` and `show state --prove` hold every claim of the tables to all orders.

Each is a configuration in the words of the command line, so that its tokens can be replayed there. Two replicas take
one step each on a model of two variables. Standard library only.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from trainer.config import ONE_PROCESS, OPTIONS, Config
from trainer.state.mechanisms import HOLDERS
from trainer.updates.mechanisms import MODES
from trainer.workloads.small import heeds

SMALL = ("model=linear", "train.steps=1")
# What this mode multiplies is nothing yet in the first step.
TWO_STEPS = ("reassigned_sum",)
# Kernels in pieces: reading and writing a variable are two operations.
IN_PIECES = ("schedule.granularity=memory", "schedule.chunks=1")


@dataclass(frozen=True)
class Proof:
    """One search.

    Attributes:
        name: what the table calls it.
        strategy: of the search.
        overrides: what makes the case.
        guarantees: those that it is asked about.
    """

    name: str
    strategy: str
    overrides: tuple[str, ...]
    guarantees: tuple[str, ...] = ()

    @property
    def config(self) -> Config:
        return config_of((f"strategy={self.strategy}", "schedule=search", *self.overrides))

    @property
    def command(self) -> str:
        given = () if self.strategy == "threads" else (f"strategy={self.strategy}",)
        return " ".join(("python -m trainer", *given, *self.overrides, "schedule=search"))


def of_modes() -> list[Proof]:
    """A search of every update mode under every strategy in one process, and another where kernels are the hole."""
    found = []
    for mode in MODES.values():
        hosts = [strategy for strategy in mode.strategies if strategy in ONE_PROCESS]
        for strategy in hosts if mode.name != "custom" else ():
            # Slots are what this mode writes without the lock, so there have to be some.
            slots = ("optimizer=momentum",) if mode.name == "slots_unlocked" else ()
            steps = (SMALL[0], "train.steps=2") if mode.name in TWO_STEPS else SMALL
            overrides = (f"update_mode={mode.name}", *steps, *slots)
            found.append(Proof(mode.name, strategy, overrides))
            if "inside one kernel" in mode.base:
                found.append(Proof(f"{mode.name}/in_pieces", strategy, (*overrides, *IN_PIECES)))
    return found


# What a holder needs, for there to be something to hold: an image model, a loss scale, dropout, ...
_NEEDS = {
    "precision": ("precision=mixed_bfloat16", "precision.enabled_in=replica"),
    "first_call": ("precision=mixed_bfloat16",),
    "loss_scale": ("precision=mixed_float16",),
    "random_numbers": ("model=mlp", "model.hidden=[4]", "model.dropout=0.1"),
    "batch_statistics": ("model=cnn", "model.filters=[4]", "model.dropout=0"),
}
# A mode is asked for a dozen times a step, so that there are too many orders for a table. A leak takes two preemptions.
_BOUNDED = ("schedule.preemptions=2", "schedule.max_operations=40000")


def of_state() -> list[Proof]:
    """A search of every mechanism of every state holder, under threads, where orders differ."""
    found = []
    for key, holders in HOLDERS.items():
        for held in holders.values() if heeds(Config(), f"state.{key}") else ():
            mode = "all_reduce" if held.name == "reduced" else "locked"
            needs = _NEEDS.get(key, ())
            bounded = _BOUNDED if key == "precision" and held.safe == "never" else ()
            model = () if any(each.startswith("model=") for each in needs) else SMALL[:1]
            overrides = (f"update_mode={mode}", f"state.{key}={held.name}", *needs, *model, *SMALL[1:], *bounded)
            found.append(Proof(f"{key}={held.name}", "threads", overrides, (held.guarantee,)))
    return found


def config_of(overrides: tuple[str, ...]) -> Config:
    """The configuration that the command line makes of these overrides; options come before their keys."""
    parts: dict[str, Any] = {}
    keys = []
    for override in overrides:
        name, _, value = override.partition("=")
        if name in OPTIONS:
            parts[name] = dataclasses.replace(OPTIONS[name][value])
        else:
            keys.append((name, value))
    config = Config(**parts)
    for name, value in keys:
        group, _, key = name.rpartition(".")
        owner = getattr(config, group) if group else config
        setattr(owner, key, _typed(value, getattr(owner, key)))
    return config


def _typed(value: str, before: Any) -> Any:
    if isinstance(before, list):
        return [int(each) for each in value.strip("[]").split(",") if each]
    return type(before)(value)

"""How an order is named so that it can be run again: its token, and the command with it. Standard library only."""

from __future__ import annotations

import dataclasses
import shlex
from typing import TYPE_CHECKING

from trainer.schedule.tokens import config_hash

if TYPE_CHECKING:
    from trainer.config import Config

# What decides neither which operations there are nor what they do.
BESIDE = ("schedule", "audit", "checkpoint", "resume", "watchdog", "faults", "fail_on", "require")
BESIDE_OF_TRAIN = (
    *("log_every", "evaluate_every", "timeout_seconds", "threads_per_replica"),
    "compile_cache",
)
# Keys that there were not when tokens were first given out, and what runs did then: tokens of those stay good.
LATER = {
    ("precision", "enabled_by"): "scope",
    ("state", "compile_ids"): "safe",
    ("train", "engine"): "torchscript",
    ("train", "on_nonfinite"): "continue",
}


def hash_of(config: Config) -> str:
    """Six digits that two configurations have in common when a token of one is a token of the other."""
    fields = {name: value for name, value in dataclasses.asdict(config).items() if name not in BESIDE}
    fields["train"] = {name: value for name, value in fields["train"].items() if name not in BESIDE_OF_TRAIN}
    for (group, key), before in LATER.items():
        if fields[group][key] == before:
            del fields[group][key]
    fields["cut"] = cut(config)
    return config_hash(f"{name}={value!r}" for name, value in sorted(fields.items()))


def cut(config: Config) -> tuple[str, int]:
    """How finely kernels are announced: granularity, and chunks a variable."""
    schedule = config.schedule
    granularity = getattr(schedule, "granularity", "variable")
    return granularity, schedule.chunks if granularity == "memory" else 1


def command(original: str, token: str, config: Config) -> str:
    """The command that runs one order again.

    Args:
        original: the command of the run that found it.
    """
    words = [word for word in shlex.split(original) if word.partition("=")[0].partition(".")[0] != "schedule"]
    words += ["schedule=replay", f"schedule.token={token}"]
    granularity, chunks = cut(config)
    if granularity != "variable":
        words += [f"schedule.granularity={granularity}", f"schedule.chunks={chunks}"]
    return shlex.join(words)

"""The table of small workloads: one case each, run by the same machinery as `train`. Data only; standard library only.

A small workload is a module with

    run(config, record, watcher, stop) -> dict[str, Finding]

which is called in the run's own process once the strategy is prepared, reports the steps that replicas have taken
through `record` and `watcher`, and returns what it found about each guarantee of its row. One that takes a schedule
also has

    case(config) -> Case

whose `run` leaves the same in `record.findings`, and in `record.ended_in` what tells outcomes apart.

A row may name a module of rules, standard library only, with `check(config)`, which raises `ConfigError`, and
`claims(config)`, the guarantees that what was chosen puts forward. Where there is none, nothing is claimed: what is
seen is an anomaly, or a violation of what `require` names.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.config import Config

MAX_REPLICAS = 64


@dataclass(frozen=True)
class SmallWorkload:
    """One row.

    Attributes:
        module: in `trainer.workloads`.
        strategies: those that can host it; `not_elsewhere` says why others cannot.
        guarantees: those that it looks at.
        uses: groups and single keys of the configuration that it heeds, besides `EVERYBODYS`.
        rules: module in `trainer.workloads`.
        max_replicas: the most that it can have.
        shows: state holders, as KEY=VALUE, that it may have where others are refused them: what goes wrong with them
            there is what it is to show.
    """

    name: str
    module: str
    strategies: tuple[str, ...]
    not_elsewhere: str
    guarantees: tuple[str, ...]
    uses: tuple[str, ...] = ()
    rules: str = ""
    max_replicas: int = MAX_REPLICAS
    shows: tuple[str, ...] = ()


# What every small workload heeds: groups, and single keys.
EVERYBODYS = (
    *("strategy", "workload", "num_replicas", "fail_on", "require"),
    *("train.steps", "train.batch_size", "train.seed", "train.threads_per_replica"),
    *("watchdog", "train.timeout_seconds"),
)

SMALL: dict[str, SmallWorkload] = {
    each.name: each
    for each in (
        SmallWorkload(
            "moving_statistics",
            "defaults.moving_statistics",
            ("mirrored",),
            "under threads no variable has a copy for each replica.",
            ("batch_statistics_kept",),
            uses=("data",),
        ),
        SmallWorkload(
            "dropout_masks",
            "defaults.dropout_masks",
            ("mirrored",),
            "under threads no seed has a copy for each replica.",
            ("rng_independent",),
        ),
        SmallWorkload(
            "functional_call",
            "defaults.functional_call",
            ("threads",),
            "under mirrored one replica's Python code runs at a time.",
            ("invariants_kept",),
        ),
        SmallWorkload(
            "process_settings",
            "defaults.process_settings",
            ("threads",),
            "it is PyTorch's settings that it looks at.",
            ("settings_as_asked", "rng_independent"),
        ),
        SmallWorkload(
            "autocast",
            "defaults.autocast",
            ("threads",),
            "it is PyTorch's autocast that it looks at.",
            ("precision_as_asked", "settings_as_asked", "invariants_kept"),
        ),
        SmallWorkload(
            "bank",
            "bank.workload",
            ("threads",),
            "under mirrored one replica's Python code runs at a time.",
            ("no_lost_updates", "no_torn_reads", "invariants_kept", "no_deadlock"),
            uses=("schedule", "audit.repeat"),
            rules="bank.rules",
        ),
        SmallWorkload(
            "precision",
            "precision.workload",
            ("threads", "mirrored"),
            "",
            ("precision_as_asked", "initialized_once", "no_deadlock"),
            uses=("schedule", "state.precision", "state.first_call", "audit.repeat"),
            rules="precision.rules",
            max_replicas=1024,
            shows=("state.first_call=double_checked",),
        ),
        SmallWorkload(
            "counter",
            "counter.workload",
            ("threads", "mirrored"),
            "",
            (
                *("no_lost_updates", "no_torn_reads", "fresh_gradients", "joint_gradient", "replicas_identical"),
                *("invariants_kept", "no_deadlock"),
            ),
            uses=("update_mode", "schedule", "audit.repeat"),
            rules="counter.rules",
        ),
        SmallWorkload(
            "compile_cache",
            "compile_cache.workload",
            ("threads",),
            "it is PyTorch's steps that are compiled.",
            ("own_compiled_step", "gradients_unmixed"),
            uses=("state.compile_ids",),
            rules="compile_cache.rules",
        ),
    )
}


def small(config: Config) -> SmallWorkload | None:
    """The small workload that a config asks for; None for `train` and for a loop of the user's own."""
    return SMALL.get(config.workload.name)


def heeds(config: Config, key: str) -> bool:
    """Whether the workload heeds a group or a key of the configuration; `train` heeds nearly all."""
    own = small(config)
    if own is None:
        return key != "state.compile_ids" or config.train.compiles  # torchscript's steps are not kept
    return bool({key, key.partition(".")[0]} & {*EVERYBODYS, *own.uses})


def check(config: Config) -> None:
    """Hold a small workload's own keys to its own rules.

    Raises:
        ConfigError: the first rule that is broken.
    """
    own = small(config)
    if own is not None and own.rules:
        importlib.import_module(f"trainer.workloads.{own.rules}").check(config)


def claims(config: Config) -> frozenset[str]:
    """The guarantees that a small workload puts forward."""
    own = small(config)
    if own is None or not own.rules:
        return frozenset()
    found: frozenset[str] = importlib.import_module(f"trainer.workloads.{own.rules}").claims(config)
    return found

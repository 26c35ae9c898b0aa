"""What a run and the one that it goes on from must have in common. Standard library only.

Everything does that has a part in the bits that training comes to, and what is recorded of it: all keys but `FREE`, the
threads that a replica computes with, and the frameworks' versions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from trainer.config import Config
from trainer.describe import PACKAGES, threads_per_replica, versions
from trainer.faults import parse

# Keys and groups of keys that change nothing about the steps that were taken, nor about what is recorded of each.
FREE = (
    *("resume", "checkpoint", "watchdog", "fail_on", "require"),
    *("train.steps", "train.evaluate_every", "train.log_every", "train.compile_cache", "train.timeout_seconds"),
    *("audit.reference_every", "audit.reference_mebibytes", "audit.repeat", "audit.trace_steps"),
)
Identity = dict[str, Any]


def identity(config: Config) -> Identity:
    """What is to be the same, by dotted key; a group's option comes before its keys."""
    found = dict(_flat(dataclasses.asdict(config)))
    found = {key: value for key, value in found.items() if not {key, key.partition(".")[0]} & {*FREE}}
    # However many were asked for: another number of them rounds otherwise.
    found["train.threads_per_replica"] = threads_per_replica(config)
    # Of faults only what changes gradients: others have ended the run, or kept it waiting.
    found["faults"] = [entry for entry in config.faults if parse(entry).kind == "corrupt"]
    told = versions(config)
    return found | {f"version of {package}": told[package] for package in PACKAGES.get(config.strategy.name, ())}


def _flat(fields: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for group, option in fields.items():
        if not isinstance(option, Mapping):
            yield group, option
            continue
        if "name" in option:
            yield group, option["name"]
        yield from ((f"{group}.{key}", value) for key, value in option.items() if key != "name")


def difference(before: Identity, now: Identity) -> str:
    """The first thing that is not the same, in words; nothing where all is."""
    for key in now | before:
        if before.get(key) != now.get(key):
            return f"{key} was {_told(before, key)} and is {_told(now, key)}"
    return ""


def _told(found: Identity, key: str) -> str:
    return f"'{found[key]}'" if found.get(key) == "" else str(found.get(key, "not given"))

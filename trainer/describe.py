"""What a verdict says of the run that it is about, as far as the configuration knows it. Imports no framework."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

from trainer.config import Config, Custom
from trainer.holders import state
from trainer.processes import local_size
from trainer.workloads.small import heeds

PACKAGES = {
    "threads": ("keras", "torch", "numpy"),
    "mirrored": ("keras", "tensorflow", "numpy"),
    "ddp": ("keras", "torch", "numpy"),
    "multi_worker": ("keras", "tensorflow", "numpy"),
}


def describe(config: Config, command: str) -> dict[str, Any]:
    """`run` of `verdict.json`. `engine` and `duration_seconds` are for whoever ran it to fill in.

    Args:
        command: what a user types to do this run again.
    """
    return {
        "command": command,
        "workload": _label(config.workload),
        "strategy": config.strategy.name,
        "engine": None,
        "update_mode": _heeded(config, "update_mode"),
        "num_replicas": config.replicas_in_all,
        "num_processes": config.num_processes,
        "model": _heeded(config, "model"),
        "data": _heeded(config, "data"),
        "optimizer": _heeded(config, "optimizer"),
        "precision": _heeded(config, "precision"),
        "state": state(config),
        "schedule": config.schedule.name,
        "audit": config.audit.name,
        "steps": config.train.steps,
        "batch_size": config.train.batch_size,
        "seed": config.train.seed,
        "faults": list(config.faults),
        "threads_per_replica": threads_per_replica(config),
        "cores": cores(),
        "duration_seconds": None,
        "versions": versions(config),
    }


def _heeded(config: Config, group: str) -> str | None:
    """What a group's option is called; None where the workload does not heed it."""
    return _label(getattr(config, group)) if heeds(config, group) else None


def _label(option: Any) -> str:
    """What an option is called: its name, or what the user brings."""
    label: str = (isinstance(option, Custom) and option._target_) or option.name
    return label


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_per_replica(config: Config) -> int:
    """Intra-op threads of each replica: as asked, or an even share of the cores that this process may use."""
    return config.train.threads_per_replica or max(1, cores() // max(1, local_size(config) * config.num_replicas))


def versions(config: Config) -> dict[str, str]:
    """Of Python and the packages that the strategy computes with, by name."""
    found = {"python": platform.python_version()}
    for package in PACKAGES.get(config.strategy.name, ()):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found

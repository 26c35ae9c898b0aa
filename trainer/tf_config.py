"""`TF_CONFIG`, by which TensorFlow's workers know each other: read where a cluster set it, made where we start them.

Standard library only: a mistake in it is told before a framework is loaded.
"""

from __future__ import annotations

import functools
import json
import socket
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from trainer.config import ConfigError

NAME = "TF_CONFIG"
# Jobs whose tasks host replicas, in the order in which TensorFlow numbers them: a chief, where there is one, is first.
JOBS = ("chief", "worker")
LOOPBACK = "127.0.0.1"


class Task(NamedTuple):
    """A worker's place in its cluster: among all workers, and among those whose address names the same host."""

    rank: int
    size: int
    local_rank: int
    local_size: int


def task(environment: Mapping[str, str]) -> Task | None:
    """The task that `TF_CONFIG` gives this process; None where it is not set.

    Raises:
        ConfigError: it is not what TensorFlow takes for a cluster of workers.
    """
    if not environment.get(NAME):
        return None
    try:
        given = json.loads(environment[NAME])
    except json.JSONDecodeError as error:
        raise _mistake(f"is no JSON ({error.msg} at character {error.pos})") from None
    addresses = _addresses(given)
    rank = _rank(given, {job: len(found) for job, found in addresses.items()})
    every = [address for job in JOBS for address in addresses.get(job, [])]
    hosts = [address.rpartition(":")[0] for address in every]
    own = hosts[rank]
    return Task(rank, len(every), hosts[:rank].count(own), hosts.count(own))


def _addresses(given: Any) -> dict[str, list[str]]:
    cluster = given.get("cluster") if isinstance(given, dict) else None
    if not isinstance(cluster, dict) or not cluster:
        raise _mistake("has no cluster")
    if others := [job for job in cluster if job not in JOBS]:
        raise _mistake(f"has a job '{others[0]}', and every task is to host replicas, as {' and '.join(JOBS)} do")
    for job, addresses in cluster.items():
        if not isinstance(addresses, list) or not addresses or not all(_is_address(each) for each in addresses):
            raise _mistake(f"lists no HOST:PORT for each task of job '{job}'")
    if len(cluster.get("chief", [])) > 1:
        raise _mistake("has more than one chief")
    return cluster


def _is_address(found: Any) -> bool:
    host, colon, port = found.rpartition(":") if isinstance(found, str) else ("", "", "")
    return bool(host and colon and port.isdecimal())


def _rank(given: dict[str, Any], tasks: Mapping[str, int]) -> int:
    own = given.get("task")
    job, index = (own.get("type"), own.get("index")) if isinstance(own, dict) else (None, None)
    if isinstance(index, str) and index.isdecimal():
        index = int(index)  # as some launchers write it, and TensorFlow reads it
    if not isinstance(job, str) or job not in tasks:
        raise _mistake(f"says that this is a task of job '{job}', which its cluster has not")
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < tasks[job]:
        raise _mistake(f"says that this is task {index} of job '{job}', which has 0 to {tasks[job] - 1}")
    return index + (tasks.get("chief", 0) if job == "worker" else 0)


def _mistake(what: str) -> ConfigError:
    fits = '{"cluster": {"worker": ["HOST:PORT", "HOST:PORT"]}, "task": {"type": "worker", "index": 0}}'
    return ConfigError(f"{NAME} {what}. It must be as {fits}; unset it to have the workers started here.")


def on_loopback(rank: int, size: int, folder: Path) -> str:
    """What `TF_CONFIG` is for a worker that is started here.

    Args:
        folder: the run's; all its workers are given the same ports.
    """
    addresses = [f"{LOOPBACK}:{port}" for port in _ports(size, folder)]
    return json.dumps({"cluster": {"worker": addresses}, "task": {"type": "worker", "index": rank}})


@functools.cache
def _ports(size: int, folder: Path) -> list[int]:
    """Ports that are free; nobody else gets one of them until they are all known."""
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(size)]
        for each in sockets:
            each.bind((LOOPBACK, 0))
        return [each.getsockname()[1] for each in sockets]

"""`workload=compile_cache`: processes that compile steps of one name through one cache, and who then runs whose.

A replica is a process here. In each round siblings are forked or spawned; all their steps have one qualified name, and
each has a body of its own: another loss, precision or constant. Each sibling looks its steps up in the cache, stores
what it misses, looks them up again and runs what it finds. Later the program is started again: processes that know
nothing of the first ones look the same steps up.

By which id a step is stored is what `state.compile_ids` says. The cache believes it. Where two siblings give one id
to two steps, one of them finds the other's body, and so may whoever comes later.

Siblings wait for each other between looking up and storing, so that all of this does not depend on luck, but for random
offsets, which do.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil

from trainer.audit.findings import Finding
from trainer.audit.records import RunRecord
from trainer.config import CompileCache, Config
from trainer.holders import mechanism
from trainer.strategies.hosting import RunBroken, StopFlag, Watcher
from trainer.workloads.compile_cache.judge import Generation, Seen, judge, metrics
from trainer.workloads.compile_cache.plan import Plan, Ran

log = logging.getLogger(__name__)

POLL_SECONDS = 0.2
ROOT = Path(__file__).resolve().parents[3]
FAMILY = "trainer.workloads.compile_cache.family"


class Stopped(Exception):
    """The run is to end now."""


def run(config: Config, record: RunRecord, watcher: Watcher, stop: StopFlag) -> dict[str, Finding]:
    record.engine = "torchscript"
    own: CompileCache = config.workload
    seen = Seen()
    with TemporaryDirectory() as scratch, _family() as family, suppress(Stopped):
        for round in range(own.rounds):
            plan = plan_of(config, round, own.folder or str(Path(scratch) / f"{round}"))
            first, later = (
                _generation(family, dataclasses.replace(plan, saves=saves), seen, stop) for saves in (True, False)
            )
            seen.add(round, first, later)
            for replica in record.replicas:
                replica.steps_done = record.steps * (round + 1) // own.rounds
            watcher.progress(record)
    if stop.is_set():
        return {}
    for line in sorted(seen.warnings):
        log.warning("%s", line)
    record.metrics = metrics(config, seen)
    return judge(config, seen)


def plan_of(config: Config, round: int, folder: str) -> Plan:
    """What siblings do in a round; no two rounds have a body in common."""
    own: CompileCache = config.workload
    train = config.train
    return Plan(
        start=own.start,
        mechanism=mechanism(config, "compile_ids"),
        bits=own.offset_bits,
        folder=os.path.abspath(folder),
        first=round * config.num_replicas * train.steps,
        num_siblings=config.num_replicas,
        steps=train.steps,
        after_fork=own.after_fork,
        batch_size=train.batch_size,
        seed=train.seed,
        saves=True,
        seconds=config.watchdog.seconds,
    )


@contextmanager
def _family() -> Iterator[subprocess.Popen[bytes]]:
    """The process whose children compile; it has ended, and they have, when the block is left."""
    process = subprocess.Popen(
        # As `trainer/launch.py` starts this one.
        [sys.executable, "-P", "-m", FAMILY],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])},
    )
    try:
        yield process
    finally:
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(process.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    child.kill()
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()


def _generation(family: subprocess.Popen[bytes], plan: Plan, seen: Seen, stop: StopFlag) -> Generation:
    """Have a generation of siblings, and wait for what they ran.

    Raises:
        Stopped: before that, the run was.
        RunBroken: one of them failed, or nothing came for as long as it may take.
    """
    assert family.stdin is not None
    with suppress(BrokenPipeError):  # it is gone: what it leaves instead of an answer says so
        family.stdin.write(json.dumps(dataclasses.asdict(plan)).encode() + b"\n")
    line = _line(family, plan.seconds, stop)
    if not line.endswith(b"\n"):
        raise RunBroken("crash", f"a sibling failed: status {family.wait()}; console.log has what it said")
    found: dict[str, Any] = json.loads(line)
    seen.warnings.update(found["warnings"])
    siblings = [[Ran(*each) for each in sibling] for sibling in found["siblings"]]
    return Generation(siblings, [Ran(*each) for each in found["parent"]])


def _line(family: subprocess.Popen[bytes], seconds: float, stop: StopFlag) -> bytes:
    """What the family says, up to the end of a line or of the family."""
    assert family.stdout is not None
    said, until = b"", time.monotonic() + seconds
    with selectors.DefaultSelector() as selector:
        selector.register(family.stdout, selectors.EVENT_READ)
        while not said.endswith(b"\n"):
            if stop.is_set():
                raise Stopped
            if time.monotonic() > until:
                raise RunBroken("deadlock", f"no generation of siblings ended for watchdog.seconds={seconds:g}")
            if not selector.select(POLL_SECONDS):
                continue
            part = os.read(family.stdout.fileno(), 1 << 16)
            if not part:
                break
            said += part
    return said

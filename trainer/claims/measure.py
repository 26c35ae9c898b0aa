"""Runs that claims are measured by: each in a process of its own, as a user would start it. Standard library only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from trainer.claims.claim import Claim, Measured, Ran

ROOT = Path(__file__).resolve().parent.parent.parent
LIMIT_SECONDS = 600
# A run has as many intra-op threads as it has replicas to share the cores; two at a time keep two cores busy.
AT_A_TIME = 2


class CannotMeasure(Exception):
    """A run left no verdict."""


def measure(
    claims: Sequence[Claim], *, free: bool, report: Callable[[str], None] = lambda command: None
) -> list[tuple[Measured, str]]:
    """What each claim has come to, and what its free runs tell; nothing of the latter where they are not wanted.

    Args:
        report: called with each command before it is run, from several threads.

    Raises:
        CannotMeasure: a run left no verdict.
    """
    wanted = dict.fromkeys(run for claim in claims for run in (*claim.runs, *(claim.free if free else ())))

    def once(overrides: str) -> Ran:
        report(command(overrides))
        return _run(overrides)

    with ThreadPoolExecutor(AT_A_TIME) as pool:
        ran = dict(zip(wanted, pool.map(once, wanted), strict=True))
    return [
        (claim.judge(_all(ran, claim.runs)), claim.tell(_all(ran, claim.free)) if free and claim.free else "")
        for claim in claims
    ]


def command(overrides: str) -> str:
    """What a user types."""
    return f"python -m trainer {overrides}"


def _all(ran: dict[str, Ran], wanted: Iterable[str]) -> list[Ran]:
    return [ran[overrides] for overrides in wanted]


def _run(overrides: str) -> Ran:
    with tempfile.TemporaryDirectory() as folder:
        path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        done = subprocess.run(
            [sys.executable, "-m", "trainer", *overrides.split(), f"hydra.run.dir={folder}/run"],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
            capture_output=True,
            text=True,
            timeout=LIMIT_SECONDS,
            check=False,
        )
        verdict = Path(folder, "run", "verdict.json")
        if not verdict.exists():
            raise CannotMeasure(f"{command(overrides)} left no verdict: {done.stderr.strip() or done.stdout.strip()}")
        return Ran(json.loads(verdict.read_text(encoding="utf-8")), done.returncode)

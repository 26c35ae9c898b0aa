"""An update mode of your own, held to what it ought to guarantee by your own tests:

python -m pytest test_update_mode.py

Each run has a process of its own, in the working directory, where it finds bring_update_mode.py.
"""

from __future__ import annotations

from pathlib import Path

from trainer import run

MINE = ("update_mode._target_=bring_update_mode.TicketLocked", "require=[no_lost_updates,no_torn_reads]")
# Eight replicas meet often enough for a careless mode to lose updates in every run.
OFTEN = ("num_replicas=8", "train.batch_size=16", "train.steps=60")


def test_my_mode_loses_no_update(tmp_path: Path) -> None:
    verdict = run(*MINE, *OFTEN, folder=tmp_path / "run")
    assert verdict.ok("inconclusive")
    assert verdict.guarantee("no_lost_updates").status == "upheld"
    assert verdict.metrics["updates_kept"] == verdict.metrics["updates_expected"]


def test_this_test_can_fail(tmp_path: Path) -> None:
    verdict = run(*MINE, *OFTEN, "+update_mode.arguments.careless=true", folder=tmp_path / "run")
    assert not verdict.ok()
    assert verdict.guarantee("no_lost_updates").status == "violated"
    assert verdict.anomalies[0].remedy == "compare it with update_mode=locked"

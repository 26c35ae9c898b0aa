"""The end of a sweep, also of one that was cut short: every run has a verdict, one table, one exit status."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from trainer.audit.verdict import FILE_NAME, Error
from trainer.folders import settle, status_of
from trainer.invocation import INVOCATION, command_of, complain, config_of
from trainer.report.console import standard_output
from trainer.report.sweep import write
from trainer.stop import REASONS


def end(folder: Path, status: int) -> int:
    """Print the table of a sweep and sum its runs up.

    Args:
        status: what the sweep itself came to: 0, or why it was cut short.

    Returns:
        `status` where it is not 0; else 3 when a run broke, 1 when one failed, 2 when all were refused, 0.
    """
    runs = sorted(trace.parent for trace in folder.rglob(".hydra"))
    if INVOCATION.batch:
        runs = _ended(folder, runs)
    else:
        for run in runs:
            _settle(run, status)
    write(folder, standard_output())
    statuses = [status_of(run, str(_composed(run).fail_on)) for run in runs]
    if status or not statuses:
        return status
    if 3 in statuses:
        return 3
    if 1 in statuses:
        return 1
    return 2 if set(statuses) == {2} else 0


def _ended(folder: Path, runs: list[Path]) -> list[Path]:
    """Those that have a verdict. Of the others nothing is said for them: they may still run, or wait for a machine."""
    ended = [run for run in runs if (run / FILE_NAME).exists()]
    jobs = sorted({path.name.partition("_")[0] for path in (folder / ".submitit").glob("*[0-9]")})
    if len(ended) < (INVOCATION.jobs or len(runs)):
        complain(
            f"{len(ended)} runs have ended; jobs of the others may go on. `scancel {' '.join(jobs)}` ends them; "
            f"`python -m trainer report {folder}` sums up what there is."
        )
    return ended


def _settle(run: Path, status: int) -> None:
    """Give a run its verdict that could not write one, because the process that watched it was killed."""
    if (run / FILE_NAME).exists():
        return
    signals = {128 + number: reason for number, reason in REASONS.items()}
    if status in signals:
        error = Error("interrupted", signals[status])
    else:
        error = Error("killed", "the process that watched it was killed")
    overrides = [str(each) for each in OmegaConf.load(run / ".hydra" / "overrides.yaml")]
    settle(config_of(_composed(run)), run, command_of(overrides), error)


def _composed(run: Path) -> DictConfig:
    found = OmegaConf.load(run / ".hydra" / "config.yaml")
    assert isinstance(found, DictConfig)
    return found

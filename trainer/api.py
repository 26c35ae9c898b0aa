"""The trainer from Python, for notebooks and tests: `from trainer import run, sweep, read_verdict`.

Every run has a fresh process, which `python -m trainer` starts in the caller's working directory: one path for both, so
that what holds there holds here. What a `_target_` names is imported in that process, so it has to be importable by
name; functions and classes that only a notebook has are not. Standard library only: importing this loads no framework.
"""

from __future__ import annotations

import datetime
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from trainer.audit import read
from trainer.audit.verdict import FILE_NAME, Guarantee, Verdict, exit_status
from trainer.config import ConfigError
from trainer.launch import ROOT

# Time for a command to end its runs and write what there is to write.
PATIENCE_SECONDS = 20
FAIL_ON = ("violated", "anomaly", "inconclusive", "never")


class TrainerError(RuntimeError):
    """The command itself failed, so that there is no verdict to return; its last line says why."""


class RunVerdict(Verdict):
    """What a run has left: its verdict, and where it lies.

    Attributes:
        folder: the run's.
    """

    def __init__(self, folder: Path, found: Verdict) -> None:
        super().__init__(**vars(found))
        self.folder = folder

    def ok(self, fail_on: str = "violated") -> bool:
        """Whether the run ended by itself and its verdict is better than `fail_on`, as for the exit status.

        Raises:
            ValueError: `fail_on` is none of violated, anomaly, inconclusive and never.
        """
        if fail_on not in FAIL_ON:
            raise ValueError(f"fail_on must be one of {', '.join(FAIL_ON)}; got {fail_on!r}.")
        return exit_status(self, fail_on) == 0

    def guarantee(self, name: str) -> Guarantee:
        """The guarantee of this name: its status, what that covers, the evidence.

        Raises:
            KeyError: the verdict speaks of none of this name; that of a run that broke speaks of none at all.
        """
        for each in self.guarantees:
            if each.name == name:
                return each
        known = ", ".join(each.name for each in self.guarantees) or "none: the run broke"
        raise KeyError(f"{name!r} is no guarantee of this verdict. It has {known}.")

    def __repr__(self) -> str:
        """One line that says why, since a failed assertion shows it."""
        about = [str(self.run.get(name)) for name in ("strategy", "update_mode") if self.run.get(name)]
        seen = [f"{each.kind} {each.count} of {each.of}" for each in self.anomalies]
        error = [] if self.error is None else [f"{self.error.kind}: {self.error.message}".partition("\n")[0]]
        told = "; ".join([*error, *seen]) or "no anomaly seen"
        return f"<{self.verdict}: {' '.join(about)} x{self.run.get('num_replicas')}; {told}; {self.folder}>"


@dataclass(frozen=True)
class Sweep:
    """What a sweep has left.

    Attributes:
        folder: with `sweep.csv`, `sweep.png` and `report.html`.
        verdicts: of every run that was begun, refused and broken ones included, in the order of the runs.
    """

    folder: Path
    verdicts: tuple[RunVerdict, ...]

    def ok(self, fail_on: str = "violated") -> bool:
        """Whether no run broke or failed under `fail_on`; refused ones are left out, unless all were."""
        ran = [each for each in self.verdicts if each.error is None or each.error.kind != "refused"]
        return bool(ran) and all(each.ok(fail_on) for each in ran)


def run(*overrides: str, folder: str | os.PathLike[str] | None = None) -> RunVerdict:
    """Do one run, as `python -m trainer OVERRIDES` does, and return its verdict, however bad it is.

    Args:
        overrides: KEY=VALUE each, as on the command line.
        folder: where the run goes, which holds none yet. None: below `outputs/` in the working directory.

    Thread-safety: any number of threads, each its own runs.

    Raises:
        ConfigError: the configuration or the data is refused, in the words of the command line.
        TrainerError: the command failed without leaving a verdict.
        KeyboardInterrupt: once the run has ended.
    """
    place = _place("outputs", folder)
    held = (place / FILE_NAME).exists()
    said, status = _command([*overrides, f"hydra.run.dir={_quoted(place)}"], overrides, "hydra.run.dir")
    if held or not (place / FILE_NAME).exists():
        raise _without_verdict(said, status)
    verdict = read_verdict(place)
    if verdict.error is not None and verdict.error.kind == "refused":
        raise ConfigError(verdict.error.message)
    return verdict


def sweep(*overrides: str, folder: str | os.PathLike[str] | None = None) -> Sweep:
    """Do every combination, as `python -m trainer -m OVERRIDES` does, and return all verdicts.

    Args:
        overrides: KEY=VALUE or KEY=VALUE,VALUE each.
        folder: where the sweep goes, which holds none yet. None: below `multirun/` in the working directory.

    Raises:
        ConfigError: the whole sweep is refused. A combination that is refused is a verdict like the others.
        TrainerError: the command failed before there was a verdict.
        KeyboardInterrupt: once all runs have ended.
    """
    place = _place("multirun", folder)
    held = any(place.glob(f"*/{FILE_NAME}"))
    arguments = ["--multirun", *overrides, f"hydra.sweep.dir={_quoted(place)}"]
    said, status = _command(arguments, overrides, "hydra.sweep.dir")
    runs = sorted((path.parent for path in place.glob(f"*/{FILE_NAME}")), key=lambda path: _number(path.name))
    if held or not runs:
        raise _without_verdict(said, status)
    return Sweep(place, tuple(read_verdict(each) for each in runs))


def read_verdict(folder: str | os.PathLike[str]) -> RunVerdict:
    """The verdict that a run has left in its folder, typed; schema 1.

    Raises:
        ValueError: there is none, or it cannot be read; on one line.
    """
    return RunVerdict(Path(folder), read.read(Path(folder)))


def _place(below: str, folder: str | os.PathLike[str] | None) -> Path:
    if folder is not None:
        if "${" in str(folder):
            raise ConfigError(
                f"folder={str(folder)!r} cannot be taken: Hydra reads ${{ as a reference. Choose another name."
            )
        return Path(folder).absolute()
    now = datetime.datetime.now()
    # Drawn, since threads and processes may start runs within one second.
    return Path.cwd() / below / f"{now:%Y-%m-%d}" / f"{now:%H-%M-%S}_{secrets.token_hex(4)}"


def _quoted(path: Path) -> str:
    """A path as a value of Hydra's: taken as it is, whatever characters it has."""
    return "'" + str(path).replace("'", "\\'") + "'"


def _command(arguments: list[str], overrides: Iterable[str], place: str) -> tuple[str, int]:
    """Run `python -m trainer`; what it said of mistakes, and its exit status."""
    given = list(overrides)
    for each in given:
        # The command line would do something else with these than one run, or one sweep.
        if each.startswith("-") or "=" not in each:
            raise ConfigError(f"{each} cannot be read: there is no '=' in it. Write KEY=VALUE.")
        if each.partition("=")[0].lstrip("+") == place:
            raise ConfigError(f"{place} is the argument folder here: folder={each.partition('=')[2]!r}.")
    process = subprocess.Popen(
        # -P keeps the working directory, where a user may have a package of our name, off the import path.
        [sys.executable, "-P", "-m", "trainer", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(_importable())},
        text=True,
        # What a terminal or a notebook sends is passed on, once.
        start_new_session=True,
    )
    try:
        _, said = process.communicate()
    except BaseException:
        _end(process)
        raise
    return said, process.returncode


def _importable() -> list[str]:
    """Where to look for modules: ours first, then wherever this program looks besides its own installation."""
    installed = {Path(each).resolve() for each in (sys.prefix, sys.base_prefix, sys.exec_prefix)}
    asked = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    own = [
        each
        for each in sys.path
        if os.path.isdir(each) and not installed & {Path(each).resolve(), *Path(each).resolve().parents}
    ]
    return list(dict.fromkeys([str(ROOT), *map(os.path.abspath, (*asked, *own))]))


def _end(process: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError):
        process.send_signal(signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.communicate(timeout=PATIENCE_SECONDS)
        return
    process.kill()
    process.communicate()


def _without_verdict(said: str, status: int) -> ConfigError | TrainerError:
    lines = [line for line in said.splitlines() if line.strip()] or [f"python -m trainer ended with status {status}"]
    if status == 2:
        return ConfigError(lines[-1].removeprefix("trainer: "))
    return TrainerError(lines[-1].removeprefix("trainer: "))


def _number(name: str) -> tuple[int, str]:
    number, _, _ = name.partition("_")
    return (int(number) if number.isdecimal() else sys.maxsize, name)

"""Two runs beside each other: where their configurations differ, and where what they computed parts for the first time.

Losses of every step stand in `history.npz`, which `audit=full` leaves; without it in both runs they are compared where
the event files have points, every `train.log_every` steps, and each answer says so. Speed is told, and is no
difference.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.audit import history, read
from trainer.audit.verdict import Verdict
from trainer.report import words
from trainer.report.scalars import scalars

# Tags of what a run computed; `speed/` is the machine's.
COMPUTED = ("train/", "gradients/", "updates/", "precision/", "replicas/")
# Not a curve: the verdict as a number.
LEVEL = "replicas/verdict_level"
# Columns of `history.npz`, and what each of them is called here. One with a third axis is left out: `versions` is told
# by the others.
COLUMNS = {
    "losses": "train/loss",
    "batch": "batch",
    "write_version": "version written",
    "read_version": "version read",
    "read_state": "read state",
    "asked": "dtype asked for",
    "computed_in": "dtype computed in",
    "gradients_in": "gradients' dtype",
}
HISTORY, EVENTS = "history.npz", "event files"


@dataclass(frozen=True)
class Side:
    """What one run has left.

    Attributes:
        config: every key of its configuration under a dotted name.
        curves: source and name -> step -> value.
    """

    folder: Path
    verdict: Verdict
    config: dict[str, str]
    curves: dict[tuple[str, str], dict[int, float]]


@dataclass(frozen=True)
class Parting:
    """One curve in both runs, at the steps that both have.

    Attributes:
        source: where its points come from.
        points: compared.
        first: the first step at which they differ; None where they never do.
        before: the last step before that at which they agreed; None where there is none.
        values: of both at `first`.
        largest: the largest difference, and its step; not a number where only one of the values is one.
    """

    name: str
    source: str
    points: int
    first: int | None = None
    before: int | None = None
    values: tuple[float, float] = (math.nan, math.nan)
    largest: tuple[float, int] = (0.0, 0)


@dataclass(frozen=True)
class Comparison:
    """Everything in which two runs differ.

    Attributes:
        config: key -> its value in each run, where those differ.
        partings: a curve each, in the order in which they part; then those that do not.
        guarantees: name -> its status in each run, where those differ.
        results: what else was computed and differs, by name.
        speed: the second run's micro-steps per second, as a multiple of the first's.
    """

    sides: tuple[Side, Side]
    config: dict[str, tuple[str, str]]
    partings: tuple[Parting, ...]
    guarantees: dict[str, tuple[str, str]]
    results: dict[str, tuple[str, str]]
    speed: float | None

    @property
    def compared(self) -> bool:
        """Whether there was anything that both runs have computed."""
        return bool(self.partings) or all(side.verdict.final_parameters_sha256 for side in self.sides)

    @property
    def same(self) -> bool:
        """Whether everything that was compared is the same, and something was."""
        parted = any(each.first is not None for each in self.partings)
        return self.compared and not parted and not self.guarantees and not self.results


def load(folder: Path) -> Side:
    """What a run has left.

    Raises:
        Unreadable: it has left no verdict, or what it has left cannot be read.
    """
    verdict = read.read(folder)
    try:
        curves = {
            (EVENTS, tag): points
            for tag, points in scalars(folder).items()
            if tag.startswith(COMPUTED) and tag != LEVEL
        }
        return Side(folder, verdict, _config(folder, verdict), curves | _history(folder))
    except (OSError, ValueError, KeyError) as problem:
        raise read.Unreadable(f"{folder} cannot be read: {' '.join(str(problem).split())}.") from None


def compare(first: Path, second: Path) -> Comparison:
    """Put two runs beside each other.

    Raises:
        Unreadable: one of them is no run's folder.
    """
    a, b = load(first), load(second)
    partings = [_parting(which, a.curves[which], b.curves[which]) for which in _both(a, b)]
    told = [each for each in partings if each is not None]
    return Comparison(
        (a, b),
        _differing(a.config, b.config),
        tuple(sorted(told, key=lambda each: math.inf if each.first is None else each.first)),
        _guarantees(a.verdict, b.verdict),
        _differing(_results(a.verdict), _results(b.verdict)),
        _speed(a.verdict, b.verdict),
    )


def loss(side: Side) -> dict[int, float]:
    """A run's loss by step, mean over replicas, from its history if it has one."""
    rows = [points for (source, name), points in side.curves.items() if source == HISTORY and "loss" in name]
    if rows:
        return {step: math.fsum(row[step] for row in rows) / len(rows) for step in rows[0]}
    return side.curves.get((EVENTS, "train/loss"), {})


def _both(a: Side, b: Side) -> Iterator[tuple[str, str]]:
    """The curves that both have; of losses those of the history, which has all of them, if both have one."""
    for source, name in a.curves:
        if (source, name) in b.curves:
            whole = all((HISTORY, name) in side.curves for side in (a, b))
            if source == HISTORY or not whole:
                yield source, name


def _parting(which: tuple[str, str], a: Mapping[int, float], b: Mapping[int, float]) -> Parting | None:
    steps = sorted(set(a) & set(b))
    if not steps:
        return None
    source, name = which
    ours, theirs = (np.array([points[step] for step in steps]) for points in (a, b))
    apart = ~((ours == theirs) | (np.isnan(ours) & np.isnan(theirs)))
    if not apart.any():
        return Parting(name, source, len(steps))
    at = int(apart.argmax())
    with np.errstate(invalid="ignore"):
        distance = np.where(apart, np.abs(ours - theirs), 0.0)
    most = int(np.isnan(distance).argmax()) if np.isnan(distance).any() else int(distance.argmax())
    return Parting(
        name,
        source,
        len(steps),
        steps[at],
        steps[at - 1] if at else None,
        (float(ours[at]), float(theirs[at])),
        (float(distance[most]), steps[most]),
    )


def _history(folder: Path) -> dict[tuple[str, str], dict[int, float]]:
    path = folder / history.FILE_NAME
    if not path.exists():
        return {}
    with np.load(path) as arrays:
        found: dict[str, NDArray[Any]] = {name: arrays[name] for name in COLUMNS if name in arrays}
    return {
        (HISTORY, f"{COLUMNS[name]}/replica_{replica}"): dict(enumerate(row.tolist()))
        for name, array in found.items()
        for replica, row in enumerate(array)
    }


def _config(folder: Path, verdict: Verdict) -> dict[str, str]:
    """Every key, from what Hydra has left; what the verdict says of the run where that is gone."""
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        found = OmegaConf.load(folder / ".hydra" / "config.yaml")
        if isinstance(found, DictConfig):
            return dict(_flat("", {str(key): value for key, value in _plain(found).items() if key != "hydra"}))
    except FileNotFoundError:
        pass  # said below
    except (YAMLError, OmegaConfBaseException) as problem:
        raise ValueError(f".hydra/config.yaml: {problem}") from None
    told = {name: value for name, value in verdict.run.items() if name not in ("command", "duration_seconds")}
    return dict(_flat("run.", told))


def _plain(found: Any) -> dict[Any, Any]:
    from omegaconf import OmegaConf

    plain = OmegaConf.to_container(found)
    return plain if isinstance(plain, dict) else {}


def _flat(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(f"{prefix}{name}.", value)
        else:
            yield f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value)


def _guarantees(a: Verdict, b: Verdict) -> dict[str, tuple[str, str]]:
    ours, theirs = ({each.name: str(each.status) for each in verdict.guarantees} for verdict in (a, b))
    # A run that broke has none at all, which its error says better.
    return _differing(ours, theirs) if ours and theirs else {}


def _results(verdict: Verdict) -> dict[str, str]:
    metrics = {name: verdict.metrics.get(name) for name in ("updates_kept", "loss", "accuracy")}
    return {
        "verdict": verdict.verdict,
        "error": "-" if verdict.error is None else words.error(verdict.error),
        "final_parameters_sha256": verdict.final_parameters_sha256 or "-",
        **{name: "-" if value is None else str(value) for name, value in metrics.items()},
    }


def _differing(a: Mapping[str, str], b: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    pairs = {name: (a.get(name, "-"), b.get(name, "-")) for name in dict.fromkeys((*a, *b))}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _speed(a: Verdict, b: Verdict) -> float | None:
    ours, theirs = (each.metrics.get("micro_steps_per_second") for each in (a, b))
    return theirs / ours if ours and theirs else None

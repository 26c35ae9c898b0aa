"""An order as a word that can be typed: `s1.2.9f3c21.a4kfe-b3mdo-a2zzi`. Standard library only.

Format version, number of replicas, a hash of the configuration, and runs of operations by one replica each: its letter,
how many, and three letters that check their names. Letters, digits, `_`, `.` and `-` only, a letter first, so that it
needs no quotes in a shell, in YAML or as an override.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from trainer.schedule.operations import Operation
from trainer.schedule.order import Order

VERSION = 1
_TOKEN = re.compile(r"s(?P<version>\d+)\.(?P<replicas>\d+)\.(?P<config>[0-9a-f]{6})\.(?P<runs>[a-z0-9_-]*)")
_RUN = re.compile(r"(?P<own>[a-z]|_\d+_)(?P<count>\d+)(?P<check>[a-z]{3})")
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


class BadToken(ValueError):
    """A token that cannot be read, or is not of this run."""


class Diverged(Exception):
    """A replay came to something else than the order that its token was made of."""


@dataclass(frozen=True)
class Run:
    """Operations of one replica without another's in between.

    Attributes:
        check: of the operations' names.
    """

    own: int
    count: int
    check: str


@dataclass(frozen=True)
class Token:
    num_replicas: int
    config: str
    runs: tuple[Run, ...]

    def __str__(self) -> str:
        runs = "-".join(f"{_letter(run.own)}{run.count}{run.check}" for run in self.runs)
        return f"s{VERSION}.{self.num_replicas}.{self.config}.{runs}"


def token_of(order: Order, config: str) -> Token:
    """The token of an order that was run."""
    runs, at = [], 0
    for own, group in itertools.groupby(order.granted):
        count = len(list(group))
        runs.append(Run(own, count, _check(order.told[at : at + count])))
        at += count
    return Token(order.num_replicas, config, tuple(runs))


def parse(text: str) -> Token:
    """Read a token.

    Raises:
        BadToken: it is none, or of another version.
    """
    found = _TOKEN.fullmatch(text)
    if found is None:
        raise BadToken("is no token: those begin with s1. and come from a verdict's replay line")
    if int(found["version"]) != VERSION:
        raise BadToken(f"is of format {found['version']}, and this version reads format {VERSION}")
    runs = [_parse_run(part) for part in found["runs"].split("-")] if found["runs"] else []
    token = Token(int(found["replicas"]), found["config"], tuple(runs))
    if any(run.own >= token.num_replicas for run in runs):
        raise BadToken(f"names a replica beyond its {token.num_replicas}")
    return token


def config_hash(parts: Iterable[object]) -> str:
    """Six digits of what decides which operations there are."""
    return hashlib.sha256("\n".join(str(part) for part in parts).encode()).hexdigest()[:6]


class Replay:
    """Chooses as a token says, and holds every operation's name to it.

    Thread-safety: one call at a time.
    """

    def __init__(self, token: Token) -> None:
        self._token = token
        self._granted = [own for run in token.runs for own in [run.own] * run.count]

    def choose(self, order: Order) -> int:
        """Who goes next.

        Raises:
            Diverged: whoever is to go cannot, or what was done is not what the token says.
        """
        at = len(order.granted)
        self.check(order)
        if at >= len(self._granted):
            raise Diverged(f"after {at} operations, all that the token has, replicas still have something to do")
        own = self._granted[at]
        if own not in order.able():
            raise Diverged(f"operation {at + 1} should be replica {own}'s, which {_state(order.pending[own])}")
        return own

    def check(self, order: Order, *, done: bool = False) -> None:
        """Hold what was done so far to the token; when all is done, also to being all of it.

        Raises:
            Diverged: at the first run of operations that is another.
        """
        at = 0
        for run in self._token.runs:
            own, told = order.granted[at : at + run.count], order.told[at : at + run.count]
            if len(own) < run.count and not done:
                return
            if own != [run.own] * run.count or _check(told) != run.check:
                did = ", ".join(f"replica {each} {name}" for each, name in zip(own, told, strict=True)) or "nothing"
                raise Diverged(
                    f"operations {at + 1} to {at + run.count} should be replica {run.own}'s with names that check "
                    f"to '{run.check}', but they were: {did}"
                )
            at += run.count
        if done and len(order.granted) != at:
            raise Diverged(f"the token has {at} operations, and there were {len(order.granted)}")


def _state(operation: Operation | None) -> str:
    return "runs" if operation is None else f"waits to {operation.told}" if operation.places else "is through"


def _check(told: Sequence[str]) -> str:
    digest = hashlib.sha256("\n".join(told).encode()).digest()
    return "".join(_LETTERS[byte % 26] for byte in digest[:3])


def _letter(own: int) -> str:
    """`a` to `z`, and beyond that a number: `_26_`."""
    return _LETTERS[own] if own < len(_LETTERS) else f"_{own}_"


def _parse_run(text: str) -> Run:
    found = _RUN.fullmatch(text)
    if found is None or not int(found["count"]):
        raise BadToken(f"has '{text}' where a run of operations should be")
    own = found["own"]
    return Run(_LETTERS.index(own) if own in _LETTERS else int(own.strip("_")), int(found["count"]), found["check"])

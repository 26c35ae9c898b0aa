"""A claim of a founding document, and what runs of ours say about it. Standard library only.

A claim is measured by commands whose counts are certain: every order of a small case, an order that is forced, or what
comes out the same whoever goes first. What comes out otherwise each time stands beside it and decides nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Word = Literal["reproduced", "refuted", "refined"]


@dataclass(frozen=True)
class Ran:
    """What one command came to.

    Attributes:
        verdict: its `verdict.json`.
        status: its exit status.
    """

    verdict: dict[str, Any]
    status: int

    def guarantee(self, name: str) -> dict[str, Any]:
        """What the verdict says of a guarantee."""
        (found,) = [each for each in self.verdict["guarantees"] if each["name"] == name]
        return dict(found)

    def held(self, *names: str) -> bool:
        """Whether nothing was seen against guarantees that were looked at."""
        return all(self.guarantee(name)["status"] in ("upheld", "not_seen") for name in names)

    def broken(self, name: str) -> tuple[int, int]:
        """Orders that break a guarantee, and orders in all; (0, orders) where none does."""
        orders = int(self.verdict["metrics"]["orders"])
        if self.held(name):
            return 0, orders
        words = self.guarantee(name)["evidence"].split()
        return int(words[words.index("of") - 1].replace(",", "")), orders

    def anomaly(self, kind: str) -> tuple[int, int]:
        """How often something was seen, and of how many; (0, 0) where it was not."""
        found = [(each["count"], each["of"]) for each in self.verdict["anomalies"] if each["kind"] == kind]
        return found[0] if found else (0, 0)

    def metric(self, name: str) -> Any:
        return self.verdict["metrics"][name]


@dataclass(frozen=True)
class Measured:
    """What a claim has come to, in words whose numbers are the same each time."""

    word: Word
    told: str


@dataclass(frozen=True)
class Claim:
    """One row.

    Attributes:
        name: as the founding documents number it: `S1.2`.
        said: the claim.
        runs: overrides of each run that it is measured by.
        judge: from those runs, in that order.
        free: overrides of runs whose counts differ from time to time.
        tell: from those, for information.
    """

    name: str
    said: str
    runs: tuple[str, ...]
    judge: Callable[[Sequence[Ran]], Measured]
    free: tuple[str, ...] = ()
    tell: Callable[[Sequence[Ran]], str] = lambda ran: ""


def of(count: tuple[int, int], what: str = "orders") -> str:
    """`4 of 6 orders`."""
    return f"{count[0]:,} of {count[1]:,} {what if count[1] != 1 else what.removesuffix('s')}"

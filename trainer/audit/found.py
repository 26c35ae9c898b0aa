"""One anomaly of a history, with its smallest witness. Standard library only."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from trainer.audit.lineage import Transaction
from trainer.schedule.operations import History


@dataclass(frozen=True)
class Found:
    """An anomaly that was seen, and the operations in which one sees it.

    Attributes:
        kind: its name in the literature, or ours.
        guarantee: the guarantee that it breaks.
        because: one sentence.
        events: indices into `History.events`, in order: what is needed to see it and no more.
        transactions: the steps concerned, in the order in which they first appear in `events`.
        place: where it was seen; the first where there are several.
        versions: of a stale gradient, how many versions others wrote between its snapshot and its write.
    """

    kind: str
    guarantee: str
    because: str
    events: tuple[int, ...]
    transactions: tuple[Transaction, ...]
    place: str
    versions: int = 0


def found(
    history: History, kind: str, guarantee: str, place: str, events: Iterable[int], because: str, versions: int = 0
) -> Found:
    """A `Found` whose transactions are those of its events."""
    witness = tuple(sorted(set(events)))
    concerned = tuple(dict.fromkeys(history.events[index][:2] for index in witness))
    return Found(kind, guarantee, because, witness, concerned, place, versions)


def who(history: History, event: int) -> str:
    """`replica 1's step 0`, whose operation this is."""
    replica, step = history.events[event][:2]
    return told(replica, step)


def told(replica: int, step: int) -> str:
    return f"replica {replica}'s step {step}"

"""Where replicas announce what they are about to do. Standard library only.

    point(READ, "precision mode", of=MODE)

returns at once where nobody listens, which is in every free run: a look at one variable. Under a schedule it returns
when it is the calling replica's turn. Threads that are no replicas are never kept waiting.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from trainer.schedule.operations import VARIABLE, Operation
from trainer.schedule.order import Order


class Hidden(Exception):
    """Code under a schedule asked for something that can then be used unannounced."""


class Host(Protocol):
    """Who runs replicas under an order: `turnstile.py` for threads, `turn_table.py` for MirroredStrategy."""

    order: Order

    def own(self) -> int | None:
        """The calling replica's number; None when it is none of this host's."""

    def announce(self, own: int, operation: Operation) -> None:
        """Come back when it is this replica's turn to do it.

        Raises:
            Abandoned: the order ends here.
        """


# One process has one run at a time, so that this need not be handed through every holder. Set by the main thread,
# before there are replicas and after they have ended.
_host: Host | None = None


@contextmanager
def hosted(host: Host) -> Iterator[None]:
    """Let a host hear of every point."""
    global _host
    assert _host is None, "one schedule at a time"
    _host = host
    try:
        yield
    finally:
        _host = None


def listener() -> tuple[Host, int] | None:
    """The host and the calling replica's number, where points are heard of."""
    if _host is None:
        return None
    own = _host.own()
    return None if own is None else (_host, own)


def point(kind: str, name: str, *, of: str = VARIABLE, value: object = "") -> None:
    """Announce an operation on one place, of the same name."""
    if _host is None:
        return
    own = _host.own()
    if own is not None:
        _host.announce(own, Operation(kind, name, (name,), of, str(value)))


def points(kind: str, name: str, places: Sequence[str], *, of: str = VARIABLE) -> None:
    """Announce an operation on several places at once."""
    if _host is None:
        return
    own = _host.own()
    if own is not None:
        _host.announce(own, Operation(kind, name, tuple(places), of))


def mark(kind: str, value: str = "") -> None:
    """Put a mark in the history."""
    if _host is None:
        return
    own = _host.own()
    if own is not None:
        _host.order.mark(own, kind, value)

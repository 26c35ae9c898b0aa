"""What replicas did at one place of a state holder, in order. Standard library only."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from trainer.audit.lineage import Transaction
from trainer.schedule.operations import READ


class Touch(NamedTuple):
    """One read, write or update of one place."""

    event: int
    kind: str
    version: int
    base: int
    by: Transaction
    value: str


def writes(touches: Iterable[Touch]) -> dict[int, Touch]:
    """Whoever wrote each version."""
    return {touch.version: touch for touch in touches if touch.kind != READ}

"""Which updates are left in the shared variables, counted as the trainer's canaries count them.

A canary beside each variable has a slot for each replica, and the write that applies a replica's update raises the slot
by one. A write that is based on a snapshot leaves the counts of that snapshot and its own: what was written in between
is gone. So a variable's present value is a chain of updates, each based on the one before, and a slot's count is how
many of them are that replica's. `updates_kept` is, for each replica, the smallest count over all variables, summed.
"""

from __future__ import annotations

START = -1  # the value before any update


class Variable:
    """One variable's values: each is an update and the value it was based on."""

    def __init__(self) -> None:
        self.bases: list[int] = []
        self.writers: list[int] = []
        self.now = START

    def write(self, writer: int, base: int) -> None:
        self.bases.append(base)
        self.writers.append(writer)
        self.now = len(self.bases) - 1

    def counts(self) -> dict[int, int]:
        """Replica -> how many of its updates are in the present value."""
        found: dict[int, int] = {}
        at = self.now
        while at != START:
            writer = self.writers[at]
            found[writer] = found.get(writer, 0) + 1
            at = self.bases[at]
        return found


def updates_kept(variables: list[Variable]) -> int:
    counts = [variable.counts() for variable in variables]
    return sum(min(each.get(replica, 0) for each in counts) for replica in counts[0])

"""What replicas do where others can see it, and the history that comes of it. Standard library only.

A place is what two replicas can meet at: a piece of a shared variable, a lock, a holder's mode or cursor. Pieces of one
variable are called `NAME[0]`, `NAME[1]`, ... where it is cut up; a variable in one piece is called `NAME`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple

# Reading and writing. An update reads and writes in one go, as an in-place kernel does that nobody cuts up.
READ, WRITE, UPDATE = "read", "write", "update"
# Locks: alone, shared by readers, and tried without waiting.
ACQUIRE, RELEASE, SHARE, UNSHARE, TRY = "acquire", "release", "share", "unshare", "try"
# What may be said of an acquisition: by whoever has the lock already; for a time only.
REENTRANT, TIMED = "reentrant", "timed"
# What may be said of writing a mode: it is to stay, and no scope is to take it back.
ENABLED = "enabled"
# All parties go on together.
BARRIER = "barrier"
# Not operations but marks in a history, which nobody waits for: a step begins, a gradient was computed from what was
# read before, the step's writes are not to count.
BEGIN, COMPUTE, ABORT = "begin", "compute", "abort"

# Of what two replicas do at one place, these conflict with everything, and the others only with these.
CHANGES = frozenset((WRITE, UPDATE, ACQUIRE, RELEASE, TRY, BARRIER))
MARKS = frozenset((BEGIN, COMPUTE, ABORT))

# What kind of thing a place belongs to.
VARIABLE, LOCK, MODE, FLAG, CURSOR, BUFFER, GENERATOR = (
    *("variable", "lock", "mode", "flag", "cursor", "buffer", "generator"),
)
# A shared variable that replicas write by themselves, outside of the update mode's transaction.
APART = "apart"
# What a replica hands to the others, outside of the shared variables.
CONTRIBUTION = "contribution"
# A plain attribute of an object that all replicas use.
ATTRIBUTE = "attribute"
# Compiled steps, and the ids that they are found by.
CACHE = "cache"


class Operation(NamedTuple):
    """What a replica announces just before it does it.

    Attributes:
        kind: one of this module's words.
        name: what it is done to, as people and tokens call it.
        places: the places that it touches; more than one where a variable is cut up and the operation is not.
        of: what kind of thing it is done to: VARIABLE, LOCK, ...
        value: what is written or was chosen, in words; "" where it goes without saying. No part of its name.
    """

    kind: str
    name: str
    places: tuple[str, ...]
    of: str = VARIABLE
    value: str = ""

    @property
    def told(self) -> str:
        """Its name in tokens, messages and lane pictures: `read dense/kernel`."""
        return f"{self.kind} {self.name}"


class Event(NamedTuple):
    """An operation that was performed, or a mark.

    Attributes:
        replica, step: who, and in which of its steps. The two together name the transaction.
        versions: for each place, the version read, or installed by a write or an update; () for locks and marks.
        bases: for each place of a write or an update, the version that it is based on: for an update the current one,
            for a write the last that the replica read in this step; -1 where it read none.
    """

    replica: int
    step: int
    operation: Operation
    versions: tuple[int, ...] = ()
    bases: tuple[int, ...] = ()


@dataclass
class History:
    """Everything that replicas did in one order, in that order.

    Version 0 of every place is what it held at first; each write or update of it installs the next.

    Attributes:
        joint: a write carries the contributions of all replicas' same steps, as under all-reduce, not of its own only.
        copies: places begin with `COPY:` for each replica's own copy (`0:kernel`), as under mirrored.
        times: for each event, when it was announced and when it was granted: `time.perf_counter_ns`. Beside the
            events, which are the same in every replay.
        announced: the last that each replica announced, and when; granted, unless its order ended before.
    """

    num_replicas: int
    events: list[Event] = field(default_factory=list)
    joint: bool = False
    copies: bool = False
    times: list[tuple[int, int]] = field(default_factory=list, compare=False, repr=False)
    announced: dict[int, tuple[Operation, int]] = field(default_factory=dict, compare=False, repr=False)

    def add(self, event: Event, granted: int) -> None:
        """Add what its replica announced last, or a mark, which nobody announces."""
        announced = granted
        if event.operation.kind not in MARKS and event.replica in self.announced:
            announced = self.announced[event.replica][1]
        self.events.append(event)
        self.times.append((announced, granted))


_PIECE = re.compile(r"\[\d+\]$")


def variable_of(place: str) -> str:
    """The variable that a place is a piece of, or is."""
    return _PIECE.sub("", place)

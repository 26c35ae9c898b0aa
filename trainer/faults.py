"""Faults that a run is asked to have: what goes wrong, in which replica, at which step. Standard library only.

    faults=[raise:1:5,delay:0:3:0.2,hang:1:7,corrupt:0:4:inf,kill:1:9]

A run without faults knows nothing of them: what injects one is built only where one is asked for.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass

log = logging.getLogger(__name__)

# What VALUE is where none is given; kinds that take none have None.
KINDS: dict[str, float | None] = {"raise": None, "hang": None, "kill": None, "delay": 1.0, "corrupt": math.nan}
ENDING = ("raise", "hang", "kill")  # the run
LONGEST_DELAY = 3600.0  # seconds


class BadFault(ValueError):
    """An entry that names no fault; its message goes on from `faults=[ENTRY] `."""


@dataclass(frozen=True)
class Fault:
    """One entry.

    Attributes:
        value: seconds of a delay; what is added to the first element of a gradient.
        text: the entry as it was given.
    """

    kind: str
    replica: int
    step: int
    value: float
    text: str


def parse(entry: str) -> Fault:
    """The fault that an entry names.

    Raises:
        BadFault: it names none.
    """
    kind, *rest = entry.split(":")
    if kind not in KINDS or len(rest) not in (2, 3):
        raise BadFault(f"must be KIND:REPLICA:STEP or KIND:REPLICA:STEP:VALUE with a kind of {', '.join(KINDS)}")
    default = KINDS[kind]
    if default is None and len(rest) == 3:
        raise BadFault(f"must be {kind}:REPLICA:STEP: {kind} takes no value")
    try:
        replica, step = (int(number) for number in rest[:2])
        value = float(rest[2]) if len(rest) == 3 else default or 0.0
    except ValueError:
        raise BadFault("must have whole numbers for REPLICA and STEP, and a number, inf or nan for VALUE") from None
    if kind == "delay" and not 0 < value <= LONGEST_DELAY:
        raise BadFault(f"must have a delay above 0 and of at most {LONGEST_DELAY:g} seconds")
    if kind == "corrupt" and value == 0:
        raise BadFault("must add something else than 0, which corrupts nothing")
    return Fault(kind, replica, step, value, entry)


class InjectedFault(Exception):
    """What `raise` raises, on behalf of `replica`."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(f"faults=[{fault.text}]")
        self.replica, self.step = fault.replica, fault.step


class Faults:
    """The faults of one run.

    Args:
        restarts: how often a launcher has started the run again. What ends a run strikes in its first life only: the
            restarted one takes the same steps, and would never get past that one.

    Thread-safety: read-only; each replica's thread may strike its own.
    """

    def __init__(self, entries: Iterable[str], restarts: int = 0) -> None:
        found = [parse(entry) for entry in entries]
        self._all = [fault for fault in found if not restarts or fault.kind not in ENDING]

    def __bool__(self) -> bool:
        return bool(self._all)

    def corruptions(self, replica: int) -> list[Fault]:
        """Those that are done to a replica's gradients."""
        return [fault for fault in self._all if fault.kind == "corrupt" and fault.replica == replica]

    def struck_at(self) -> Sequence[int]:
        """The steps at which something else happens, in order."""
        return sorted({fault.step for fault in self._all if fault.kind != "corrupt"})

    def strike(self, step: int, replicas: Container[int]) -> None:
        """Do what is to happen at a step before its gradient is computed, to these replicas in the order given.

        Raises:
            InjectedFault: a replica is to raise.
        """
        for fault in self._all:
            if fault.step == step and fault.kind != "corrupt" and fault.replica in replicas:
                _strike(fault)


def _strike(fault: Fault) -> None:
    log.warning("fault injected: %s", fault.text)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()  # a killed process takes with it what it has not written
    match fault.kind:
        case "raise":
            raise InjectedFault(fault)
        case "delay":
            time.sleep(fault.value)
        case "hang":
            threading.Event().wait()
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)

"""What replicas count in, as the code that counts sees it, and one way to write an increment. Imports no framework."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from trainer.schedule.operations import READ, WRITE
from trainer.schedule.point import point

TOTAL = "total"

Numbers = NDArray[Any]
Section = AbstractContextManager[Any]


class Shared:
    """Holds the variable under a name that every replica uses, and may bind to something else.

    Attributes:
        total: a torch tensor or a tf.Variable; under a schedule what announces every access to it.

    Thread-safety: none, on purpose.
    """

    def __init__(self, total: Any) -> None:
        self.total = total


class VisibleName(Shared):
    """As replicas under a schedule have it that bind the name: looking it up and binding it are announced."""

    @property
    def total(self) -> Any:
        point(READ, TOTAL)
        return self._bound

    @total.setter
    def total(self, value: Any) -> None:
        point(WRITE, TOTAL)
        self._bound = value


@dataclass(frozen=True)
class Operation:
    """One way to write an increment, as plain loops with nothing else in them.

    Attributes:
        free: f(shared, count, amount) makes `count` increments with nothing held.
        locked: f(shared, count, amount, section) makes each of them inside the section.
        copy: a copy of the variable's value that nobody else changes.
        read, write: its two halves, `new = read(shared, amount)` and `write(shared, new)`, where it has halves.
    """

    free: Callable[[Shared, int, Any], None]
    locked: Callable[[Shared, int, Any, Section], None]
    copy: Callable[[Shared], Any]
    read: Callable[[Shared, Any], Any] | None = None
    write: Callable[[Shared, Any], None] | None = None


class Variable(Protocol):
    """A kind of variable: torch's or TensorFlow's."""

    def make(self) -> Shared:
        """A new one, of zeros."""

    def visible(self) -> Shared:
        """A new one of which every access is announced to the schedule."""

    def fill(self, shared: Shared, number: float) -> None:
        """Set all elements, before replicas have it."""

    def amount(self, number: float) -> Any:
        """What an increment adds to it."""

    def values(self, value: Any) -> Numbers:
        """A copy, or what is left at the end, as an array: [elements], a scalar as one element."""


def array(value: Any) -> Numbers:
    return np.atleast_1d(np.asarray(value))

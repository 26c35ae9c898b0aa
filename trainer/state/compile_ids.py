"""Who names a compiled step, so that it can be stored and found again. Standard library only.

A step has a qualified name, which others may have too, and content: a digest of all that it computes and is made with.
Two steps of one id and different content are one too many: whoever looks that id up may get the other's body.
"""

from __future__ import annotations

import os
import secrets
import uuid
import weakref
from collections.abc import Callable
from typing import Protocol

from trainer.schedule.operations import CACHE, READ, UPDATE, WRITE
from trainer.schedule.point import point

DEFAULT_BITS = 48


class CompileIds(Protocol):
    def id_of(self, name: str, content: str) -> str:
        """The id under which a step is stored and looked up; the same one whenever a process asks for it again.

        Args:
            name: the step's qualified name.
            content: its digest.

        Thread-safety: called by any thread; whether two steps then get two ids is what mechanisms differ in.
        """


class Content:
    """Safe, and found again: the id says what the step computes, so whoever has the same step has the same id."""

    def id_of(self, name: str, content: str) -> str:
        return f"{name}${content}"


class Uuid:
    """Safe, and never found again: 122 random bits for each id, which no other process draws. Nothing to do at a fork.

    Source: RFC 9562, version 4; Python draws it from the operating system.
    """

    def __init__(self) -> None:
        self._given: dict[tuple[str, str], str] = {}

    def id_of(self, name: str, content: str) -> str:
        point(UPDATE, "compile ids", of=CACHE)
        # One operation: of two threads that ask for one step at once, both get the id of whoever came first.
        return self._given.setdefault((name, content), f"{name}${uuid.uuid4().hex}")


class Counter:
    """Unsafe: the next number. `fork` copies the counter, so that siblings give the same ids to different steps."""

    def __init__(self) -> None:
        self._given: dict[tuple[str, str], str] = {}
        self._next = 0

    def id_of(self, name: str, content: str) -> str:
        point(READ, "compile ids", of=CACHE)
        known = self._given.get((name, content))
        if known is None:
            number = self._next
            point(WRITE, "compile ids", of=CACHE, value=number)
            self._next = number + 1
            known = self._given[name, content] = f"{name}${number}"
        return known


class RandomOffset:
    """Unsafe, if seldom: a counter that starts anywhere, in every process and after every fork.

    Two processes of n steps each collide in n * n / 2**bits pairs of ids on average.

    Args:
        bits: of the space in which it starts, and goes round.
    """

    def __init__(self, bits: int = DEFAULT_BITS) -> None:
        self._bits = bits
        self._given: dict[tuple[str, str], str] = {}
        self.start_anywhere()
        _offsets.add(self)

    def start_anywhere(self) -> None:
        self._next = secrets.randbits(self._bits)

    def id_of(self, name: str, content: str) -> str:
        point(READ, "compile ids", of=CACHE)
        known = self._given.get((name, content))
        if known is None:
            number = self._next
            point(WRITE, "compile ids", of=CACHE, value=number)
            self._next = (number + 1) % 2**self._bits
            known = self._given[name, content] = f"{name}${number}"
        return known


# Held weakly: what is registered at fork stays so for as long as the process.
_offsets: weakref.WeakSet[RandomOffset] = weakref.WeakSet()


def _start_anywhere_after_fork() -> None:
    for each in _offsets:
        each.start_anywhere()


os.register_at_fork(after_in_child=_start_anywhere_after_fork)

# Mechanism -> its holder, given the bits that a random offset has.
COMPILE_IDS: dict[str, Callable[[int], CompileIds]] = {
    "content": lambda bits: Content(),
    "uuid": lambda bits: Uuid(),
    "random_offset": RandomOffset,
    "counter": lambda bits: Counter(),
}

"""Who notes that a step was called for the first time: that call is made in full precision. Standard library only.

    with first_call.call() as is_first:
        ...                                   # the call itself

Source: the guard of Sonnet's `mixed_precision.modes`, a flag for functions and a set of instances for modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from trainer.schedule.locks import Lock
from trainer.schedule.operations import FLAG, READ, WRITE
from trainer.schedule.point import point


class FirstCall(Protocol):
    def call(self) -> AbstractContextManager[bool]:
        """Round one call; yields whether it is the first.

        Thread-safety: made for several threads; which mechanisms survive them is what they differ in.
        """


class BeforeStart:
    """Safe: the main thread has made the first call before replicas start, so that none of theirs is the first."""

    @contextmanager
    def call(self) -> Iterator[bool]:
        yield False


class DoubleChecked:
    """Safe: the flag is looked at again under a lock, which is held until the first call is done.

    Not where that call waits for another replica: whoever is waited for may wait for the lock.
    """

    def __init__(self) -> None:
        self._lock = Lock("first call lock")
        self._done = False

    @contextmanager
    def call(self) -> Iterator[bool]:
        point(READ, "first call", of=FLAG)
        if not self._done:
            with self._lock:
                point(READ, "first call", of=FLAG)
                if not self._done:
                    yield True
                    point(WRITE, "first call", of=FLAG)
                    self._done = True
                    return
        yield False


class Flag:
    """Unsafe: whoever comes while the first call is under way finds the flag as it was, and makes it again."""

    def __init__(self) -> None:
        self._done = False

    @contextmanager
    def call(self) -> Iterator[bool]:
        point(READ, "first call", of=FLAG)
        if self._done:
            yield False
            return
        yield True
        point(WRITE, "first call", of=FLAG)
        self._done = True


class InstanceSet:
    """Unsafe: as `Flag`, with a set of the objects that were called before in place of the flag."""

    def __init__(self, instance: object) -> None:
        self._instance = instance
        self._seen: set[int] = set()

    @contextmanager
    def call(self) -> Iterator[bool]:
        point(READ, "first call", of=FLAG)
        if id(self._instance) in self._seen:
            yield False
            return
        yield True
        point(WRITE, "first call", of=FLAG)
        self._seen.add(id(self._instance))


FIRST_CALLS: dict[str, Callable[[object], FirstCall]] = {
    "before_start": lambda instance: BeforeStart(),
    "double_checked": lambda instance: DoubleChecked(),
    "instance_set": InstanceSet,
    "flag": lambda instance: Flag(),
}

"""What takes long while no step is taken: whoever does it says so here, and whoever shows the run is told.

So engines need not know of reports. Standard library only.

Thread-safety: none; the main thread says and listens. A process has one run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Listener = Callable[[str | None], None]

_listeners: list[Listener] = []
_said: list[str] = []


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Have a listener told what is done, and None once it is done."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


@contextmanager
def doing(what: str) -> Iterator[None]:
    """Say what is done while the block is, as in `compiling the step`; what it is part of is said again afterwards."""
    _said.append(what)
    _tell()
    try:
        yield
    finally:
        _said.pop()
        _tell()


def _tell() -> None:
    for listener in _listeners:
        listener(_said[-1] if _said else None)

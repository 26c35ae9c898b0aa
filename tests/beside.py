"""For tests of locks: bodies in threads of their own, waiting until something is so (never for ever), marked lines."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import Generic, TypeVar

R = TypeVar("R")

WAIT = 20.0


class Beside(Generic[R]):
    """A body that runs beside the test."""

    def __init__(self, body: Callable[[], R]) -> None:
        self._body = body
        self._results: list[R] = []
        self._error: BaseException | None = None
        # A daemon, so that a deadlock fails its test and not the process.
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._results.append(self._body())
        except BaseException as error:
            self._error = error

    def result(self) -> R:
        """What the body returned; raises what it raised."""
        self._thread.join(WAIT)
        assert not self._thread.is_alive(), "still waiting"
        if self._error is not None:
            raise self._error
        return self._results[0]

    @property
    def name(self) -> str:
        return self._thread.name


class Worker:
    """A thread that does one thing after the other as it is told, and holds in between what it has acquired."""

    def __init__(self) -> None:
        self._orders: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._done: SimpleQueue[object] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        for order in iter(self._orders.get, None):
            self._done.put(order())

    def begin(self, order: Callable[[], object]) -> None:
        self._orders.put(order)

    def done(self) -> object:
        return self._done.get(timeout=WAIT)

    def do(self, order: Callable[[], object]) -> object:
        self.begin(order)
        return self.done()

    def end(self) -> None:
        self._orders.put(None)
        self._thread.join(WAIT)
        assert not self._thread.is_alive()

    @property
    def ident(self) -> int | None:
        return self._thread.ident


def until(condition: Callable[[], object]) -> None:
    """Until something that another thread does is done, where nothing tells."""
    left, pause = WAIT, threading.Event()
    while not condition():
        pause.wait(0.001)
        left -= 0.001
        assert left > 0, "has not come about"


def passed(event: threading.Event) -> None:
    assert event.wait(WAIT), "has not come about"


def line_of(file: str, mark: str) -> str:
    """`file:line` of the one line that ends with the mark as a comment."""
    lines = [number for number, line in enumerate(Path(file).read_text().splitlines(), 1) if line.endswith(f"# {mark}")]
    assert len(lines) == 1
    return f"{file}:{lines[0]}"

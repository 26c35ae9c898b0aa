"""Threads that are stuck at locks for ever: who waits for whom, and since where. `lock_watch.py` finds them.

Standard library only.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Iterator, Mapping
from threading import Thread
from types import CodeType, FrameType
from typing import Protocol

from trainer.frames import frames
from trainer.schedule.turnstile import OWN_FILES, stacks

# Frames that are kept of where a lock was acquired, from the innermost out.
FRAMES = 8

# Frames as they were: the code and how far it had come. Lines are looked up only when they are told.
Place = list[tuple[CodeType, int]]


class Watched(Protocol):
    """A lock whose holders and waiters are noted."""

    name: str

    def keep_out(self, wait: Wait) -> list[Hold]:
        """The holds that keep whoever waits from going in."""


class Hold:
    """A thread that is inside of a lock.

    Attributes:
        depth: times that it went in; its own thread only.
    """

    __slots__ = ("depth", "place", "shared", "thread")

    def __init__(self, thread: Thread, place: Place, shared: bool = False) -> None:
        self.thread, self.place, self.shared = thread, place, shared
        self.depth = 1


class Wait:
    """A thread that may have to wait for a lock, for as long as it takes."""

    __slots__ = ("lock", "shared")

    def __init__(self, lock: Watched, shared: bool = False) -> None:
        self.lock, self.shared = lock, shared


# For each thread that waits: its wait, and the holds that keep it out.
Waiting = dict[Thread, tuple[Wait, list[Hold]]]


class Deadlock:
    """Threads that can never go on.

    Attributes:
        told: who waits for whom: a cycle where there is one, else everybody who is stuck.
        held, waits: the stacks at which the locks that are told of were acquired, and at which they are waited for.
        threads: all that are stuck.
    """

    def __init__(self, found: Waiting) -> None:
        told = _cycle(found) or list(found)
        behind = [called(thread) for thread in found if thread not in told]
        self.threads = frozenset(found)
        self.told = "; ".join(_told_wait(thread, found) for thread in told)
        if behind:
            self.told += f"; {', '.join(behind)} wait{'s' if len(behind) == 1 else ''} behind"
        self.held = "\n".join(_told_holds(told, found))
        self.waits = "\n".join(_told_waits({thread: found[thread][0] for thread in told}))


def told_holds(waiting: Waiting) -> str:
    """Where the locks were acquired that threads wait for."""
    return "\n".join(_told_holds([thread for thread, (_, holds) in waiting.items() if holds], waiting))


def told_now(threads: Iterable[Thread], waiting: Waiting) -> str:
    """What each thread is at: waiting for a lock that another holds, as far as that was seen, or a line of its code."""
    return "; ".join(
        _told_wait(thread, waiting) if thread in waiting and waiting[thread][1] else where([thread])
        for thread in threads
    )


def where(threads: Iterable[Thread]) -> str:
    """The line that each thread is at: the innermost that tells a reader something."""
    now = frames()
    told = []
    for thread in threads:
        frame = now.get(thread.ident or 0)
        while frame is not None and any(part in frame.f_code.co_filename for part in OWN_FILES):
            frame = frame.f_back
        if frame is not None:
            file = "/".join(frame.f_code.co_filename.split("/")[-2:])
            told.append(f"{called(thread)} is at {file}:{frame.f_lineno} in {frame.f_code.co_name}")
    return "; ".join(told)


def place(frame: FrameType | None) -> Place:
    """A frame and those that it was called from."""
    found: Place = []
    while frame is not None and len(found) < FRAMES:
        found.append((frame.f_code, frame.f_lasti))
        frame = frame.f_back
    return found


def _cycle(found: Waiting) -> list[Thread]:
    """Threads of which each waits for the next and the last for the first; none where all wait for one that ended."""
    for first in found:
        path: list[Thread] = []
        thread = first
        while thread in found and thread not in path:
            path.append(thread)
            thread = _hold(thread, found).thread
        if thread in path:
            return path[path.index(thread) :]
    return []


def _hold(thread: Thread, found: Waiting) -> Hold:
    """The hold that is told of, where several keep a thread out: of one that waits too, if there is one."""
    holds = found[thread][1]
    return next((hold for hold in holds if hold.thread in found), holds[0])


def _told_wait(thread: Thread, found: Waiting) -> str:
    # The words of `Order`, which tells the deadlocks of a schedule.
    holder, waits = _hold(thread, found).thread, f"{called(thread)} waits for {found[thread][0].lock.name}"
    if holder is thread:
        return f"{waits}, which it holds itself"
    return f"{waits}, which {called(holder)} holds{'' if holder.is_alive() else ' and is through'}"


def _told_holds(told: Iterable[Thread], found: Waiting) -> Iterator[str]:
    already: set[Hold] = set()
    for thread in told:
        hold = _hold(thread, found)
        if hold not in already:
            already.add(hold)
            yield f"{called(hold.thread)} acquired {found[thread][0].lock.name} at\n{_lines(hold.place)}"


def _told_waits(found: Mapping[Thread, Wait]) -> Iterator[str]:
    now = stacks({thread.ident or 0: at for at, thread in enumerate(found)}, range(len(found)))
    for at, (thread, wait) in enumerate(found.items()):
        yield f"{called(thread)} waits for {wait.lock.name} at\n{now[at]}"


def called(thread: Thread) -> str:
    """`replica 1`, or a thread's own name."""
    kind, _, number = thread.name.partition("-")
    return f"replica {number}" if kind == "replica" else f"thread {thread.name}"


def _lines(where: Place) -> str:
    """A place as a traceback has it, outermost first, without frames that tell a reader nothing."""
    frames = [
        traceback.FrameSummary(code.co_filename, _line(code, lasti), code.co_name)
        for code, lasti in reversed(where)
        if not any(part in code.co_filename for part in OWN_FILES)
    ]
    return "".join(traceback.format_list(frames)).rstrip()


def _line(code: CodeType, lasti: int) -> int | None:
    return next((line for start, end, line in code.co_lines() if start <= lasti < end), None)

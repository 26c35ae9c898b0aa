"""Locks and barriers as a schedule keeps them: whoever waits is somebody who cannot be chosen.

Made by `trainer/schedule/locks.py`.
"""

from __future__ import annotations

import _thread
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Any

from trainer.schedule.operations import (
    ACQUIRE,
    BARRIER,
    LOCK,
    READ,
    REENTRANT,
    RELEASE,
    SHARE,
    TIMED,
    TRY,
    UNSHARE,
    Operation,
)
from trainer.schedule.point import Host, listener


class ModelledLock:
    """A lock whose holder the schedule keeps. For threads that are no replicas of a schedule it is an ordinary lock.

    The time of an acquisition with a time-out is up when nobody can go on otherwise, and not before.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._real: Any = self._make_real()  # for threads that are no replicas

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        heard = listener()
        if heard is None:
            return bool(self._real.acquire(blocking, timeout))
        if not blocking and timeout != -1:
            raise ValueError("can't specify a timeout for a non-blocking call")
        if timeout < 0 and timeout != -1:
            raise ValueError("timeout value must be a non-negative number")
        if self._is_held_outside():
            raise RuntimeError(f"{self._name} is held by a thread that is no replica, and no order can free it")
        host, own = heard
        waits = blocking and timeout != 0
        self._announce(host, own, ACQUIRE if waits else TRY, TIMED if timeout > 0 else "")
        return host.order.tried

    def release(self) -> None:
        heard = listener()
        if heard is None:
            self._real.release()
            return
        host, own = heard
        if not self._may_release(host, own):
            self._announce(host, own, READ)  # whether it is held may change until it is this replica's turn
            if not self._may_release(host, own):
                raise RuntimeError(self._refusal)
        self._announce(host, own, RELEASE)
        if not host.order.tried:
            raise RuntimeError(self._refusal)

    def locked(self) -> bool:
        heard = listener()
        if heard is None:
            return bool(self._real.locked())
        host, own = heard
        self._announce(host, own, READ)
        return host.order.is_held(self._name)

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, stack: TracebackType | None
    ) -> None:
        self.release()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._name}>"

    def _is_owned(self) -> bool:
        """What `threading.Condition` asks before it waits or notifies: as with its own locks, whether it is held."""
        heard = listener()
        if heard is None:
            return bool(self._real.locked())
        return heard[0].order.holds(heard[1], self._name) or self.locked()

    def _at_fork_reinit(self) -> None:
        self._real._at_fork_reinit()

    # Where the two kinds differ.

    _refusal = "release unlocked lock"
    _value = ""

    def _make_real(self) -> object:
        return _thread.allocate_lock()

    def _is_held_outside(self) -> bool:
        return bool(self._real.locked())

    def _may_release(self, host: Host, own: int) -> bool:
        """Anybody may release a plain lock that is held."""
        return host.order.is_held(self._name)

    def _announce(self, host: Host, own: int, kind: str, more: str = "") -> None:
        value = " ".join(filter(None, [self._value, more]))
        host.announce(own, Operation(kind, self._name, (self._name,), LOCK, value))


class ModelledRLock(ModelledLock):
    """As `ModelledLock`, but the replica that holds it may go in again; it is free after as many releases."""

    _refusal = "cannot release un-acquired lock"
    _value = REENTRANT

    def _make_real(self) -> object:
        return threading._CRLock()  # type: ignore[attr-defined]

    def _is_held_outside(self) -> bool:
        if not self._real.acquire(blocking=False):
            return True
        self._real.release()
        return False

    def _may_release(self, host: Host, own: int) -> bool:
        return host.order.holds(own, self._name)

    # What `threading.Condition` asks of an RLock: to let go of it altogether, and to have it back as it was.

    def _is_owned(self) -> bool:
        heard = listener()
        return bool(self._real._is_owned()) if heard is None else heard[0].order.holds(heard[1], self._name)

    def _release_save(self) -> Any:
        heard = listener()
        if heard is None:
            return self._real._release_save()
        depth = 0
        while heard[0].order.holds(heard[1], self._name):
            self.release()
            depth += 1
        return depth

    def _acquire_restore(self, state: Any) -> None:
        if listener() is None:
            self._real._acquire_restore(state)
            return
        for _ in range(state):
            self.acquire()


class ModelledBarrier:
    def __init__(self, parties: int, name: str) -> None:
        self._parties, self._name = parties, name

    def wait(self) -> None:
        heard = listener()
        assert heard is not None, "only replicas under a schedule wait at a modelled barrier"
        host, own = heard
        host.announce(own, Operation(BARRIER, self._name, (self._name,), LOCK, str(self._parties)))

    def abort(self) -> None:
        """Nobody waits here but in the schedule, which lets everybody go by itself."""


class ModelledReadWriteLock:
    """Lets a reader in whenever no writer is inside: more orders than `ReadWriteLock`, which makes readers queue."""

    def __init__(self, name: str) -> None:
        self._name = name

    def read(self) -> AbstractContextManager[None]:
        return self._section(SHARE, UNSHARE)

    def write(self) -> AbstractContextManager[None]:
        return self._section(ACQUIRE, RELEASE)

    @contextmanager
    def _section(self, enter: str, leave: str) -> Iterator[None]:
        self._announce(enter)
        try:
            yield
        finally:
            self._announce(leave)

    def _announce(self, kind: str) -> None:
        heard = listener()
        assert heard is not None, "only replicas under a schedule use a modelled lock"
        host, own = heard
        host.announce(own, Operation(kind, self._name, (self._name,), LOCK))

"""Update modes as a user might bring them, which never come to their end, each in a way of its own; and two that do."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from threading import Lock

from trainer.updates.shared_vector import Replica, SharedVector
from trainer.updates.transactions import Alone, Compute


class Mode(Alone):
    def __init__(self, shared: SharedVector, replicas: Sequence[Replica]) -> None:
        super().__init__(shared, replicas)
        self.first = threading.Lock()
        self.second = Lock()
        self.monitor = threading.Condition()
        self.never = threading.Event()
        self.met = threading.Barrier(len(replicas))
        self.gates = [threading.Lock() for _ in replicas]

    def add(self, replica: Replica) -> None:
        self.shared.add(replica, self.shared.delta(replica, base=self.shared.vector))


class Twice(Mode):
    """Takes a lock that it has."""

    def step(self, replica: Replica, compute: Compute) -> None:
        compute(replica)
        with self.first, self.first:
            self.add(replica)


class Opposite(Mode):
    """Takes two locks in opposite orders."""

    def step(self, replica: Replica, compute: Compute) -> None:
        compute(replica)
        one, other = (self.first, self.second) if replica.replica_id else (self.second, self.first)
        with one:
            self.met.wait()
            with other:
                self.add(replica)


class Kept(Mode):
    """Ends without giving a lock back."""

    def step(self, replica: Replica, compute: Compute) -> None:
        compute(replica)
        self.first.acquire()
        self.add(replica)


class Unset(Mode):
    """Waits under a lock for what nobody does."""

    def step(self, replica: Replica, compute: Compute) -> None:
        compute(replica)
        with self.first:
            self.never.wait()


class HoldsTheInterpreter(Mode):
    """Calls C code that does not give up the GIL."""

    def step(self, replica: Replica, compute: Compute) -> None:
        compute(replica)
        ctypes.PyDLL(None).sleep(600)


class Monitor(Mode):
    """Takes a condition twice, as one may, and waits at it: no deadlock."""

    def step(self, replica: Replica, compute: Compute) -> None:
        compute(replica)
        with self.monitor, self.monitor:
            self.add(replica)
            self.monitor.notify_all()
            self.monitor.wait(0.001)


class Ring(Mode):
    """Hands gates on, which whoever acquired them does not give back: no deadlock."""

    def __init__(self, shared: SharedVector, replicas: Sequence[Replica]) -> None:
        super().__init__(shared, replicas)
        for gate in self.gates[1:]:
            gate.acquire()

    def step(self, replica: Replica, compute: Compute) -> None:
        compute(replica)
        self.gates[replica.replica_id].acquire()
        self.add(replica)
        self.gates[(replica.replica_id + 1) % len(self.gates)].release()

"""Increments of a tensor that several threads share, as they are written. `shared.total` is an int32 tensor.

PyTorch gives up the GIL for the time of each kernel. So `+=` and `add_` of two threads can be inside the kernel at
once, each between its load and its store; what is lost there no bytecode shows. It is rare, and comes in bursts: a
thread that the operating system takes off its core between the two writes back, when it goes on, over all that others
have added meanwhile. One core is enough for that. In the other two ways the value is held in a Python variable from one
kernel to the next, and much more is lost. `python -m trainer show bytecode` has the instructions.
"""

from __future__ import annotations

from typing import Any

from trainer.workloads.counter.shared import Operation, Section, Shared


def in_place(shared: Shared, count: int, amount: Any) -> None:
    for _ in range(count):
        shared.total += amount


def in_place_locked(shared: Shared, count: int, amount: Any, section: Section) -> None:
    for _ in range(count):
        with section:
            shared.total += amount


def add_(shared: Shared, count: int, amount: Any) -> None:
    for _ in range(count):
        shared.total.add_(amount)


def add_locked(shared: Shared, count: int, amount: Any, section: Section) -> None:
    for _ in range(count):
        with section:
            shared.total.add_(amount)


def rebind(shared: Shared, count: int, amount: Any) -> None:
    for _ in range(count):
        shared.total = shared.total + amount


def rebind_locked(shared: Shared, count: int, amount: Any, section: Section) -> None:
    for _ in range(count):
        with section:
            shared.total = shared.total + amount


def rebind_read(shared: Shared, amount: Any) -> Any:
    return shared.total + amount


def rebind_write(shared: Shared, new: Any) -> None:
    shared.total = new


def read_add_write(shared: Shared, count: int, amount: Any) -> None:
    for _ in range(count):
        new = shared.total.clone()
        new += amount
        shared.total.copy_(new)


def read_add_write_locked(shared: Shared, count: int, amount: Any, section: Section) -> None:
    for _ in range(count):
        with section:
            new = shared.total.clone()
            new += amount
            shared.total.copy_(new)


def read_added(shared: Shared, amount: Any) -> Any:
    new = shared.total.clone()
    new += amount
    return new


def write_back(shared: Shared, new: Any) -> None:
    shared.total.copy_(new)


def copy(shared: Shared) -> Any:
    return shared.total.clone()


OPERATIONS: dict[str, Operation] = {
    "in_place": Operation(in_place, in_place_locked, copy),
    "add_": Operation(add_, add_locked, copy),
    "rebind": Operation(rebind, rebind_locked, copy, rebind_read, rebind_write),
    "read_add_write": Operation(read_add_write, read_add_write_locked, copy, read_added, write_back),
}

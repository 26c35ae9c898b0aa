"""Increments of a tf.Variable that several threads share, as they are written.

The kernel behind `assign_add` holds the variable's own lock from reading to writing, so that nothing is lost. In
`assign(total + 1)` the value is out of the variable between two kernels, each of which holds the lock by itself.
"""

from __future__ import annotations

from typing import Any

from trainer.workloads.counter.shared import Operation, Section, Shared


def assign_add(shared: Shared, count: int, amount: Any) -> None:
    for _ in range(count):
        shared.total.assign_add(amount)


def assign_add_locked(shared: Shared, count: int, amount: Any, section: Section) -> None:
    for _ in range(count):
        with section:
            shared.total.assign_add(amount)


def assign(shared: Shared, count: int, amount: Any) -> None:
    for _ in range(count):
        shared.total.assign(shared.total + amount)


def assign_locked(shared: Shared, count: int, amount: Any, section: Section) -> None:
    for _ in range(count):
        with section:
            shared.total.assign(shared.total + amount)


def assign_read(shared: Shared, amount: Any) -> Any:
    return shared.total + amount


def assign_write(shared: Shared, new: Any) -> None:
    shared.total.assign(new)


def copy(shared: Shared) -> Any:
    return shared.total.read_value()


OPERATIONS: dict[str, Operation] = {
    "assign_add": Operation(assign_add, assign_add_locked, copy),
    "assign": Operation(assign, assign_locked, copy, assign_read, assign_write),
}

"""A `tf.Variable` as plain threads under a schedule have it: every access to it is announced first.

    variable = VisibleVariable(tf.Variable([0.0]), "total")
    variable.assign(variable + 1)               # a read, and a write that something can come before
    variable.assign_add([1.0])                  # an update, in one go

Whatever else is asked of it is the variable's own, unannounced: a graph that was traced with it, above all. Imports no
framework.
"""

from __future__ import annotations

from typing import Any

from trainer.schedule.operations import READ, UPDATE, WRITE
from trainer.schedule.point import point


class VisibleVariable:
    """Stands for the variable wherever its value is asked for or changed.

    Args:
        splits_updates: announce `assign_add` and `assign_sub` as reading and writing, and do them so: what other
            threads could see of a kernel that is not atomic.

    Thread-safety: the variable's own; a schedule lets one replica at a time come here.
    """

    def __init__(self, variable: Any, name: str, *, splits_updates: bool = False) -> None:
        self.variable = variable
        self._name = name
        self._splits_updates = splits_updates

    def read_value(self) -> Any:
        point(READ, self._name)
        return self.variable.read_value()

    value = read_value

    def numpy(self) -> Any:
        return self.read_value().numpy()

    def assign(self, value: Any) -> VisibleVariable:
        # `value` may be this variable: it is read before the write is announced.
        new = value.read_value() if isinstance(value, VisibleVariable) else value
        point(WRITE, self._name)
        self.variable.assign(new)
        return self

    def assign_add(self, delta: Any) -> VisibleVariable:
        if self._splits_updates:
            return self.assign(self.read_value() + delta)
        point(UPDATE, self._name)
        self.variable.assign_add(delta)
        return self

    def assign_sub(self, delta: Any) -> VisibleVariable:
        if self._splits_updates:
            return self.assign(self.read_value() - delta)
        point(UPDATE, self._name)
        self.variable.assign_sub(delta)
        return self

    def __add__(self, other: Any) -> Any:
        return self.read_value() + other

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        return self.read_value() - other

    def __mul__(self, other: Any) -> Any:
        return self.read_value() * other

    __rmul__ = __mul__

    def __getattr__(self, name: str) -> Any:
        return getattr(self.variable, name)

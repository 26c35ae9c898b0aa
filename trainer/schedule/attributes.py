"""Plain attributes of an object that all replicas use, announced without a change to its class. Standard library only.

    mode = announced(Optimistic)(shared, replicas)

Under a schedule `self.version` is then a visible read, and `self.version += 1` a read and a write. What is announced is
that an attribute was looked up or bound to something else; what happens inside a list, a dict or any other object that
it is bound to cannot be seen. Free runs have no need of it.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
import types
from collections.abc import Callable, Iterator
from typing import Any, Generic, Protocol, TypeVar

from trainer.schedule.operations import ATTRIBUTE, READ, WRITE
from trainer.schedule.point import point

T = TypeVar("T")

# Run by one thread, before replicas have the object.
CONSTRUCTORS = frozenset(("__init__", "__new__", "__post_init__"))
SCALARS = (int, float, str, bool, types.NoneType)
_UNANNOUNCED = "_unannounced"
_MADE_IN_PYTHON = 1 << 9  # Py_TPFLAGS_HEAPTYPE: made by a class statement


def announced(cls: type[T]) -> type[T]:
    """A subclass whose attributes are announced to the schedule when a replica reads or assigns them.

    Only attributes that some method other than a constructor assigns: the others never change once replicas run. Which
    these are is read from the source of the class and its bases, so that it is the same in every run. Where there is
    no source, it is every attribute but those that hold something else than a scalar after construction. Assignments
    from outside the class, as in `mode.version = 3`, and those by `setattr` make no attribute count.
    """
    names = rebound(cls)
    label = cls.__name__
    plain: Any = cls

    def is_announced(self: object, name: str) -> bool:
        if names is not None:
            return name in names
        if name.startswith("__") or name == _UNANNOUNCED or _is_descriptor(cls, name):
            return False
        held = object.__getattribute__(self, "__dict__")
        # Before construction is through there are no replicas.
        return name not in held.get(_UNANNOUNCED, ()) and not callable(inspect.getattr_static(cls, name, None))

    def __init__(self: object, *args: Any, **kwargs: Any) -> None:
        plain.__init__(self, *args, **kwargs)
        held = object.__getattribute__(self, "__dict__")
        held[_UNANNOUNCED] = frozenset(name for name, value in held.items() if not _is_scalar(value))

    def __getattribute__(self: object, name: str) -> Any:
        if is_announced(self, name):
            point(READ, f"{label}.{name}", of=ATTRIBUTE)
        return plain.__getattribute__(self, name)

    def __setattr__(self: object, name: str, value: object) -> None:
        if is_announced(self, name):
            point(WRITE, f"{label}.{name}", of=ATTRIBUTE, value=repr(value) if _is_scalar(value) else "")
        plain.__setattr__(self, name, value)

    def __delattr__(self: object, name: str) -> None:
        if is_announced(self, name):
            point(WRITE, f"{label}.{name}", of=ATTRIBUTE, value="nothing")
        plain.__delattr__(self, name)

    def fill(namespace: dict[str, Any]) -> None:
        accessors: tuple[Callable[..., Any], ...] = (__getattribute__, __setattr__, __delattr__)
        if names is None:
            accessors = (*accessors, __init__)
        else:
            namespace["__slots__"] = ()
        namespace.update({each.__name__: each for each in accessors})
        namespace.update({"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__})

    made: type[T] = types.new_class(label, (cls,), exec_body=fill)
    return made


def rebound(cls: type) -> frozenset[str] | None:
    """The attributes that methods of a class other than its constructors assign or delete; None without its source."""
    found: set[str] = set()
    for each in cls.__mro__:
        if each in (Generic, Protocol) or not each.__flags__ & _MADE_IN_PYTHON:
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(each)))
        except (OSError, TypeError, SyntaxError):
            return None
        found.update(_assigned(each.__name__, tree))
    return frozenset(name for name in found if not name.startswith("__") and not _is_descriptor(cls, name))


def _assigned(owner: str, tree: ast.Module) -> Iterator[str]:
    definition = tree.body[0]
    assert isinstance(definition, ast.ClassDef)
    for method in definition.body:
        if not isinstance(method, (ast.FunctionDef, ast.AsyncFunctionDef)) or method.name in CONSTRUCTORS:
            continue
        own = next((each.arg for each in (*method.args.posonlyargs, *method.args.args)), None)
        # All of the body: what is nested in it has `self` from there.
        for node in ast.walk(method):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, (ast.Store, ast.Del)) and _is(node.value, own):
                yield _mangled(owner, node.attr)


def _is(node: ast.expr, name: str | None) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _mangled(owner: str, name: str) -> str:
    """As the compiler has it: `__x` in class C is `_C__x`."""
    return f"_{owner.lstrip('_')}{name}" if name.startswith("__") and not name.endswith("__") else name


def _is_descriptor(cls: type, name: str) -> bool:
    """Whether a class handles an attribute by code of its own, as a property does; a slot holds it plainly."""
    found = inspect.getattr_static(cls, name, None)
    return hasattr(type(found), "__set__") and not inspect.ismemberdescriptor(found)


def _is_scalar(value: object) -> bool:
    return isinstance(value, SCALARS) or (isinstance(value, tuple) and all(map(_is_scalar, value)))

"""`verdict.json` read back into the dataclasses that it was written from. Standard library only.

Keys that a later version may have added are left out; one that is missing, or of another type, is an error.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar

from trainer.audit.verdict import FILE_NAME, Anomaly, Error, Guarantee, PrecisionRow, ProfileRow, Verdict

SCHEMA = 1
PARTS = {"guarantees": Guarantee, "anomalies": Anomaly, "precision": PrecisionRow, "profile": ProfileRow}
Part = TypeVar("Part")


class Unreadable(ValueError):
    """There is no verdict, or it is not one of schema 1; told on one line."""


def read(folder: Path) -> Verdict:
    """The verdict that a run has left in its folder.

    Raises:
        Unreadable: there is none, or it cannot be read.
    """
    path = folder / FILE_NAME
    try:
        return from_json(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        why = "is not there; give a run's folder" if folder.is_dir() else f"is not there: {folder} is no folder"
        raise Unreadable(f"{path} {why}.") from None
    except OSError as problem:
        raise Unreadable(f"{path} cannot be read: {problem.strerror or problem}.") from None
    except ValueError as problem:
        raise Unreadable(f"{path} cannot be read: {' '.join(str(problem).split())}.") from None


def from_json(found: object) -> Verdict:
    """A verdict from what `json.loads` made of one.

    Raises:
        Unreadable: it is not one of schema 1.
    """
    if not isinstance(found, dict):
        raise Unreadable("it holds no verdict")
    if found.get("schema") != SCHEMA:
        raise Unreadable(f"its schema is {found.get('schema')!r}; this version reads {SCHEMA}")
    fields = dict(found)
    for name, kind in PARTS.items():
        listed = fields.get(name, [])
        if not isinstance(listed, list):
            raise Unreadable(f"{name} is {listed!r}, not a list")
        fields[name] = [part(kind, each) for each in listed]
    fields["error"] = None if found.get("error") is None else part(Error, found["error"])
    return part(Verdict, fields)


def part(kind: type[Part], found: object) -> Part:
    """One of a verdict's dataclasses from a mapping of its fields.

    Raises:
        Unreadable: a field is missing, or of another type.
    """
    name = kind.__name__.lower()
    if not isinstance(found, dict):
        raise Unreadable(f"{name} is {found!r}, not a mapping")
    values: dict[str, Any] = {}
    hints = typing.get_type_hints(kind)
    for each in dataclasses.fields(kind):  # type: ignore[arg-type]
        if each.name not in found:
            if each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING:
                raise Unreadable(f"{name} has no '{each.name}'")
            continue
        value, hint = found[each.name], hints[each.name]
        if isinstance(hint, type) and dataclasses.is_dataclass(hint) and not isinstance(value, hint):
            value = part(hint, value)
        elif not _fits(value, hint):
            raise Unreadable(f"{name}.{each.name} is {value!r}")
        values[each.name] = value
    return kind(**values)


def _fits(value: object, hint: Any) -> bool:
    """Whether a value is of a type, as far as JSON can tell: numbers may be whole, and keys are text."""
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return value in inside
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, each) for each in inside)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(each, inside[1]) for each in value.values())
    if origin is list:
        return isinstance(value, list) and all(_fits(each, inside[0]) for each in value)
    if hint in (int, float):
        return isinstance(value, int if hint is int else (int, float)) and not isinstance(value, bool)
    return isinstance(value, hint)

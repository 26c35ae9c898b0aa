"""Every dotted key of the configuration with its type, default and description, read off `trainer/config.py`.

For `--help` and for the messages about mistakes, so that neither can disagree with the schema. Standard library only.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from typing import Any

from trainer import config
from trainer.config import OPTIONS, Config, nearest

FITS = {
    int: "a whole number",
    float: "a number",
    str: "a word",
    list[int]: "a list of whole numbers in brackets, as in [64,32]",
    dict[str, Any]: "keys and values in braces, as in {width:64}",
    list[str]: "a list of words in brackets, as in [no_lost_updates]",
}


@dataclasses.dataclass(frozen=True)
class Key:
    """One key.

    Attributes:
        owners: the options that have it, as in `model=cnn`; empty where it is always there.
    """

    name: str
    type: Any
    default: str
    text: str
    owners: tuple[str, ...] = ()

    @property
    def fits(self) -> str:
        return FITS.get(self.type, "another kind of value")


def keys() -> dict[str, Key]:
    """All keys that hold a value, by dotted name, in the schema's order. The groups' own names are not among them."""
    found: list[Key] = []
    for field in dataclasses.fields(Config):
        if field.name in OPTIONS:
            found += _of_group(field.name)
        elif dataclasses.is_dataclass(default := _default(field)):
            found += [_key(type(default), each, f"{field.name}.") for each in dataclasses.fields(default)]
        else:
            found.append(_key(Config, field, ""))
    return {key.name: key for key in found}


def unknown(name: str) -> str:
    """What to say about a key that is not there: the option that has it, or the nearest key that exists."""
    known = keys()
    if name in known and (owners := known[name].owners):
        return f"{name} is a key of {' and '.join(owners)} only. Add {owners[0]}, or leave the key out."
    names = [*known, *{key.partition(".")[0]: None for key in known}, *OPTIONS, "experiment"]
    return f"{name} is not a key of the configuration.{nearest(name, names)} --help lists the keys."


def _of_group(group: str) -> list[Key]:
    """The keys of a group's options, one `Key` for those that several options have."""
    same: dict[str, dict[str, Key]] = {}
    for option, node in OPTIONS[group].items():
        for field in dataclasses.fields(node):
            if field.name != "name":
                same.setdefault(field.name, {})[option] = _key(type(node), field, f"{group}.")
    return [_joined(group, each) for each in same.values()]


def _joined(group: str, by_option: dict[str, Key]) -> Key:
    first = next(iter(by_option.values()))
    defaults = {key.default for key in by_option.values()}
    return dataclasses.replace(
        first,
        default=first.default
        if len(defaults) == 1
        else ", ".join(f"{key.default} ({option})" for option, key in by_option.items()),
        text=next((key.text for key in by_option.values() if key.text), ""),
        owners=() if len(by_option) == len(OPTIONS[group]) else tuple(f"{group}={option}" for option in by_option),
    )


def _key(owner: type, field: dataclasses.Field[Any], prefix: str) -> Key:
    hints = typing.get_type_hints(owner)
    default = str(_default(field)).replace(" ", "") or "''"
    return Key(prefix + field.name, hints[field.name], default, _comment(owner, field.name))


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _comment(owner: type, name: str) -> str:
    """The comment that stands above a field: its unit and range."""
    above = re.search(rf"((?:^    #.*\n)+)    {name}:", _source(owner), re.MULTILINE)
    return "" if above is None else " ".join(line.strip().lstrip("# ") for line in above[1].splitlines())


def _source(owner: type) -> str:
    whole = inspect.getsource(config)
    start = whole.index(f"class {owner.__name__}:")
    end = whole.find("\nclass ", start)
    return whole[start : end if end > 0 else None]

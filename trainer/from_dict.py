"""A `Config` from plain dictionaries: what Hydra composed, a parent sent its child, or a run left in `.hydra/`."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from trainer.config import OPTIONS, Config, ConfigError, nearest
from trainer.keys import unknown


def from_dict(fields: Mapping[str, Any]) -> Config:
    """Rebuild a config from `dataclasses.asdict` of it.

    `model`, `data` and `optimizer` become the dataclass of the option that their `name` says.

    Raises:
        ConfigError: a key or an option that there is none of. Types are not checked: OmegaConf has done that.
    """
    hints = typing.get_type_hints(Config)
    parts: dict[str, Any] = {}
    for name, value in fields.items():
        if name not in hints:
            raise ConfigError(unknown(name))
        if hints[name] is Any:
            parts[name] = _build(_option(name, value), value, name)
        elif dataclasses.is_dataclass(hints[name]):
            parts[name] = _build(typing.cast("type", hints[name]), value, name)
        else:
            parts[name] = value
    return Config(**parts)


def _option(group: str, value: Any) -> type:
    """The dataclass of the option that a group's `name` says."""
    known = OPTIONS[group]
    name = value.get("name") if isinstance(value, Mapping) else value
    if name not in known:
        raise ConfigError(f"{group} must be one of {', '.join(known)}; got '{name}'.{nearest(str(name), known)}")
    return type(known[name])


def _build(kind: type, value: Any, group: str) -> Any:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{group} must be a group of keys; got '{value}'. --help lists them.")
    fields = {field.name for field in dataclasses.fields(kind)}
    for name in value:
        if name not in fields:
            raise ConfigError(unknown(f"{group}.{name}"))
    return kind(**value)

"""A `Config` from plain dictionaries: what Hydra composed, a parent sent its child, or a run left in `.hydra/`."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from trainer.config import OPTIONS, Config, ConfigError, nearest
from trainer.keys import FITS, unknown


def from_dict(fields: Mapping[str, Any]) -> Config:
    """Rebuild a config from `dataclasses.asdict` of it.

    `model`, `data` and `optimizer` become the dataclass of the option that their `name` says.

    Raises:
        ConfigError: a key or an option that there is none of, or a list of something else than its key takes. Other
            types are not checked: OmegaConf has done that.
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
            _check_list(name, hints[name], value)
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
    hints = typing.get_type_hints(kind)
    for name, each in value.items():
        if name not in hints:
            raise ConfigError(unknown(f"{group}.{name}"))
        _check_list(f"{group}.{name}", hints[name], each)
    return kind(**value)


def _check_list(key: str, hint: Any, value: Any) -> None:
    """OmegaConf lets lists and mappings into lists."""
    if typing.get_origin(hint) is list and any(isinstance(each, list | dict) for each in value):
        raise ConfigError(f"{key} takes {FITS[hint]}; got '{value}'.")

"""Parts that users bring: `_target_` names a function or class, found from the working directory."""

from __future__ import annotations

import importlib
import importlib.machinery
import os
import sys
from typing import Any

from trainer.config import ConfigError, Custom, nearest


def check(group: str, custom: Custom) -> None:
    """Hold a `_target_` to naming a module that exists, without importing it.

    Raises:
        ConfigError: it names none.
    """
    key, (module, _) = f"{group}._target_", _parts(group, custom)
    top = module.partition(".")[0]
    if importlib.machinery.PathFinder.find_spec(top, [os.getcwd(), *sys.path]) is None:
        raise ConfigError(
            f"{key}={custom._target_} cannot be found: no module '{top}' in the working directory or the environment."
        )


def bring(group: str, custom: Custom) -> Any:
    """Import what a `_target_` names.

    Raises:
        ConfigError: the module cannot be imported, or has nothing of that name.
    """
    key, (module_name, name) = f"{group}._target_", _parts(group, custom)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(f"{key}={custom._target_} cannot be imported: {error}.") from error
    try:
        return getattr(module, name)
    except AttributeError:
        hint = nearest(name, vars(module))
        raise ConfigError(f"{key}={custom._target_} cannot be found: {module_name} has no '{name}'.{hint}") from None


def _parts(group: str, custom: Custom) -> tuple[str, str]:
    module, dot, name = custom._target_.rpartition(".")
    if not dot or not module or not name:
        raise ConfigError(f"{group}._target_ takes MODULE.NAME, as in my_parts.build; got '{custom._target_}'.")
    return module, name

"""One line for whatever Hydra and OmegaConf refuse: the key, what came, what fits, what to do."""

from __future__ import annotations

import re
from pathlib import Path

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from trainer import launchers
from trainer.config import OPTIONS, ConfigError, nearest
from trainer.keys import keys, unknown

# What composing or reading a configuration raises for a user's mistake. Hydra uses ValueError and OSError for some.
MISTAKES = (ConfigError, HydraException, OmegaConfBaseException, ValueError, OSError)


def line(error: BaseException) -> str:
    """The mistake on one line."""
    return " ".join(_told(error).split())


def _told(error: BaseException) -> str:
    if isinstance(error, ConfigError):
        return str(error)
    if isinstance(error, MissingConfigException):
        return _missing_option(error)
    if isinstance(error, OverrideParseException):
        problem = "there is no '=' in it" if "missing EQUAL" in str(error) else _first_line(error)
        return f"{error.override} cannot be read: {problem}. Write KEY=VALUE, with quotes round special characters."
    text = str(error)
    if found := re.match(r"Could not override '(.+?)'", text):
        return _unknown_key(found[1])
    if found := re.match(r"Multiple values for (\S+?)\.", text):
        return f"+{found[1]}: {found[1]} has a value already. Write {found[1]}=VALUE, without the plus."
    if found := re.match(r"Ambiguous value for argument '([^=]+)=(.*)'", text):
        key, value = found.groups()
        return f"{key}={value} is a sweep: add -m to run every value, or write {key}=[{value}] for a list."
    if found := re.match(r"Error merging override ([^=]+)=(.*)", text):
        return _wrong_value(found[1].lstrip("+"), found[2], error.__cause__ or error)
    if found := re.match(r"Error merging override ~(.+)", text):
        return f"~{found[1]}: keys of the configuration cannot be taken out. Set a value with {found[1]}=VALUE."
    if found := re.match(r"You must specify '(.+?)'", text):
        return _nothing(found[1])
    if found := re.match(r"In '(\w+)/\w+': ValidationError", text):
        return f"{found[1]} takes one option; got several. To run each, add -m and write {found[1]}=A,B."
    if found := re.match(r"Config group override must be a string or a list. Got (\w+)", text):
        came = {"NoneType": "null"}.get(found[1], f"a value of type {found[1]}")
        return f"a group takes the name of one of its options, as in model=mlp; got {came}. --help lists them."
    key = getattr(error, "full_key", None)
    if key and "missing mandatory value" in text.lower():
        return _nothing(key)
    return f"{key}: {_first_line(error)}." if key else f"{_first_line(error)}."


def _first_line(error: BaseException) -> str:
    """The first line of a message that is no preface to the next."""
    lines = [each.strip() for each in str(error).splitlines() if each.strip()] or [type(error).__name__]
    whole = lines[1] if len(lines) > 1 and lines[0].startswith("Error parsing override") else lines[0]
    return whole.rstrip(".")


def _missing_option(error: MissingConfigException) -> str:
    # Where nothing is named there is no group either.
    group, _, option = (error.missing_cfg_file or "").rpartition("/")
    if not group:
        return f"--config-name={option} names no file. Leave it out: the configuration is config.yaml."
    if group == launchers.GROUP and option.removesuffix(launchers.PLUGIN_SUFFIX) in launchers.EXTRAS:
        return launchers.not_installed(option)
    known = [Path(each).stem for each in error.options or () if not each.endswith(launchers.PLUGIN_SUFFIX)]
    if not known:
        return f"{group} is not a group of options. --help lists the groups."
    return f"{group} must be one of {', '.join(known)}; got '{option}'.{nearest(option, known)}"


def _nothing(key: str) -> str:
    if key in OPTIONS:
        return f"{key} must be one of {', '.join(OPTIONS[key])}; got nothing."
    fits = known.fits if (known := keys().get(key)) else "a value"
    return f"{key} takes {fits}; got nothing."


def _unknown_key(key: str) -> str:
    key = key.lstrip("+~")
    group, at, _ = key.partition("@")
    if at:
        return f"{key}: options have their places here. Write {group}=OPTION."
    if key.startswith("hydra"):
        return f"{key} is not a key of Hydra's own configuration. `--cfg hydra` shows it."
    return unknown(key)


def _wrong_value(key: str, value: str, cause: BaseException) -> str:
    # The cause names the key that exists, where the override goes one deeper (train.steps.x) or into a list.
    named = re.sub(r"\[\d+\]$", "", str(getattr(cause, "full_key", "") or key))
    if known := keys().get(named):
        if named != key:
            return f"{key} is not a key of the configuration: {named} takes {known.fits}. Write {named}=VALUE."
        return f"{key} takes {known.fits}; got '{value}'."
    inside = [each.rpartition(".")[2] for each in keys() if each.startswith(f"{named}.")]
    if inside:
        return f"{key} is a group of keys; got '{value}'. Set one of them, as in {named}.{inside[0]}=VALUE."
    return f"{key}={value}: {_first_line(cause)}."

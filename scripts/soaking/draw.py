"""Configurations that the rules take, drawn from the schema: a key that is new there is drawn without a change here.

A draw starts from the defaults and changes one thing after another: a group's option, then single keys. What the rules
refuse is taken back, so that ranges and what goes together are theirs, and so are a key's words: a word that none can
be is refused with a list of those that fit.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import re
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from trainer.config import OPTIONS, CompileCache, Config, ConfigError, Custom
from trainer.rules import validate
from trainer.samples import samples

# What keeps a run short and small; else a whole number is drawn up to twice its default and eight.
MOST = {
    "num_replicas": 8,
    "strategy.num_processes": 3,
    "train.steps": 20,
    "train.seed": 2**31 - 1,
    "train.threads_per_replica": 2,
    "model.hidden": 70,
    "model.filters": 20,
    "model.depth": 3,
    "model.width": 48,
    "data.shape": 16,
    "audit.repeat": 3,
    "schedule.orders": 10,
    "schedule.seed": 2**31 - 1,
    "schedule.max_operations": 4000,
    "schedule.chunks": 4,
    "schedule.preemptions": 2,
    "schedule.depth": 5,
    "workload.rounds": 3,
}
# In many orders a run is made many times, and in many more where it has more replicas and steps.
MOST_CONTROLLED = {"num_replicas": 3, "train.steps": 2, "audit.trace_steps": 2}
MOST_MIRRORED_CONTROLLED = {"num_replicas": 2, "train.steps": 1, "schedule.preemptions": 1, "schedule.orders": 4}
# Each step of it is compiled in each replica.
MOST_COMPILED = {"num_replicas": 3, "train.steps": 3}
# Of each process, whose batches the audit takes as one; and where of all gradients one at a time is kept.
MOST_TOGETHER = {"num_replicas": 3}
# A busy machine is no deadlock.
LEAST = {"watchdog.seconds": 60.0, "train.timeout_seconds": 1000.0}
# Of images of 28 x 28 pixels, each attends to all others.
LEAST_PATCH = 4
# Drawn for every run.
ALWAYS = ("num_replicas", "train.steps", "train.seed")
# Of those that draw this key, one in so many keeps it: compiling takes 15 to 40 seconds.
SELDOM = {"train.engine": 20}
# Tried more often than their share: MirroredStrategy takes four times as long, small workloads have few keys.
FAVOURED = {"strategy": ("threads",) * 2, "workload": ("train",) * 8, "schedule": ("free",) * 12}
NO_WORD = "no_such_word"
# Parts that a user brings, from scripts/examples.
BROUGHT = {
    "model": ("bring_model.keras_model", "bring_model.torch_module"),
    "data": ("bring_data.two_moons",),
    "update_mode": ("bring_update_mode.TicketLocked", "checked_write.Safe"),
    "workload": ("own_loop.Loop",),
}
# Of which no rule can know that they raise for anything else.
FOR_IMAGES = ("bring_model.torch_module",)


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A configuration.

    Attributes:
        overrides: the same as a user types it.
        raised: what the rules raised, where that was no `ConfigError`.
    """

    config: Config
    overrides: tuple[str, ...]
    raised: str = ""


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A key that holds a value: its dotted name, the object that has it, and its type."""

    name: str
    owner: Any
    field: str
    type: Any

    @property
    def value(self) -> Any:
        return getattr(self.owner, self.field)


class Draw:
    """Draws configurations.

    Args:
        files: for options that read one, as in data=npz: option -> paths. An option without is not drawn.
        kept: groups that stay as they come.
    """

    def __init__(self, files: Mapping[str, tuple[str, ...]], kept: Collection[str] = ()) -> None:
        self.files, self.kept = files, kept
        self.words = vocabulary()

    def drawn(self, seed_: int) -> Drawn:
        """A configuration, the same for the same seed."""
        found: list[Drawn] = []

        @seed(seed_)
        @settings(
            # The first example is always the simplest, and later ones are made of earlier ones.
            max_examples=2,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(st.data())
        def collect(data: st.DataObject) -> None:
            found.append(self.one(data.draw))

        collect()
        return found[-1]

    def one(self, draw: Callable[[Any], Any]) -> Drawn:
        config, chosen = Config(), {name: getattr(Config(), name) for name in OPTIONS}
        _shorten(config)
        first = [group for group in ("strategy", "workload") if group in OPTIONS]
        rest = draw(st.permutations([group for group in OPTIONS if group not in first]))
        try:
            for group in (each for each in (*first, *rest) if each not in self.kept):
                config = self._option(draw, config, chosen, group)
            names = [leaf.name for leaf in leaves(config) if leaf.name not in ALWAYS]
            for name in (*ALWAYS, *draw(st.lists(st.sampled_from(names), min_size=2, max_size=24, unique=True))):
                if name not in SELDOM or draw(st.integers(1, SELDOM[name])) == 1:
                    config = self._value(draw, config, name)
        except Surprise as surprise:
            return Drawn(surprise.config, overrides(surprise.config, chosen), str(surprise))
        return Drawn(config, overrides(config, chosen))

    def _option(self, draw: Callable[[Any], Any], config: Config, chosen: dict[str, Any], group: str) -> Config:
        name = draw(st.sampled_from([*FAVOURED.get(group, ()), *OPTIONS[group]]))
        option = copy.deepcopy(OPTIONS[group][name])
        changed = copy.deepcopy(config)
        setattr(changed, group, option)
        if isinstance(option, Custom):
            option._target_ = draw(st.sampled_from(BROUGHT[group]))
            if group == "workload":
                changed.update_mode = Custom()
        elif hasattr(option, "path"):
            if name not in self.files:
                return config
            option.path = draw(st.sampled_from(self.files[name]))
        _shorten(changed)
        if not taken(changed):
            return config
        chosen[group] = OPTIONS[group][name]
        if group == "workload" and isinstance(option, Custom):
            chosen["update_mode"] = OPTIONS["update_mode"]["custom"]
        return changed

    def _value(self, draw: Callable[[Any], Any], config: Config, name: str) -> Config:
        changed = copy.deepcopy(config)
        (leaf,) = (each for each in leaves(changed) if each.name == name)
        strategy = self.values(leaf)
        if strategy is None:
            return config
        setattr(leaf.owner, leaf.field, draw(strategy))
        _shorten(changed)
        return changed if taken(changed) else config

    def values(self, leaf: Leaf) -> Any:
        """A strategy for the values of a key; None where only a user can know them."""
        default = leaf.value
        if leaf.type is bool:
            return st.booleans()
        if leaf.type is int:
            return _whole(leaf.name, default)
        if leaf.type is float:
            return _numbers(leaf.name, default)
        if leaf.type == list[int]:
            return st.lists(st.integers(0, MOST.get(leaf.name, 8)), max_size=3)
        if leaf.name == "workload.accounts":
            return st.lists(st.builds("{}:{}".format, st.sampled_from("abcxyz"), st.integers(0, 300)), max_size=4)
        if leaf.name == "workload.transfers":
            sides = st.sampled_from("abcxyz")
            return st.lists(st.builds("{}:{}:{}".format, sides, sides, st.integers(0, 300)), max_size=3)
        if leaf.name not in self.words:
            return None
        one = st.sampled_from(self.words[leaf.name])
        return st.lists(one, max_size=3) if leaf.type == list[str] else one


class Surprise(Exception):
    """The rules raised something else than `ConfigError`."""

    def __init__(self, config: Config, error: Exception) -> None:
        super().__init__(f"{type(error).__name__}: {error}")
        self.config = config


def vocabulary() -> dict[str, list[str]]:
    """Key -> the words that it takes, off the refusal of one that it does not. Keys that take any are left out."""
    found: dict[str, list[str]] = {}
    for group, options in OPTIONS.items():
        for option in options.values():
            plain = dataclasses.replace(Config(), **{group: option})
            for name in [leaf.name for leaf in leaves(plain) if leaf.type in (str, list[str])]:
                if name not in found and (words := _listed(plain, name)):
                    found[name] = words
    return found


def _listed(plain: Config, name: str) -> list[str]:
    asked = copy.deepcopy(plain)
    (leaf,) = (each for each in leaves(asked) if each.name == name)
    setattr(leaf.owner, leaf.field, [NO_WORD] if leaf.type == list[str] else NO_WORD)
    try:
        validate(asked)
    except ConfigError as error:
        listed = re.match(rf"{re.escape(name)} must be one of (.+?); got '{NO_WORD}'", str(error))
        return listed[1].split(", ") if listed else []
    return []


def taken(config: Config) -> bool:
    """Whether the rules take a configuration.

    Raises:
        Surprise: they break over it.
    """
    try:
        validate(config)
    except ConfigError:
        return False
    except Exception as error:
        raise Surprise(config, error) from error
    return _images(config) or getattr(config.model, "_target_", "") not in FOR_IMAGES


def _images(config: Config) -> bool:
    known = samples(config.data)
    return known is not None and len(known.shape) == 3


def leaves(config: Config) -> Iterator[Leaf]:
    """Every key that this configuration has a value in; a group's choice is none."""
    for field in dataclasses.fields(Config):
        part = getattr(config, field.name)
        if not dataclasses.is_dataclass(part):
            yield Leaf(field.name, config, field.name, _hints(Config)[field.name])
            continue
        hints = _hints(type(part))
        for each in dataclasses.fields(part):
            if each.name not in ("name", "_target_", "arguments"):
                yield Leaf(f"{field.name}.{each.name}", part, each.name, hints[each.name])


@functools.cache
def _hints(owner: type) -> dict[str, Any]:
    return typing.get_type_hints(owner)


def overrides(config: Config, chosen: Mapping[str, Any]) -> tuple[str, ...]:
    """What differs from the defaults, as a user types it.

    Args:
        chosen: group -> the option as it comes.
    """
    found = []
    for group, option in chosen.items():
        part = getattr(config, group)
        if isinstance(part, Custom):
            # A loop of the user's own chooses the update mode by itself.
            found += [f"{group}._target_={part._target_}"] if part._target_ else []
        elif option is not getattr(Config(), group) and option != getattr(Config(), group):
            found.append(f"{group}={_name_of(group, option)}")
    plain = dataclasses.replace(Config(), **chosen)
    as_they_come = {leaf.name: leaf.value for leaf in leaves(plain)}
    for leaf in leaves(config):
        if leaf.value != as_they_come[leaf.name]:
            found.append(f"{leaf.name}={written(leaf.value)}")
    return tuple(found)


def written(value: Any) -> str:
    """A value as Hydra reads it."""
    if isinstance(value, list):
        return f"[{','.join(map(written, value))}]"
    if isinstance(value, str) and not re.fullmatch(r"[A-Za-z_./][\w./-]*", value):
        return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    return repr(value).lower() if isinstance(value, bool) else str(value)


def _name_of(group: str, option: Any) -> str:
    return next(name for name, each in OPTIONS[group].items() if each == option)


def _shorten(config: Config) -> None:
    """Hold a configuration to sizes that are soon done with."""
    most = dict(MOST)
    if config.controlled:
        most |= MOST_CONTROLLED
        most |= MOST_MIRRORED_CONTROLLED if config.strategy.name == "mirrored" else {}
    if isinstance(config.workload, CompileCache):
        most |= MOST_COMPILED
    if hasattr(config.strategy, "num_processes") or config.update_mode.name == "optimistic":
        most |= MOST_TOGETHER
    if config.data.name == "mnist" and hasattr(config.model, "patch"):
        config.model.patch = max(config.model.patch, LEAST_PATCH)
    for leaf in leaves(config):
        if leaf.type is int and leaf.name in most:
            setattr(leaf.owner, leaf.field, min(leaf.value, most[leaf.name]))
        elif leaf.name in LEAST and leaf.value:
            setattr(leaf.owner, leaf.field, max(leaf.value, LEAST[leaf.name]))


def _whole(name: str, default: int) -> Any:
    most = MOST.get(name, 2 * abs(default) + 8)
    few = sorted({0, 1, 2, 3, default // 2, default})
    return st.sampled_from(few) | st.integers(0, most)


def _numbers(name: str, default: float) -> Any:
    few = [0.0, 0.25, 0.5, 1.0, default, default / 2, 2.0 * default, 1e-8, 1e6, 1e300]
    return st.sampled_from(few) | st.floats(0, 1, allow_subnormal=False)

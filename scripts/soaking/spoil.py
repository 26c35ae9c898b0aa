"""Commands with a mistake in them, made from a configuration that the rules take, by whatever a user could do to it."""

from __future__ import annotations

import copy
import functools
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from soaking.draw import Draw, Drawn, Leaf, leaves, taken, written
from trainer.config import OPTIONS
from trainer.keys import keys

# What no key of a type can be.
WRONG: dict[Any, tuple[str, ...]] = {
    int: ("many", "1.5", "[1,2]", "{a:1}", "null", "''", "1e3", "0x10", "nan", "--", "\u0661\u0662x"),
    float: ("much", "[0.1]", "{a:1}", "null", "''", "1,5", "0.1.2"),
    bool: ("perhaps", "[true]", "2.5", "null"),
    str: ("[a]", "{a:1}", "null", "nothing_like_it", "''"),
    list[int]: ("[a]", "7", "word", "[1.5]", "[[1]]", "[null]", "{a:1}", "null"),
    list[str]: ("word", "7", "[nothing_like_it]", "[[a]]", "[null]", "{a:1}", "null"),
}
# What a key of a type can be, which few keys take.
ODD: dict[Any, tuple[str, ...]] = {
    int: ("-1", "0", "-0", "99999999999999999999", "1000000", "-99999999999999999999", "2147483648", "1_0", "+1"),
    float: ("-1.0", "0", "inf", "-inf", "nan", "1e400", "1e-400", "1e308", "-0.0", "99999999999999999999"),
    bool: ("true", "false"),
    str: ("?", "'a b'", "'ü'", "'\\n'", "'\U0001f600'", "a" * 300, "'${train.steps}'", "'%s'", "'../..'", "/dev/null"),
    list[int]: ("[]", "[0]", "[-1]", "[99999999999999999999]", "[1,1,1,1,1,1,1,1,1,1]"),
    list[str]: ("[]", "['']", "['ü']", "['a:b:c']", "['x:-1','y:1']", "['x:1','x:1']", "[x:99999999999999999999,y:1]"),
}
# No option, no key, no value; or flags that there are not, or that do not go together.
NONSENSE = (
    *(
        "",
        "=",
        "==",
        "a",
        "a=",
        "=a",
        "a=b=c",
        "+",
        "~",
        "++",
        "+=1",
        "~=",
        "[",
        "]",
        "{",
        "}",
        "'",
        '"',
        "\\",
        "$",
        "${",
    ),
    *("train", "train=", "train=1", "train=[1", "train.=1", ".steps=1", "train..steps=1", "train.steps.x=1"),
    *("train.steps=${nothing}", "train.steps=${train.steps}", "train.steps=???", "train.steps=${oc.env:NO_SUCH}"),
    *("+train.steps=3", "++train.nothing=3", "~train.steps", "~model", "model=", "model=null", "model=[mlp,cnn]"),
    *("model=mlp,cnn", "train.steps=1,2", "model@data=mlp", "model/mlp=1", "/model=mlp", "model=../model/mlp"),
    *("--nothing", "--config-name=nothing", "--config-path=/nowhere", "--config-dir=/nowhere", "--info=nothing"),
    *("-c", "--cfg", "--cfg=nothing", "--package=_global_", "--resolve", "-mm", "--experimental-rerun=/nowhere"),
    *("experiment=nothing", "experiment=glob(nothing*)", "hydra=1", "hydra/launcher=nothing", "hydra.nothing=1"),
    *("hydra.run.dir=/proc/nowhere", "hydra.run.dir=''", "hydra.run.dir=[]", "hydra.run.dir=null", "hydra.run.dir=??"),
    *(
        "model._target_=nothing.at_all",
        "model._target_=nothing",
        "data._target_=''",
        "update_mode._target_=os",
        "model._target_=.",
    ),
    *(
        "data=npz data.path=/dev/null",
        "data=npz data.path=/",
        "data=npz",
        "data=mnist data.path=/nowhere",
        "model=custom",
    ),
    *("schedule=replay", "schedule=replay schedule.token=x", "schedule=replay schedule.token=''"),
    *(
        "\udcff\udcfe",
        "train.steps=\udcff",
        "model=\udc80",
        "\n",
        "train.steps=1\n2",
        "train.steps=\x1b[31m",
        "x" * 20000,
    ),
    *(
        "train.steps=" + "9" * 5000,
        "model.hidden=[" + "1," * 2000 + "]",
        "model.hidden=" + "[" * 200,
        "ключ=1",
        "train.stëps=1",
    ),
)
# What Hydra takes commas inside of for one value.
BRACKETED = re.compile(r"\[.*\]|\{.*\}|\(.*\)|'.*'|\".*\"")


@dataclass(frozen=True)
class Spoilt:
    """A command's arguments.

    Attributes:
        how: what was done to it.
        refused: whether it must be refused; else it may be taken, and then there is nothing to say about it.
    """

    arguments: tuple[str, ...]
    how: str
    refused: bool


def spoilt(draw: Draw, one: Drawn, other: Drawn, chance: random.Random) -> Spoilt:
    """A configuration with a mistake in it.

    Args:
        other: another one, for what contradicts it.
    """
    ways: tuple[Callable[[], Spoilt], ...] = (
        lambda: _wrong_type(one, chance),
        lambda: _odd_value(one, chance),
        lambda: _other_value(one, chance),
        lambda: _misspelt_key(one, chance),
        lambda: _misspelt_word(draw, one, chance),
        lambda: _key_of_another(one, chance),
        lambda: _contradiction(one, other, chance),
        lambda: _nonsense(one, chance),
    )
    found = chance.choice(ways)()
    # Several runs are told of one by one.
    if chance.random() < 0.1 and not any("," in BRACKETED.sub("", each) for each in found.arguments):
        return Spoilt(("-m", *found.arguments), f"{found.how}, in a sweep", False)
    return found


def _wrong_type(one: Drawn, chance: random.Random) -> Spoilt:
    leaf = _leaf(one, chance)
    value = chance.choice(WRONG[leaf.type])
    # A word may be any where the key is a path or the like.
    sure = leaf.type is not str and value not in ("1e3", "nan", "0x10") and not value.startswith("''")
    return Spoilt((*one.overrides, f"{leaf.name}={value}"), f"{value} for {leaf.type}", sure)


def _odd_value(one: Drawn, chance: random.Random) -> Spoilt:
    leaf = _leaf(one, chance)
    value = chance.choice(ODD[leaf.type])
    return Spoilt((*one.overrides, f"{leaf.name}={value}"), f"{value} for {leaf.type}", False)


def _other_value(one: Drawn, chance: random.Random) -> Spoilt:
    """A number that the rules refuse, if one is hit on."""
    numbers = [leaf for leaf in leaves(one.config) if leaf.type in (int, float)]
    leaf = chance.choice(numbers)
    value = leaf.type(chance.choice((-1, 0, 1, 2, 64, 65, 2**24, 2**31, 10**12)) * chance.choice((1, 1, -1)))
    changed = copy.deepcopy(one.config)
    (own,) = (each for each in leaves(changed) if each.name == leaf.name)
    setattr(own.owner, own.field, value)
    return Spoilt((*one.overrides, f"{leaf.name}={written(value)}"), "a number out of range", not taken(changed))


def _misspelt_key(one: Drawn, chance: random.Random) -> Spoilt:
    name = _misspelt(chance.choice([*_keys(), *OPTIONS]), chance)
    sure = name not in _keys() and name not in OPTIONS and not name.startswith(("hydra", "+", "~"))
    return Spoilt((*one.overrides, f"{name}=1"), "a key that there is not", sure)


def _misspelt_word(draw: Draw, one: Drawn, chance: random.Random) -> Spoilt:
    words = {group: list(options) for group, options in OPTIONS.items()} | {
        name: words for name, words in draw.words.items() if name in {leaf.name for leaf in leaves(one.config)}
    }
    key = chance.choice(sorted(words))
    word = _misspelt(chance.choice(words[key]), chance)
    value = f"[{word}]" if key in ("require", "workload.dtypes") else word
    return Spoilt((*one.overrides, f"{key}={value}"), "a word that there is not", word not in words[key] and bool(word))


def _key_of_another(one: Drawn, chance: random.Random) -> Spoilt:
    here = {leaf.name for leaf in leaves(one.config)}
    others = sorted(name for name in set(_keys()) - here if not name.endswith(("_target_", ".arguments")))
    return Spoilt((*one.overrides, f"{chance.choice(others)}=1"), "a key of another option", True)


def _contradiction(one: Drawn, other: Drawn, chance: random.Random) -> Spoilt:
    mixed = list(dict.fromkeys((*one.overrides, *other.overrides)))
    return Spoilt(tuple(chance.sample(mixed, chance.randint(1, len(mixed)))), "two configurations in one", False)


def _nonsense(one: Drawn, chance: random.Random) -> Spoilt:
    if chance.random() < 0.3:
        alphabet = "abc=.,[]{}()'\"\\$~+-@/:#!? \t09é"
        words = ["".join(chance.choices(alphabet, k=chance.randint(1, 12)))]
    else:
        words = chance.choice(NONSENSE).split(" ")
    before = one.overrides if chance.random() < 0.5 else ()
    return Spoilt((*before, *words), "nonsense", False)


@functools.cache
def _keys() -> dict[str, None]:
    return dict.fromkeys(keys())


def _leaf(one: Drawn, chance: random.Random) -> Leaf:
    return chance.choice([leaf for leaf in leaves(one.config) if leaf.type in WRONG])


def _misspelt(word: str, chance: random.Random) -> str:
    at = chance.randrange(len(word))
    return chance.choice(
        (
            word[:at] + word[at + 1 :],
            word[:at] + word[at] + word[at:],
            word[:at] + chance.choice("abcdefghijklmnopqrstuvwxyz_") + word[at + 1 :],
            word[:at] + word[at + 1 : at + 2] + word[at] + word[at + 2 :],
            word.upper(),
        )
    )

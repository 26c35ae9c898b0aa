"""Ids of compiled steps: which collide between processes and threads, which are found again, by the same bodies."""

from __future__ import annotations

import itertools
import json
import os
import random
import secrets
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest

from trainer.schedule.locks import modelled
from trainer.schedule.order import Abandoned, Order
from trainer.schedule.search import ORDERS, Search
from trainer.schedule.turnstile import Turnstile
from trainer.state.compile_ids import COMPILE_IDS, DEFAULT_BITS, CompileIds, RandomOffset

ROOT = Path(__file__).parents[1]
WAIT = 30.0
MECHANISMS = tuple(COMPILE_IDS)


class Met(NamedTuple):
    """Pairs of ids that two processes gave.

    Attributes:
        collided: the same for two steps.
        found: the same for a step that both have.
        shared: steps that both have.
    """

    collided: int
    found: int
    shared: int


def siblings(start: str, mechanism: str, num_siblings: int = 2, bits: int = DEFAULT_BITS) -> list[dict[str, str]]:
    """The ids that each sibling gave, by content."""
    ended = subprocess.run(
        [sys.executable, ROOT / "tests" / "siblings.py", start, mechanism, str(bits), str(num_siblings)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=True,
    )
    found: list[dict[str, str]] = json.loads(ended.stdout)
    return found


def met(found: list[dict[str, str]]) -> Met:
    collided = again = shared = 0
    for one, other in itertools.combinations(found, 2):
        for content, id in one.items():
            collided += sum(id == each and content != another for another, each in other.items())
            again += other.get(content) == id
            shared += content in other
    return Met(collided, again, shared)


# 3 siblings of 3 steps each: 3 pairs of siblings, and in each pair one step that both have. The first asks for it last,
# the others first, so that between those two it has the same number.
@pytest.mark.parametrize(
    ("start", "mechanism", "expected"),
    [
        ("fork", "content", Met(0, 3, 3)),
        ("fork", "uuid", Met(0, 0, 3)),
        ("fork", "random_offset", Met(0, 0, 3)),
        ("fork", "counter", Met(8, 1, 3)),
        # Without the hook its start is copied as the counter is.
        ("fork", "hookless", Met(8, 1, 3)),
        # Every process counts from 0, so the counter does not even need to be copied.
        ("spawn", "content", Met(0, 3, 3)),
        ("spawn", "uuid", Met(0, 0, 3)),
        ("spawn", "random_offset", Met(0, 0, 3)),
        ("spawn", "counter", Met(8, 1, 3)),
        ("spawn", "hookless", Met(0, 0, 3)),
        # What was named before the fork keeps its name.
        *(("compile_then_fork", mechanism, Met(0, 3, 3)) for mechanism in (*MECHANISMS, "hookless")),
    ],
)
def test_which_ids_of_siblings_collide_and_which_are_found_again(start: str, mechanism: str, expected: Met) -> None:
    assert met(siblings(start, mechanism, 3)) == expected


@pytest.mark.parametrize(("mechanism", "collided"), [("content", 0), ("uuid", 0), ("random_offset", 0), ("counter", 3)])
def test_a_step_that_is_first_named_after_the_fork_is_not_saved_by_those_named_before(
    mechanism: str, collided: int
) -> None:
    before = COMPILE_IDS[mechanism](DEFAULT_BITS)
    before.id_of("step", "known to all")
    assert met([child_names(before, f"{own}") for own in range(3)]) == Met(collided, 3, 3)


def child_names(ids: CompileIds, content: str) -> dict[str, str]:
    """What a forked child calls a step that is known already, and one of its own."""
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(into, json.dumps({each: ids.id_of("step", each) for each in ("known to all", content)}).encode())
        finally:
            os._exit(0)
    os.close(into)
    with os.fdopen(out, "rb") as stream:
        found: dict[str, str] = json.loads(stream.read())
    os.waitpid(child, 0)
    return found


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_a_step_is_asked_for_twice_and_named_once_and_names_are_never_shared_inside_a_thread(mechanism: str) -> None:
    ids = COMPILE_IDS[mechanism](DEFAULT_BITS)
    steps = [(name, f"{content}") for name in ("one", "other") for content in range(50)]
    first = [ids.id_of(*step) for step in steps]
    assert [ids.id_of(*step) for step in steps] == first
    assert len(set(first)) == len(steps)


@pytest.mark.parametrize(("bits", "steps"), [(0, 1), (4, 1), (8, 3), (10, 8), (DEFAULT_BITS, 8)])
def test_random_offsets_collide_as_often_as_arithmetic_says(
    monkeypatch: pytest.MonkeyPatch, bits: int, steps: int
) -> None:
    monkeypatch.setattr(secrets, "randbits", random.Random(bits).getrandbits)
    pairs = 4000
    collisions = 0
    for _ in range(pairs):
        one, other = ({ids.id_of("step", f"{each}") for each in range(steps)} for ids in map(RandomOffset, [bits] * 2))
        collisions += len(one & other)
    mean = steps**2 / 2**bits
    # Each pair of processes collides in a run of ids or not at all: the variance of the overlap of two runs that
    # start anywhere, both of `steps` on a circle of 2**bits.
    overlap = sum((steps - abs(apart)) ** 2 for apart in range(-steps + 1, steps)) / 2**bits
    deviation = (max(0.0, overlap - mean**2) / pairs) ** 0.5
    assert abs(collisions / pairs - mean) <= 4 * deviation
    assert (collisions > 0) == (bits < DEFAULT_BITS)


def orders_in_which(mechanism: str, contents: tuple[str, str]) -> tuple[int, int]:
    """In how many orders two threads that ask at once get one id, and of how many."""
    search = Search()
    while search.unfinished:
        with modelled():
            order = Order(2, search.choose)
            ids = COMPILE_IDS[mechanism](DEFAULT_BITS)
            given: dict[int, str] = {}

            def ask(own: int, ids: CompileIds = ids, given: dict[int, str] = given) -> None:
                given[own] = ids.id_of("step", contents[own])

            try:
                Turnstile(order, WAIT).run([partial(ask, own) for own in range(2)])
            except Abandoned:
                search.cut()
            else:
                search.complete(["one id"] if given[0] == given[1] else [])
    found: Counter[str] = search.found
    return found["one id"], found[ORDERS]


@pytest.mark.parametrize(
    ("mechanism", "expected"), [("content", (0, 1)), ("uuid", (0, 2)), ("random_offset", (4, 6)), ("counter", (4, 6))]
)
def test_two_threads_that_name_two_steps_at_once(mechanism: str, expected: tuple[int, int]) -> None:
    """Reading the counter and raising it are two operations: of the 6 orders of two such pairs, 4 overlap."""
    assert orders_in_which(mechanism, ("one", "other")) == expected


@pytest.mark.parametrize(("mechanism", "expected"), [("content", (1, 1)), ("uuid", (2, 2))])
def test_two_threads_that_name_one_step_at_once_agree(mechanism: str, expected: tuple[int, int]) -> None:
    assert orders_in_which(mechanism, ("same", "same")) == expected

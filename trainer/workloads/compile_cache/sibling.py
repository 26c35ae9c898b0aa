"""One of the processes that compile steps of one name: it looks its steps up, compiles what it misses, and runs them.

A step that was found is believed to be the one that was looked up, as caches do. What it gives is held to the bits of
the step's own body, run operator by operator.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from trainer.cache.store import Store, Wanted
from trainer.engines.script_entry import to_entry, to_script
from trainer.engines.script_source import ScriptError, load
from trainer.state.compile_ids import CompileIds
from trainer.workloads.compile_cache.bodies import VERSIONS, Body, Step, body, compiled, content_of, inputs, step_of
from trainer.workloads.compile_cache.plan import Plan, Ran


class Meeting(Protocol):
    def wait(self, timeout: float | None = None) -> int:
        """Come back when all siblings are here."""


class Found(NamedTuple):
    """What a look-up gave.

    Attributes:
        id: that was looked up.
        content: of what is stored there; "" where nothing is, and then there is no step.
        seconds: that it took to compile.
    """

    id: str
    content: str = ""
    seconds: float = 0.0
    step: Step | None = None


class Cached:
    """Steps through the cache, in one process."""

    def __init__(self, plan: Plan, ids: CompileIds) -> None:
        self._plan, self._ids = plan, ids
        self.store = Store(Path(plan.folder))
        self._inputs = inputs(plan.batch_size, plan.seed)
        self._own: dict[Body, Step] = {}  # compiled in this process

    def find(self, own: Body) -> Found:
        name, content = self._told(own)
        id = self._ids.id_of(name, content)
        entry = self.store.load(id, Wanted(name, content, VERSIONS))
        if entry is None:
            return Found(id)
        try:
            return Found(id, entry.content, entry.compile_seconds, load(to_script(entry)))
        except ScriptError as problem:
            self.store.statistics.warnings.append(f"{id} in {self.store.folder}: {problem}; it is compiled again")
            return Found(id)

    def compile(self, own: Body, id: str) -> Step:
        """The step made here, and stored where that is planned."""
        if own not in self._own:
            script, self._own[own], seconds = compiled(own, self._inputs, _symbol(id))
            if self._plan.saves:
                name, content = self._told(own)
                entry = to_entry(script, id=id, name=name, content=content, versions=VERSIONS, compile_seconds=seconds)
                self.store.save(entry)
        return self._own[own]

    def run(self, own: Body, found: Found, saved: float) -> Ran:
        """Run what was found, or the step made here where nothing was."""
        step = found.step or self.compile(own, found.id)
        same = _same_bits(step(*self._inputs), step_of(own)(*self._inputs))
        return Ran(found.id, self._told(own)[1], found.content, same, saved)

    def _told(self, own: Body) -> tuple[str, str]:
        """A step's qualified name, and its content."""
        return step_of(own).__qualname__, content_of(own, self._plan.batch_size)


def run_parent(plan: Plan, ids: CompileIds) -> list[Ran]:
    """Before the fork: find, or compile, what siblings are to have in common."""
    cached = Cached(plan, ids)
    ran = []
    for own in map(body, plan.before_fork()):
        found = cached.find(own)
        ran.append(cached.run(own, found, found.seconds))
    return ran


def run_sibling(own: int, plan: Plan, ids: CompileIds | None, meeting: Meeting) -> tuple[list[Ran], list[str]]:
    """What became of each step of a sibling, and the cache's warnings.

    Siblings meet when all have looked their steps up, and when all have stored what they missed, so that what each
    finds is no matter of luck. Then each looks its own up again, and runs what it finds.

    Args:
        ids: as they were copied by a fork; None where the process makes its own.
    """
    cached = Cached(plan, ids or plan.holder())
    bodies = [body(serial) for serial in plan.serials(own)]
    first = found = [cached.find(each) for each in bodies]
    meeting.wait(plan.seconds)
    if plan.saves:
        for each, missed in zip(bodies, first, strict=True):
            if missed.step is None:
                cached.compile(each, missed.id)
        meeting.wait(plan.seconds)
        found = [cached.find(each) for each in bodies]
    ran = [cached.run(each, now, before.seconds) for each, now, before in zip(bodies, found, first, strict=True)]
    return ran, cached.store.statistics.warnings


def _symbol(id: str) -> str:
    return "step_" + re.sub(r"\W", "_", id.rpartition("$")[2])


def _same_bits(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    """Compared as integers: 0.0 is not -0.0, and a NaN is itself."""
    pairs = zip(one, other, strict=True)
    return all(torch.equal(left.view(torch.int32), right.view(torch.int32)) for left, right in pairs)

"""Captured steps as compiled libraries (`train.engine=inductor`): found on disk, or compiled and kept there.

A step is looked up by the id that `state.compile_ids` gives it, and what is found is believed to be it. For the audit
each is held to what it was looked up for, by the digest of its content, and by what it computes of the example that it
was captured with, against the graph run operator by operator.
"""

from __future__ import annotations

import logging
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from trainer.audit.records import CompiledStep
from trainer.cache.entry import LIBRARY, Entry
from trainer.cache.folder import default_folder
from trainer.cache.library import load_library
from trainer.cache.store import Store, Wanted
from trainer.config import Config
from trainer.doing import doing
from trainer.engines.library import CannotCompile, compile_library, identity
from trainer.engines.library_calls import FORMAT, SYMBOL, CannotLoad, Description, Library
from trainer.holders import mechanism
from trainer.state.compile_ids import COMPILE_IDS, DEFAULT_BITS

log = logging.getLogger(__name__)

VERSIONS = {"torch": torch.__version__, "library": str(FORMAT)}


class Compiler:
    """Gives captured graphs as libraries.

    Attributes:
        steps: those that it has given, for the audit.

    Thread-safety: the main thread's, before replicas start.
    """

    def __init__(self, config: Config) -> None:
        asked = config.train.compile_cache
        self.store = Store(Path(asked) if asked else default_folder())
        self._ids = COMPILE_IDS[mechanism(config, "compile_ids")](DEFAULT_BITS)
        self.steps: list[CompiledStep] = []

    def compile(self, name: str, graph: GraphModule, example: Sequence[Tensor]) -> Callable[..., Any]:
        """A library of the graph, or what is taken for one.

        Args:
            name: the step's qualified name, which others may have, too.

        Raises:
            CannotCompile: there is none to be had.
        """
        content = identity(graph, example)
        id = self._ids.id_of(name, content)
        entry, library = self._found(id, name, content)
        found = entry is not None
        if entry is None or library is None:
            with self.store.alone(id) as waited:
                if waited:
                    entry, library = self._found(id, name, content)
                    found = entry is not None
                if entry is None or library is None:
                    entry = self._compiled(id, name, content, graph, example)
                    library = _loaded(entry)
        log.info("compiled step %s: %s", id, f"found, {entry.compile_seconds:.1f} s saved" if found else "compiled")
        off = _distance(library, graph, example)
        self.steps.append(CompiledStep(id, content, entry.content, found, entry.compile_seconds, off))
        return library

    def _found(self, id: str, name: str, content: str) -> tuple[Entry | None, Library | None]:
        entry = self.store.load(id, Wanted(name, content, VERSIONS, LIBRARY))
        if entry is None:
            return None, None
        try:
            return entry, _loaded(entry)
        except CannotLoad as error:
            log.warning("compiled step %s: %s It is compiled again.", id, error)
            return None, None

    def _compiled(self, id: str, name: str, content: str, graph: GraphModule, example: Sequence[Tensor]) -> Entry:
        began = time.perf_counter()
        log.info("compiled step %s: not found; compiling takes ten seconds to a minute", id)
        with doing("compiling the step, 10 s to a minute"), tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "library.so")
            try:
                compile_library(graph, example, path)
            except OSError as error:
                raise CannotCompile(f"The library cannot be written: {error}") from error
            code = path.read_bytes()
        entry = Entry(id, name, SYMBOL, LIBRARY, content, VERSIONS, time.perf_counter() - began, code)
        self.store.save(entry)
        return entry


def _loaded(entry: Entry) -> Library:
    """
    Raises:
        CannotLoad: it is no library, or none for this process.
    """
    description = Description.of(entry.code)
    description.validate()
    try:
        return Library(load_library(entry), description)
    except OSError as error:
        raise CannotLoad(f"The library cannot be loaded: {error}.") from error


def _distance(library: Library, graph: GraphModule, example: Sequence[Tensor]) -> float:
    """How far what a library computes is from what the graph does, at most of all outputs, relative to the latter."""
    # One that draws from the process-wide generator draws the same both times, and takes nothing from who comes next.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            given = [each.clone() for each in library(*example)]
        except (TypeError, ValueError):
            return math.inf  # it takes other inputs: it is another step
        torch.manual_seed(0)
        own = graph(*example)
    if [each.shape for each in given] != [each.shape for each in own]:
        return math.inf
    return max(map(_relative, given, own), default=0.0)


def _relative(given: Tensor, own: Tensor) -> float:
    norm = float(own.double().norm())
    return float((given.double() - own.double()).norm()) / (norm or 1.0)

"""The process whose children compile: `python -m trainer.workloads.compile_cache.family`, started by the workload only.

It has imported PyTorch and runs none of its operators, so that it can be forked: a process that has run one in several
threads hangs its children. Each generation of siblings has a parent of its own, forked from here, so that a later
generation starts as an earlier one did, and knows nothing of it.

Standard input is a line for each generation, a plan; standard output, a line of what became of it.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import multiprocessing
import sys
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from trainer.state.compile_ids import CompileIds
from trainer.workloads.compile_cache.plan import Plan
from trainer.workloads.compile_cache.sibling import Meeting, run_parent, run_sibling

PARENT = "parent"
# One thread, before PyTorch's first operator: threads do not survive a fork, and whoever waits for them hangs.
NUM_THREADS = 1


def main() -> None:
    import torch

    torch.set_num_threads(NUM_THREADS)
    for line in sys.stdin:
        plan = Plan(**json.loads(line))
        if plan.start != "spawn":
            # Tracing imports it at its first call, which takes longer than all the rest: once, not in every child.
            importlib.import_module("torch._dynamo")
        print(json.dumps(generation(plan)), flush=True)


def generation(plan: Plan) -> dict[str, Any]:
    """What became of one generation: for each sibling, and for a parent that compiled, what it ran; and warnings."""
    with TemporaryDirectory() as folder:
        context = multiprocessing.get_context("fork")
        parent = context.Process(target=_parent, args=(plan, folder))
        parent.start()
        _await([parent], lambda: None)
        found = [json.loads(path.read_text()) for path in sorted(Path(folder).iterdir(), key=lambda path: path.name)]
    return {
        "siblings": [each["ran"] for each in found if each["who"] != PARENT],
        "parent": [ran for each in found if each["who"] == PARENT for ran in each["ran"]],
        "warnings": sorted({line for each in found for line in each["warnings"]}),
    }


def _parent(plan: Plan, folder: str) -> None:
    """Compile what is to be compiled first, and have siblings."""
    context: Any = multiprocessing.get_context("spawn" if plan.start == "spawn" else "fork")
    ids: CompileIds | None = None if plan.start == "spawn" else plan.holder()
    if ids is not None and plan.before_fork():
        _write(folder, PARENT, run_parent(plan, ids), [])
    meeting = context.Barrier(plan.num_siblings)
    siblings = [
        context.Process(target=_sibling, args=(own, dataclasses.asdict(plan), folder, ids, meeting))
        for own in range(plan.num_siblings)
    ]
    for each in siblings:
        each.start()
    _await(siblings, meeting.abort)


def _sibling(own: int, plan: dict[str, Any], folder: str, ids: CompileIds | None, meeting: Meeting) -> None:
    import torch

    torch.set_num_threads(NUM_THREADS)
    _write(folder, f"{own:03}", *run_sibling(own, Plan(**plan), ids, meeting))


def _write(folder: str, who: str, ran: list[Any], warnings: list[str]) -> None:
    (Path(folder) / who).write_text(json.dumps({"who": who, "ran": ran, "warnings": warnings}))


def _await(processes: list[Any], abort: Callable[[], None]) -> None:
    """Wait until all have ended; when one fails, the others need not wait for it any more.

    Raises:
        SystemExit: one has failed.
    """
    left: dict[Any, BaseProcess] = {each.sentinel: each for each in processes}
    while left:
        for sentinel in wait(list(left)):
            process = left.pop(sentinel)
            process.join()
            if process.exitcode:
                abort()
    if any(each.exitcode for each in processes):
        sys.exit(1)


if __name__ == "__main__":
    main()

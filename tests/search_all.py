"""Search the orders of many cases in one process, for `test_defects.py`.

    KERAS_BACKEND=torch python tests/search_all.py CASES.json OUTPUT.json

CASES.json: name -> `overrides`, as on the command line; `require`, guarantees; `holder`, a class of `defects.py` in the
place of a built-in one; `reduced`, whether equivalent orders are to be run once only. Writes, by name, what the search
covered and found.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import defects

from trainer import explore
from trainer.audit.judge import judge
from trainer.explore import Broken
from trainer.one_run import explorer_of
from trainer.proofs import config_of
from trainer.rules import validate
from trainer.schedule.order import Order
from trainer.schedule.search import Search
from trainer.state.first_call import FIRST_CALLS
from trainer.state.precision import PRECISION_HOLDERS
from trainer.strategies import threads


class EveryOrder(Search):
    """A search that runs orders that are equivalent to one another, too: what it finds needs no assumption."""

    def _enter(self, order: Order, able: list[int]) -> None:
        with mock.patch.object(Order, "prefix", property(lambda order: tuple(order.granted))):
            super()._enter(order, able)


@contextmanager
def in_place(holder: str | None) -> Iterator[None]:
    """Have a class of `defects.py` stand where `KEY:CLASS` says."""
    if holder is None:
        yield
        return
    from trainer.workloads import train

    key, _, name = holder.partition(":")
    kind = getattr(defects, name)
    replaced: Any = {
        "precision": lambda: mock.patch.dict(PRECISION_HOLDERS, process_global=kind, thread_local=kind),
        "first_call": lambda: mock.patch.dict(FIRST_CALLS, double_checked=lambda instance: kind()),
        "cursor": lambda: mock.patch.object(threads, "SharedIterator", kind),
        "gradients": lambda: mock.patch.object(threads, "SharedGrad", kind),
        "random_numbers": lambda: mock.patch.object(train, "Generated", kind),
    }
    with replaced[key]():
        yield


def search(case: dict[str, Any]) -> dict[str, Any]:
    config = config_of(("schedule=search", *case["overrides"]))
    validate(config)
    config.require = case["require"]  # of any that there are: a user's own mode claims nothing by itself
    kind: Hashable = Search if case.get("reduced", True) else EveryOrder
    began = time.monotonic()
    with in_place(case.get("holder")), mock.patch.object(explore, "Orders", kind):
        explorer = explorer_of(config, threading.Event())
        try:
            record = explorer.run()
        except Broken as broken:
            return {"error": str(broken.__cause__), "token": broken.token, "counts": {}, "examples": {}}
    explored = explorer.explored
    verdict = judge(config, record, None, {}, (), explored)
    return {
        "error": None,
        "kind": explored.kind,
        "orders": explored.orders,
        "runs": explored.runs,
        "counts": explored.counts,
        "outcomes": explored.outcomes,
        "examples": {
            label: {"token": each.token, "preemptions": each.preemptions, "witness": each.anomaly.witness}
            for label, each in explored.examples.items()
        },
        "statuses": {each.name: each.status for each in verdict.guarantees},
        "evidence": {each.name: each.evidence for each in verdict.guarantees},
        "seconds": time.monotonic() - began,
    }


def main(cases: str, output: str) -> None:
    threads.prepare(2, 1)
    found = {name: search(case) for name, case in json.loads(Path(cases).read_text()).items()}
    Path(output).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:3])

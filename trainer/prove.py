"""Runs searches in processes of their own, one for each strategy, and makes tables of what they found.

    python -m trainer.prove STRATEGY      a list of proofs as JSON on standard input, what was found on standard output

is the inner process; `prove` starts it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from trainer.audit.orders import Explored
from trainer.audit.verdict import Guarantee
from trainer.launch import BACKENDS, ROOT
from trainer.proofs import Proof


class ProofError(Exception):
    """A search did not come to its end."""


@dataclass(frozen=True)
class Cell:
    """What a search found about one guarantee.

    Attributes:
        status: upheld, broken, not_checked or not_applicable.
        orders: those in which it is broken.
        kind, token: of the smallest example.
    """

    status: str
    orders: int = 0
    kind: str = ""
    token: str = ""


@dataclass(frozen=True)
class Proven:
    """What a search found.

    Attributes:
        orders: those covered, `runs` of them made; `preemptions` is the bound, None for all orders.
        cells: by guarantee.
    """

    proof: Proof
    orders: int
    runs: int
    preemptions: int | None
    cells: dict[str, Cell]

    @property
    def told_orders(self) -> str:
        if self.preemptions is None:
            return f"{self.orders:,}"
        return f"{self.orders:,} (at most {self.preemptions} preemption{'' if self.preemptions == 1 else 's'})"


def prove(proofs: Iterable[Proof]) -> list[Proven]:
    """Run every search; those of different strategies at the same time.

    Raises:
        ProofError: one did not come to its end.
    """
    proofs = list(proofs)
    strategies = list(dict.fromkeys(proof.strategy for proof in proofs))
    with ThreadPoolExecutor() as pool:
        own = [[proof for proof in proofs if proof.strategy == strategy] for strategy in strategies]
        found = dict(zip(strategies, map(iter, pool.map(_in_process, strategies, own)), strict=True))
    return [next(found[proof.strategy]) for proof in proofs]


def _in_process(strategy: str, proofs: Sequence[Proof]) -> list[Proven]:
    environment = {
        **os.environ,
        "KERAS_BACKEND": BACKENDS[strategy],
        "PYTHONPATH": str(ROOT),
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-P", "-m", "trainer.prove", strategy],
        input=json.dumps([dataclasses.asdict(proof) for proof in proofs]),
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if done.returncode:
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:]
        raise ProofError(f"the searches under strategy={strategy} broke: {' '.join(last)}")
    found = json.loads(done.stdout.splitlines()[-1])
    return [
        Proven(
            proof, each["orders"], each["runs"], each["preemptions"], {n: Cell(**c) for n, c in each["cells"].items()}
        )
        for proof, each in zip(proofs, found, strict=True)
    ]


# The inner process.


class _Never:
    def is_set(self) -> bool:
        return False


def _search(proof: Proof) -> dict[str, Any]:
    from trainer.audit.judge import judge
    from trainer.one_run import explorer_of
    from trainer.rules import validate

    config = proof.config
    validate(config)
    explorer = explorer_of(config, _Never())
    record = explorer.run()
    explored = explorer.explored
    if explored.kind not in ("all_orders", "bounded"):
        raise ProofError(f"{proof.command} did not come to its end")
    verdict = judge(config, record, None, {"command": proof.command}, (), explored)
    cells = {guarantee.name: _cell(guarantee, explored) for guarantee in verdict.guarantees}
    return {
        "orders": explored.orders,
        "runs": explored.runs,
        "preemptions": explored.preemptions if explored.kind == "bounded" else None,
        "cells": {name: dataclasses.asdict(cell) for name, cell in cells.items()},
    }


def _cell(guarantee: Guarantee, explored: Explored) -> Cell:
    name = guarantee.name
    examples = [(label, each) for label, each in explored.examples.items() if label.partition(" ")[0] == name]
    if examples:
        label, example = min(examples, key=lambda item: item[1].size)
        return Cell("broken", explored.counts[name], label.partition(" ")[2], example.token)
    return Cell("upheld" if guarantee.status in ("upheld", "not_seen") else guarantee.status)


def _proofs(text: str) -> Iterator[Proof]:
    for each in json.loads(text):
        yield Proof(each["name"], each["strategy"], tuple(each["overrides"]), tuple(each["guarantees"]))


def main(strategy_name: str) -> None:
    import importlib

    strategy = importlib.import_module(f"trainer.strategies.{strategy_name}")
    strategy.prepare(2, 1)
    print(json.dumps([_search(proof) for proof in _proofs(sys.stdin.read())]))


if __name__ == "__main__":
    main(sys.argv[1])

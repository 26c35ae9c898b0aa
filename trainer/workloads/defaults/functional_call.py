"""`workload=functional_call`: one torch module for all threads, each of which calls it with its own parameters.

`torch.func.functional_call` looks like a pure function of module, parameters and inputs. It puts the parameters into
the module, calls it, takes out again what it then finds there, and puts back what was there before. While one thread
computes, another changes what it computes with, and outputs are wrong without an error. What is put back or taken out
may be another thread's, and stays: in the module, and in the dictionary that the caller passed.

Two cures run by the same body: a copy of the module for each thread, and Keras' `stateless_call`, which hands the
values to the layers by a thread-local scope and leaves the shared model alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import keras
import torch
from torch import Tensor
from torch.func import functional_call

from trainer.audit.findings import Finding
from trainer.audit.records import ReplicaRecord, RunRecord
from trainer.audit.verdict import Anomaly
from trainer.config import Config
from trainer.strategies.hosting import StopFlag, Watcher
from trainer.workloads.defaults.free_threads import take_steps

FEATURES, HIDDEN, CLASSES = 64, 64, 10

Parameters = dict[str, Tensor]
# f(replica_id): one call with that replica's parameters.
Call = Callable[[int], Tensor]


class Case:
    """A module, a Keras model of the same shape, and what each replica calls them with.

    Attributes:
        module: the one that all threads share; `modules` has a copy of it for each.
        own: the module's own parameters, by name.
        parameters: each replica's, by name; `passed` are the dictionaries that it passes with the shared module.
        x: float32 [batch, features], the same for all.
    """

    def __init__(self, num_replicas: int, batch_size: int, seed: int) -> None:
        torch.manual_seed(seed)
        self.module = torch.nn.Sequential(
            torch.nn.Linear(FEATURES, HIDDEN), torch.nn.ReLU(), torch.nn.Linear(HIDDEN, CLASSES)
        )
        self.own: Parameters = dict(self.module.named_parameters())
        self.parameters: list[Parameters] = [
            {name: torch.randn_like(each) for name, each in self.own.items()} for _ in range(num_replicas)
        ]
        self.passed, self._passed_with_copies = ([dict(each) for each in self.parameters] for _ in range(2))
        self.x = torch.randn(batch_size, FEATURES)
        self.modules = [copy.deepcopy(self.module) for _ in range(num_replicas)]
        layers = [keras.layers.Dense(HIDDEN, activation="relu"), keras.layers.Dense(CLASSES)]
        self._keras = keras.Sequential([keras.Input((FEATURES,)), *layers])
        # Keras keeps a kernel the other way round.
        self._values = [[each.t().contiguous() for each in own.values()] for own in self.parameters]

    def on_shared(self, replica_id: int) -> Tensor:
        output: Tensor = functional_call(self.module, self.passed[replica_id], (self.x,))
        return output

    def on_copy(self, replica_id: int) -> Tensor:
        output: Tensor = functional_call(self.modules[replica_id], self._passed_with_copies[replica_id], (self.x,))
        return output

    def stateless(self, replica_id: int) -> Tensor:
        output: Tensor
        output, _ = self._keras.stateless_call(self._values[replica_id], [], self.x)
        return output

    def misplaced(self) -> list[str]:
        """Parameters that are not where they were before the calls: what is there instead, and where."""
        now_there: Parameters = dict(self.module.named_parameters())
        places = {"the module": (now_there, self.own)}
        for own, (now, was) in enumerate(zip(self.passed, self.parameters, strict=True)):
            places[f"replica {own}'s dictionary"] = now, was
        known = {id(each): "the module's own" for each in self.own.values()}
        for own, parameters in enumerate(self.parameters):
            known |= {id(each): f"replica {own}'s" for each in parameters.values()}
        return [
            f"{known.get(id(now[name]), 'an unknown')} {name} is in {place}"
            for place, (now, was) in places.items()
            for name in was
            if now[name] is not was[name]
        ]


@dataclass
class Outputs:
    """One replica's calls, counted by its own thread.

    Attributes:
        wrong: outputs that are not bitwise those of the same call made alone; `first` is the first.
        others: those of them that another replica's call gives.
    """

    calls: int = 0
    wrong: int = 0
    others: int = 0
    first: str = ""

    def add(self, own: int, step: int, output: Tensor, alone: Sequence[Tensor]) -> None:
        self.calls += 1
        if torch.equal(output, alone[own]):
            return
        whose = [other for other, each in enumerate(alone) if torch.equal(output, each)]
        self.wrong += 1
        self.others += bool(whose)
        if not self.first:
            gives = f"replica {whose[0]}'s parameters give" if whose else "no replica's parameters give"
            self.first = f"replica {own}, step {step}: the call returned what {gives}"


def run(config: Config, record: RunRecord, watcher: Watcher, stop: StopFlag) -> dict[str, Finding]:
    record.engine = "eager"
    case = Case(config.num_replicas, config.train.batch_size, config.train.seed)
    found = count(case.on_shared, case.on_copy, config, record, stop, lambda: watcher.progress(record))
    misplaced = case.misplaced()
    cured = []
    for call in (case.on_copy, case.stateless):
        if stop.is_set():
            return {}
        replicas = [ReplicaRecord.empty(own, record.steps, record.num_replicas) for own in range(record.num_replicas)]
        cured.append(count(call, call, config, replace(record, replicas=replicas), stop))
    return {"invariants_kept": judge(found, misplaced, len(case.own) * (config.num_replicas + 1), *cured)}


def count(
    call: Call,
    alone: Call,
    config: Config,
    record: RunRecord,
    stop: StopFlag,
    report: Callable[[], None] = lambda: None,
    abort: Callable[[], None] = lambda: None,
) -> list[Outputs]:
    """Have every replica make its call, at once with the others, once a step, and hold it to the one made `alone`."""
    with torch.no_grad():
        expected = [alone(own) for own in range(record.num_replicas)]
    found = [Outputs() for _ in expected]

    def take(own: int, step: int) -> None:
        with torch.no_grad():
            found[own].add(own, step, call(own), expected)

    take_steps(take, config, record, stop, report=report, abort=abort)
    return found


def judge(
    found: list[Outputs], misplaced: list[str], places: int, copies: list[Outputs], stateless: list[Outputs]
) -> Finding:
    """Tell what calls on the shared module came to, and beside it what the cures came to."""
    calls, wrong = sum(each.calls for each in found), sum(each.wrong for each in found)
    cure = (
        f"a copy of the module for each thread: {sum(each.wrong for each in copies):,} wrong; Keras' stateless_call "
        f"on a shared model: {sum(each.wrong for each in stateless):,}"
    )
    finding = Finding(
        f"{wrong:,} of {calls:,} calls on the shared module did not return what the same call returns alone, and after "
        f"the last {len(misplaced)} of {places} parameters were not where they belong; {cure}"
    )
    if wrong:
        others = sum(each.others for each in found)
        finding.anomalies.append(
            Anomaly(
                "wrong_output",
                wrong,
                calls,
                ", ".join(f"replica {own}: {each.wrong:,}" for own, each in enumerate(found)),
                f"{next(each.first for each in found if each.first)}; in all, {others:,} returned another replica's "
                f"output and {wrong - others:,} nobody's",
                remedy=cure,
            )
        )
    if misplaced:
        finding.anomalies.append(
            Anomaly("misplaced_parameter", len(misplaced), places, "after the last call", misplaced[0], remedy=cure)
        )
    return finding

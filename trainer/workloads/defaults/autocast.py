"""`workload=autocast`: `torch.autocast`, turned on in the main thread, and what replicas' threads see of it.

Whether it is on and its dtype belong to a thread, and new threads have neither: layers that a replica calls compute in
float32, without a word. A copy of main's context changes nothing, for it is no context variable; a replica that turns
autocast on for itself without a dtype gets PyTorch's, not main's. Keras' dtype policy belongs to a thread as well.

Its cache of cast weights, in contrast, is shared by all threads, and is cleared when any of them leaves its outermost
region. Who turns autocast on after an update, while another is still inside, computes with the weights from before it.

The cures, looked at in the same steps: main's dtype handed over and turned on in each thread, and no cache.
"""

from __future__ import annotations

import contextvars
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
import torch
from torch import Tensor

from trainer.audit.findings import Finding
from trainer.audit.records import RunRecord
from trainer.audit.verdict import Anomaly
from trainer.config import Config
from trainer.state.settings import Difference, differences, snapshot
from trainer.strategies.hosting import StopFlag, Watcher
from trainer.workloads.defaults.free_threads import take_steps

ASKED = torch.float16  # not the one that autocast has where nobody says
UNITS = 4
SETTINGS = ("torch autocast", "torch autocast dtype", "Keras dtype policy")  # as `trainer/state/settings.py` has them
# Ways of a replica to call a layer: as it comes, three that look like cures, and the cure.
AS_IT_COMES, KERAS, IN_A_COPY, WITHOUT_DTYPE, HANDED_OVER = (
    *("as it comes", "a Keras layer built in the thread", "in a copy of main's context"),
    *("under torch.autocast('cpu') without a dtype", "with main's dtype turned on in the thread"),
)
CACHED, UNCACHED = "with the cache", "with cache_enabled=False"
REMEDY = "hand torch.get_autocast_dtype over to each thread, and turn autocast on there with cache_enabled=False"
OF_KERAS = "pass dtype= to each layer"


@dataclass
class Seen:
    """What one replica saw, noted by its own thread.

    Attributes:
        calls: (way, dtype of what came out) -> calls.
        stale: way -> calls that computed with the weights from before an update.
        off: settings that are not main's.
    """

    steps: int = 0
    calls: Counter[tuple[str, str]] = field(default_factory=Counter)
    stale: Counter[str] = field(default_factory=Counter)
    off: list[Difference] = field(default_factory=list)


class Replicas:
    """What the replicas do, and what they see. Built by main, inside its autocast region.

    Thread-safety: `take` is called by each replica's own thread, all of them at once.
    """

    def __init__(self, num_replicas: int) -> None:
        self._layer = torch.nn.Linear(UNITS, UNITS, bias=False)
        self._x = torch.ones(1, UNITS)
        self._contexts = [contextvars.copy_context() for _ in range(num_replicas)]
        self._dtype = torch.get_autocast_dtype("cpu")
        self._asked = {name: found for name, found in snapshot().items() if name in SETTINGS}
        self._meeting = threading.Barrier(num_replicas)
        self.abort = self._meeting.abort
        self.seen = [Seen() for _ in range(num_replicas)]

    def take(self, own: int, step: int) -> None:
        seen = self.seen[own]
        if step == 0:
            seen.off = differences(self._asked, snapshot())
        ways: dict[str, Callable[[], Any]] = {
            AS_IT_COMES: self._call,
            KERAS: lambda: keras.layers.Dense(UNITS)(self._x),
            IN_A_COPY: lambda: self._contexts[own].run(self._call),
            WITHOUT_DTYPE: lambda: self._turned_on(None),
            HANDED_OVER: lambda: self._turned_on(self._dtype),
        }
        for way, call in ways.items():
            seen.calls[way, str(call().dtype).removeprefix("torch.")] += 1
        for way, cached in ((CACHED, True), (UNCACHED, False)):
            seen.stale[way] += self._is_stale(own, step, cached=cached)
        seen.steps += 1

    def _call(self) -> Tensor:
        output: Tensor = self._layer(self._x)
        return output

    def _turned_on(self, dtype: torch.dtype | None) -> Tensor:
        with torch.autocast("cpu", dtype=dtype, cache_enabled=False):
            return self._call()

    def _is_stale(self, own: int, step: int, *, cached: bool) -> bool:
        """Whether a call computes with other weights than those that were there when autocast was turned on for it.

        Replica 0 has called the layer, and is still inside its region when it updates it; the others come afterwards.
        """
        before, after = (float(each) for each in ((1, 2) if step % 2 else (2, 1)))
        if own == 0:
            self._update(before)
        self._meeting.wait()
        if own == 0:
            with torch.autocast("cpu", dtype=self._dtype, cache_enabled=cached):
                self._call()
                self._update(after)
                self._meeting.wait()
                self._meeting.wait()  # whoever leaves first clears the cache for all
            return False
        self._meeting.wait()
        with torch.autocast("cpu", dtype=self._dtype, cache_enabled=cached):
            output = self._call()
            self._meeting.wait()
        return float(output[0, 0]) != UNITS * after

    def _update(self, value: float) -> None:
        with torch.no_grad():
            self._layer.weight.fill_(value)


def run(config: Config, record: RunRecord, watcher: Watcher, stop: StopFlag) -> dict[str, Finding]:
    record.engine = "eager"
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    try:
        with torch.autocast("cpu", dtype=ASKED):
            replicas = Replicas(config.num_replicas)
            take_steps(
                replicas.take, config, record, stop, report=lambda: watcher.progress(record), abort=replicas.abort
            )
    finally:
        keras.config.set_dtype_policy(policy)
    return {} if stop.is_set() else judge(replicas.seen)


def judge(seen: Sequence[Seen]) -> dict[str, Finding]:
    return {
        "precision_as_asked": judge_dtypes(seen),
        "settings_as_asked": judge_settings(seen),
        "invariants_kept": judge_weights(seen),
    }


def judge_dtypes(seen: Sequence[Seen]) -> Finding:
    """Tell in what each way computes, and beside those that look like cures the one that is."""
    calls = sum((each.calls for each in seen), Counter[tuple[str, str]]())
    asked, total = str(ASKED).removeprefix("torch."), sum(each.steps for each in seen)
    right = {way: calls[way, asked] for way in dict.fromkeys(way for way, _ in calls)}
    told = "; ".join(f"{way} {number:,}" for way, number in right.items())
    finding = Finding(f"of {total:,} calls of each kind in replicas' threads, in {asked} as main has turned on: {told}")
    for (way, dtype), number in calls.items():
        if dtype != asked:
            witness = f"main has turned on {asked}; a layer that a replica calls {way} computes in {dtype}"
            if way == KERAS:
                witness = f"main has set mixed_{asked}; {way} computes in {dtype}"
            remedy = OF_KERAS if way == KERAS else REMEDY
            finding.anomalies.append(Anomaly("precision_off", number, total, way, witness, remedy=remedy))
    return finding


def judge_settings(seen: Sequence[Seen]) -> Finding:
    """Tell which settings of main's replicas do not have."""
    off = Counter(each.name for replica in seen for each in replica.off)
    finding = Finding(f"{len(off)} of {len(SETTINGS)} settings of main's are not there in the threads of its replicas")
    for name, number in off.items():
        own = next(own for own, replica in enumerate(seen) if any(each.name == name for each in replica.off))
        found = next(each for each in seen[own].off if each.name == name)
        witness = f"replica {own}: {name} ({found.scope}) is {found.found}, asked was {found.asked}"
        remedy = OF_KERAS if name.startswith("Keras") else REMEDY
        finding.anomalies.append(Anomaly("setting_off", number, len(seen), name, witness, remedy=remedy))
    return finding


def judge_weights(seen: Sequence[Seen]) -> Finding:
    """Tell how many calls computed with weights from before autocast was turned on, with the cache and without."""
    stale = {way: sum(each.stale[way] for each in seen) for way in (CACHED, UNCACHED)}
    calls = sum(each.steps for each in seen[1:])
    told = "; ".join(f"{way} {number:,}" for way, number in stale.items())
    finding = Finding(f"of {calls:,} calls after an update, computed with the weights from before it: {told}")
    if stale[CACHED]:
        witness = (
            "replica 0 has called the layer under autocast, and updated it before leaving; replica 1 then turned "
            "autocast on, and computed with replica 0's cast of the old weights"
        )
        anomaly = Anomaly("stale_weights", stale[CACHED], calls, "all replicas but 0", witness, remedy=REMEDY)
        finding.anomalies.append(anomaly)
    return finding

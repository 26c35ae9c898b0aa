"""`workload=process_settings`: PyTorch's default dtype and default generator, which threads share.

Each replica does what a script of its own would do. It seeds, with a seed of its own, and draws; replica 0 works in
float64 and says so by `torch.set_default_dtype`, which it takes back after every step. Both are settings of the
process: the last seed counts for all, all draw from one generator in whatever order they come, and while replica 0
is at work the others' tensors are float64, too. Replicas meet before and after that work, so this does not depend on
luck; the order of the draws does.

The cures, looked at in the same steps: a dtype that is passed with the call, and a generator for each replica.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from trainer.audit.findings import Finding
from trainer.audit.records import Floats, RunRecord
from trainer.audit.verdict import Anomaly
from trainer.config import Config
from trainer.state.settings import Difference, differences, snapshot
from trainer.strategies.hosting import StopFlag, Watcher
from trainer.workloads.defaults.free_threads import take_steps

DTYPE, SEED = "torch default dtype", "torch seed"  # as `trainer/state/settings.py` calls them
ENDS = [0, -1]


@dataclass
class Seen:
    """What one replica saw, noted by its own thread.

    Attributes:
        off: setting -> steps at which it was not what the replica had set, or found at the start of the run.
        first: setting -> the first of these steps, and what was found.
        dtypes_off: tensors of another dtype than the replica works in: made without a dtype, and with one.
        draws_off: draws that gave other numbers than the same seed gives alone: from the default generator, and from
            one of the replica's own; `first_draw` is the first step of the former.
    """

    steps: int = 0
    off: Counter[str] = field(default_factory=Counter)
    first: dict[str, tuple[int, Difference]] = field(default_factory=dict)
    dtypes_off: list[int] = field(default_factory=lambda: [0, 0])
    draws_off: list[int] = field(default_factory=lambda: [0, 0])
    first_draw: int | None = None


class Replicas:
    """What the replicas do, and what they see of each other.

    Thread-safety: `take` is called by each replica's own thread, all of them at once.
    """

    def __init__(self, config: Config) -> None:
        self._seeds = [config.train.seed + own for own in range(config.num_replicas)]
        self._dtypes = [torch.float64] + [torch.float32] * (config.num_replicas - 1)
        self._batch_size = config.train.batch_size
        self._generators = [torch.Generator().manual_seed(seed) for seed in self._seeds]
        self._alone = [self._drawn_alone(seed, config.train.steps) for seed in self._seeds]
        found = snapshot()
        self._asked = [
            {**found, DTYPE: str(dtype), SEED: str(seed)} for dtype, seed in zip(self._dtypes, self._seeds, strict=True)
        ]
        self._meeting = threading.Barrier(config.num_replicas)
        self.abort = self._meeting.abort
        self.seen = [Seen() for _ in self._seeds]

    def take(self, own: int, step: int) -> None:
        if step == 0:
            torch.manual_seed(self._seeds[own])
        if own == 0:
            torch.set_default_dtype(self._dtypes[own])
        self._meeting.wait()
        self._look(own, step)
        self._meeting.wait()
        if own == 0:
            torch.set_default_dtype(torch.float32)

    def _look(self, own: int, step: int) -> None:
        seen, dtype = self.seen[own], self._dtypes[own]
        for each in differences(self._asked[own], snapshot()):
            seen.off[each.name] += 1
            seen.first.setdefault(each.name, (step, each))
        made = torch.ones(self._batch_size), torch.ones(self._batch_size, dtype=dtype)
        for way, tensor in enumerate(made):
            seen.dtypes_off[way] += tensor.dtype != dtype
        for way, generator in enumerate((None, self._generators[own])):
            seen.draws_off[way] += not np.array_equal(self._draw(generator), self._alone[own][step])
        if seen.draws_off[0] and seen.first_draw is None:
            seen.first_draw = step
        seen.steps += 1

    def _draw(self, generator: torch.Generator | None) -> Floats:
        """The first and the last of a batch of random numbers; the dtype is passed, as others draw other numbers."""
        drawn: Floats = torch.rand(self._batch_size, generator=generator, dtype=torch.float32)[ENDS].numpy()
        return drawn

    def _drawn_alone(self, seed: int, steps: int) -> Floats:
        """What a replica's draws are to give: float32 [steps, 2]."""
        torch.manual_seed(seed)
        return np.stack([self._draw(None) for _ in range(steps)])


def run(config: Config, record: RunRecord, watcher: Watcher, stop: StopFlag) -> dict[str, Finding]:
    record.engine = "eager"
    replicas = Replicas(config)
    take_steps(replicas.take, config, record, stop, report=lambda: watcher.progress(record), abort=replicas.abort)
    return {"settings_as_asked": judge_settings(replicas.seen), "rng_independent": judge_draws(replicas.seen)}


def judge_settings(seen: Sequence[Seen]) -> Finding:
    """Tell which settings were not the replica's own, and beside it what became of tensors with and without a dtype."""
    looks = sum(each.steps for each in seen)
    without, given = (sum(each.dtypes_off[way] for each in seen) for way in (0, 1))
    remedies = {
        DTYPE: f"pass dtype= with every call: {given:,} of {looks:,} such tensors were of another dtype in this run",
        SEED: _remedy(seen),
    }
    total = sum((each.off for each in seen), Counter[str]())
    finding = Finding(
        f"{len(total)} settings were others' in some of {looks:,} looks; of another dtype than the replica's were "
        f"{without:,} of {looks:,} tensors made without a dtype and {given:,} of {looks:,} made with one"
    )
    for name, count in sorted(total.items()):
        own = next(own for own, each in enumerate(seen) if name in each.first)
        step, found = seen[own].first[name]
        where = ", ".join(f"replica {own}: {each.off[name]:,}" for own, each in enumerate(seen))
        witness = f"replica {own}, step {step}: {name} ({found.scope}) is {found.found}, asked was {found.asked}"
        anomaly = Anomaly("setting_off", count, looks, f"{name}, {where}", witness, remedy=remedies.get(name, ""))
        finding.anomalies.append(anomaly)
    return finding


def judge_draws(seen: Sequence[Seen]) -> Finding:
    """Tell how many draws depended on the other replicas, and beside it those from generators of the replicas' own."""
    draws = sum(each.steps for each in seen)
    off = sum(each.draws_off[0] for each in seen)
    finding = Finding(f"{off:,} of {draws:,} draws were not what the same seed gives alone; with {_remedy(seen)}")
    if off:
        own = next(own for own, each in enumerate(seen) if each.first_draw is not None)
        where = ", ".join(f"replica {own}: {each.draws_off[0]:,}" for own, each in enumerate(seen))
        witness = (
            f"replica {own}, step {seen[own].first_draw}: other numbers than after the same torch.manual_seed alone"
        )
        anomaly = Anomaly("dependent_random_numbers", off, draws, where, witness, remedy=_remedy(seen))
        finding.anomalies.append(anomaly)
    return finding


def _remedy(seen: Sequence[Seen]) -> str:
    off, draws = sum(each.draws_off[1] for each in seen), sum(each.steps for each in seen)
    return (
        f"a torch.Generator for each replica {off:,} of {draws:,} in this run; state.random_numbers=derived needs none"
    )

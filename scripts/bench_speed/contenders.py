"""Who is measured: ours, every update mode with what can be chosen besides; and the rivals, a small program each."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cases import CASES, ROOT

from trainer.config import ONE_PROCESS, OPTIONS
from trainer.updates.mechanisms import MODES

RIVALS = ROOT / "scripts" / "rivals"
ENGINES = ("torchscript", "inductor", "native")
# Steps of a first run, which only finds out how many are needed.
FIRST_STEPS = {"small_mlp": 1000, "mlp": 100, "cnn": 40, "cnn_batch": 40, "transformer": 40}


@dataclass(frozen=True)
class Ours:
    """`python -m trainer` with one update mode.

    Attributes:
        engine: of captured steps; empty under mirrored, which has one.
        counters: audit=counters in place of audit=none.
    """

    strategy: str
    mode: str
    engine: str = ""
    precision: str = "float32"
    counters: bool = False

    @property
    def name(self) -> str:
        precision = "" if self.precision == "float32" else self.precision
        parts = (self.strategy, self.mode, self.engine, precision, "counters" if self.counters else "")
        return "/".join(filter(None, parts))

    @property
    def family(self) -> tuple[str, ...]:
        """What runs about as fast as this one, step by step."""
        return self.strategy, self.engine, self.precision

    def takes(self, replicas: int) -> bool:
        return replicas >= 1

    def command(self, model: str, replicas: int, steps: int, folder: Path) -> list[str]:
        engine = [f"train.engine={self.engine}"] if self.engine else []
        return [
            *(sys.executable, "-m", "trainer"),
            *(f"strategy={self.strategy}", f"update_mode={self.mode}", f"num_replicas={replicas}", *engine),
            *CASES[model].overrides(),
            *(f"precision={self.precision}", f"audit={'counters' if self.counters else 'none'}"),
            *(f"train.steps={steps}", "train.threads_per_replica=1", "fail_on=never", f"hydra.run.dir={folder}"),
        ]


@dataclass(frozen=True)
class Rival:
    """A program of `scripts/rivals`.

    Attributes:
        has_replicas: else it is one replica, and takes no --replicas.
    """

    name: str
    program: str
    options: tuple[str, ...] = ()
    has_replicas: bool = False

    def takes(self, replicas: int) -> bool:
        return self.has_replicas or replicas == 1

    def command(self, model: str, replicas: int, seconds: float) -> list[str]:
        number = [f"--replicas={replicas}"] if self.has_replicas else []
        asked = (f"--model={model}", f"--seconds={seconds:g}", *number)
        return [sys.executable, str(RIVALS / self.program), *asked, *self.options]


Contender = Ours | Rival

ALL_RIVALS = (
    Rival("plain_torch", "plain_torch.py"),
    Rival("plain_torch/compiled", "plain_torch.py", ("--compile",)),
    Rival("plain_torch/channels_last", "plain_torch.py", ("--channels-last",)),
    Rival("ddp", "ddp.py", has_replicas=True),
    Rival("hogwild", "hogwild.py", has_replicas=True),
    Rival("keras_fit/torch", "keras_fit.py", ("--backend=torch",)),
    Rival("keras_fit/tensorflow", "keras_fit.py", ("--backend=tensorflow",)),
    Rival("mirrored_fit", "mirrored_fit.py", has_replicas=True),
    Rival("mirrored_fit/one_device", "mirrored_fit.py", ("--reduction=one_device",), has_replicas=True),
    Rival("mirrored_loop", "mirrored_loop.py", has_replicas=True),
    Rival("mirrored_loop/one_device", "mirrored_loop.py", ("--reduction=one_device",), has_replicas=True),
)


def contenders(engines: Sequence[str]) -> dict[str, Contender]:
    """Everybody by name: ours with these engines, then the rivals."""
    ours = [
        Ours(strategy, mode, engine, precision, counters)
        for mode, mechanism in MODES.items()
        if mode != "custom"
        for strategy in mechanism.strategies
        if strategy in ONE_PROCESS
        for engine in (engines if strategy == "threads" else [""])
        for precision in OPTIONS["precision"]
        if precision != "mixed_float16"
        for counters in (False, True)
    ]
    everybody: tuple[Contender, ...] = (*ours, *ALL_RIVALS)
    return {each.name: each for each in everybody}

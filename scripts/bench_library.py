"""The captured training step as a compiled library beside TorchScript: time to compile, size, differences, speed.

    python scripts/bench_library.py --rounds 10 linear mlp cnn transformer

Speed is steps a second, forward and backward without the update, of one thread alone and of two at once, with inputs of
their own. Rounds are taken in turn and the best one counts: whatever else runs on the machine can only take away.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["KERAS_BACKEND"] = "torch"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from trainer.config import Cnn, Config, Linear, Mlp, Precision, Synthetic, Train, Transformer
from trainer.engines import capture
from trainer.engines.library import compile_library
from trainer.engines.library_calls import load
from trainer.strategies import steps
from trainer.workloads.train import Training

Step = Callable[..., Any]
BATCHES = 64  # different ones, so that not every input is the last call's
CALLS = 20  # between looks at the clock
IMAGES: dict[str, Any] = {"data": Synthetic(shape=[28, 28, 1]), "train": Train(batch_size=64)}
MODELS: dict[str, dict[str, Any]] = {
    "linear": {"model": Linear()},
    "mlp": {"model": Mlp()},
    "mlp_dropout": {"model": Mlp(dropout=0.25)},
    "mlp_large": {"model": Mlp(hidden=[512, 512]), **IMAGES},
    "cnn_none": {"model": Cnn(normalization="none", dropout=0.0)},
    "cnn_batch": {"model": Cnn(normalization="batch")},
    "cnn_group": {"model": Cnn(normalization="group")},
    "images_none": {"model": Cnn(normalization="none", dropout=0.0), **IMAGES},
    "images_batch": {"model": Cnn(), **IMAGES},
    "transformer": {"model": Transformer(dropout=0.0)},
    "transformer_dropout": {"model": Transformer()},
}


@dataclass
class Case:
    """A captured step and what it is called with: prefix, template, x, y, samples, number, positions."""

    graph: torch.fx.GraphModule
    script: Step
    example: tuple[Tensor, ...]


def case_of(config: Config) -> Case:
    """The training step that a run of this configuration would capture."""
    found: list[Case] = []

    def keep(function: Step, *example: Tensor, **how: Any) -> capture.Captured:
        with torch.no_grad():
            graph = make_fx(lambda *inputs: function(*inputs))(*example)
        script = capture.capture(function, *example)
        found.append(Case(graph, script, example))
        return script

    with mock.patch.object(steps, "capture", keep):
        steps.Steps(config, Training(config))
    return found[0]


def inputs(example: tuple[Tensor, ...], own: int) -> list[tuple[Tensor, ...]]:
    """What a thread calls its step with, batch by batch."""
    prefix, template, x, y, samples, _, positions = example
    prefix, template, positions = prefix.clone(), template.clone(), positions + own * len(positions)
    batches = torch.randint(len(x), (BATCHES, len(samples)), generator=torch.Generator().manual_seed(own))
    return [
        (prefix, template, x, y, batch, number, positions)
        for batch, number in zip(batches, torch.arange(BATCHES), strict=True)
    ]


def speed(step: Step, example: tuple[Tensor, ...], num_threads: int, seconds: float) -> float:
    """Steps a second of all threads together."""
    start = threading.Barrier(num_threads)
    done = [0.0] * num_threads

    def work(own: int) -> None:
        torch.set_grad_enabled(False)  # thread-local
        calls = itertools.cycle(inputs(example, own))
        for _ in range(3):
            step(*next(calls))
        start.wait(60)
        count, begin = 0, time.perf_counter()
        while (now := time.perf_counter()) < begin + seconds:
            for _ in range(CALLS):
                step(*next(calls))
            count += CALLS
        done[own] = count / (now - begin)

    threads = [threading.Thread(target=work, args=(own,)) for own in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(done)


def differences(library: Step, script: Step, example: tuple[Tensor, ...]) -> list[float]:
    """The largest of each output over all batches."""
    largest = [0.0, 0.0]
    with torch.no_grad():
        for each in inputs(example, 0):
            for index, (ours, theirs) in enumerate(zip(library(*each), script(*each), strict=True)):
                largest[index] = max(largest[index], float((ours - theirs).abs().max()))
    return largest


def measure(name: str, precision: str, rounds: int, seconds: float, path: Path) -> str:
    case = case_of(Config(precision=Precision(precision), **MODELS[name]))
    begin = time.perf_counter()
    compile_library(case.graph, case.example, path)
    compiled = time.perf_counter() - begin
    library = load(path)
    contribution, row = differences(library, case.script, case.example)
    best: dict[tuple[str, int], float] = {}
    for _ in range(rounds):
        for kind, step in (("script", case.script), ("library", library)):
            for num_threads in (1, 2):
                now = speed(step, case.example, num_threads, seconds)
                best[kind, num_threads] = max(best.get((kind, num_threads), 0.0), now)
    size = path.stat().st_size / 1024
    speeds = "".join(
        f"{best[kind, 1]:>11,.0f}{best[kind, 2]:>9,.0f}{best[kind, 2] / best[kind, 1]:>6.2f}"
        for kind in ("script", "library")
    )
    return f"{name:<20} {precision:<14} {compiled:>7.1f} {size:>6.0f} {contribution:>9.1e} {row:>9.1e}{speeds}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10, help="of each kind and number of threads (default: 10)")
    parser.add_argument("--seconds", type=float, default=0.3, help="of a round (default: 0.3)")
    parser.add_argument("--intra-op", type=int, default=1, help="intra-op threads (default: 1)")
    parser.add_argument("--precision", nargs="*", default=["float32", "mixed_bfloat16"], help="default: both")
    parser.add_argument("models", nargs="*", help=f"{', '.join(MODELS)}, or how some of them begin (default: all)")
    given = parser.parse_args()
    torch.set_num_threads(given.intra_op)
    chosen = [name for name in MODELS if not given.models or name.startswith(tuple(given.models))]
    print(f"{'':<35} {'compile':>7} {'size':>6} {'largest difference':>19}{'TorchScript':>26}{'library':>26}")
    print(f"{'model':<20} {'precision':<14} {'s':>7} {'KiB':>6} {'gradient':>9} {'row':>9}", end="")
    print(f"{'1 thread':>11}{'2':>9}{'ratio':>6}" * 2)
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, precision) in enumerate(itertools.product(chosen, given.precision)):
            line = measure(name, precision, given.rounds, given.seconds, Path(folder, f"{number}.so"))
            print(line, flush=True)


if __name__ == "__main__":
    main()

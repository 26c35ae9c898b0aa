"""What one core needs for a training step's matrix products and convolutions alone: the most that any engine can reach.

    python scripts/roofline.py --precision float32 mixed_bfloat16 -- mlp_large cnn_batch

Each of these operators is taken from the captured step and timed by itself on the inputs that it has there, with one
intra-op thread and warm caches; the best call counts. Their sum is a bound: a step has other operators as well, and it
reads and writes its weights. Beside it, copying the weights once, and what the arithmetic reaches in GFLOP/s.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["KERAS_BACKEND"] = "torch"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from bench_library import MODELS, case_of
from torch.utils.flop_counter import FlopCounterMode

from trainer.config import Config, Precision

HEAVY = ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward")


def best_seconds(call: Callable[[], Any], seconds: float) -> float:
    best, end = float("inf"), time.perf_counter() + seconds
    call()
    while (began := time.perf_counter()) < end:
        call()
        best = min(best, time.perf_counter() - began)
    return best


class Timed(torch.fx.Interpreter):
    """Runs a graph once and times its heavy operators, each by itself."""

    def __init__(self, graph: torch.fx.GraphModule, seconds: float) -> None:
        super().__init__(graph)
        self._seconds = seconds
        self.heavy, self.count = 0.0, 0

    def call_function(self, target: Any, given: tuple[Any, ...], more: dict[str, Any]) -> Any:
        if getattr(target, "overloadpacket", None) in [getattr(torch.ops.aten, name) for name in HEAVY]:
            self.heavy += best_seconds(lambda: target(*given, **more), self._seconds)
            self.count += 1
        return super().call_function(target, given, more)


def measure(name: str, precision: str, seconds: float) -> str:
    case = case_of(Config(precision=Precision(precision), **MODELS[name]))
    with torch.no_grad():
        timed = Timed(case.graph, seconds)
        timed.run(*case.example)
        with FlopCounterMode(display=False) as counted:
            case.graph(*case.example)
    weights, room = case.example[0], torch.empty_like(case.example[0])
    copied = best_seconds(lambda: room.copy_(weights), seconds)
    flops = counted.get_total_flops()
    return (
        f"{name:<20} {precision:<14} {timed.count:>9} {flops / 1e6:>8,.1f} {timed.heavy * 1e6:>10,.1f} "
        f"{flops / timed.heavy / 1e9:>8,.0f} {1 / timed.heavy:>12,.0f} {copied * 1e6:>8,.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", nargs="*", default=["float32", "mixed_bfloat16"], help="default: both")
    parser.add_argument("--seconds", type=float, default=0.1, help="for each operator (default: 0.1)")
    parser.add_argument("models", nargs="*", help=f"{', '.join(MODELS)} (default: all)")
    given = parser.parse_args()
    if unknown := sorted(set(given.models) - set(MODELS)):
        parser.error(f"models must be among {', '.join(MODELS)}; got {', '.join(unknown)}")
    torch.set_num_threads(1)
    print(f"{'':<35} {'heavy':>9} {'':>8} {'best sum':>10} {'':>8} {'most steps/s':>12} {'copy of':>8}")
    print(
        f"{'model':<20} {'precision':<14} {'operators':>9} {'MFLOP':>8} {'us':>10} {'GFLOP/s':>8} {'a core':>12} "
        f"{'weights':>8}"
    )
    for name in given.models or MODELS:
        for precision in given.precision:
            print(measure(name, precision, given.seconds), flush=True)


if __name__ == "__main__":
    main()

"""How every rival is measured: first step, warm-up, and then a number of steps against the clock.

Replicas that are processes start the steps that count together, and the last one to finish ends them, as in our runs.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cases import CASES

# Of the seconds asked for, what a stretch of warm-up must take before its speed is believed.
WARM_UP = 0.15


@dataclass(frozen=True)
class Stretch:
    """What one process measured; times are those of the machine's monotonic clock, the same for all processes."""

    first_step: float
    begin: float
    end: float
    steps: int
    loss_first: float
    loss_last: float
    peak_rss_bytes: int
    pss_bytes: int


def arguments(description: str | None, **extra: dict[str, Any]) -> argparse.Namespace:
    """What all rivals are asked, and options of one of them: `name={"default": ...}`, as `add_argument` takes it."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=CASES, default="small_mlp", help="what is trained (default: small_mlp)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of training that is timed (default: 2)")
    for name, options in extra.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **options)
    return parser.parse_args()


def alone(value: float) -> float:
    return value


def stretch(
    first: Callable[[], float],
    train: Callable[[int], float],
    seconds: float,
    agree: Callable[[float], float] = alone,
) -> Stretch:
    """Warm up, then time about `seconds` of training.

    Args:
        first: takes the first step and returns its loss.
        train: takes so many steps, or whatever else it counts in, and returns the loss at their end.
        agree: called by all replicas at the same points; returns to all of them what the first one gave, once all are
            there.
    """
    loss_first = first()
    first_step = time.monotonic()
    steps = 1
    while (took := agree(_timed(train, steps))) < WARM_UP * seconds:
        steps *= 2
    steps = max(1, round(agree(steps * seconds / took)))
    begin = time.monotonic()
    loss_last = train(steps)
    end = time.monotonic()
    # Before the first one to finish has ended: what processes share counts in parts.
    agree(0.0)
    memory = _pss_bytes()
    agree(0.0)
    return Stretch(first_step, begin, end, steps, loss_first, loss_last, _peak_rss_bytes(), memory)


def say(stretches: list[Stretch], *, parameters: int, micro_steps: int = 1, started: float | None = None) -> None:
    """Print one JSON line.

    Args:
        stretches: of all processes that trained.
        micro_steps: batches through the model in each of their steps.
        started: when the program did, on the monotonic clock; None: when this process did.
    """
    steps = stretches[0].steps
    seconds = max(each.end for each in stretches) - min(each.begin for each in stretches)
    last = max(each.first_step for each in stretches)
    told = {
        "micro_steps_per_second": sum(each.steps for each in stretches) * micro_steps / seconds,
        "steps": steps,
        "seconds": seconds,
        "loss_first": sum(each.loss_first for each in stretches) / len(stretches),
        "loss_last": sum(each.loss_last for each in stretches) / len(stretches),
        "start_to_first_step_seconds": last - (process_start() if started is None else started),
        "peak_rss_bytes": sum(each.peak_rss_bytes for each in stretches),
        "pss_bytes": sum(each.pss_bytes for each in stretches),
        "parameters": parameters,
    }
    print(json.dumps(told), flush=True)


def process_start() -> float:
    """When this process was started, on the monotonic clock, to a hundredth of a second."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    # Field 22 of proc(5), counted from the state, which is field 3.
    since_boot = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return since_boot - time.clock_gettime(time.CLOCK_BOOTTIME) + time.monotonic()


def as_line(one: Stretch) -> str:
    return json.dumps(asdict(one))


def _timed(train: Callable[[int], float], steps: int) -> float:
    begin = time.monotonic()
    train(steps)
    return time.monotonic() - begin


def _peak_rss_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _pss_bytes() -> int:
    """Memory of this process, each page divided by the number of processes that share it."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/smaps_rollup has no line Pss.")

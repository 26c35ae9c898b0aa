"""What orders under control cost, and what the points that announce operations cost where nobody listens.

    python scripts/bench_schedule.py
    python scripts/bench_schedule.py --rounds 9 turnstile points

turnstile   microseconds a decision: operations that do nothing, with a switch at every decision and without.
search      every order of 2 replicas x 2 steps of model=mlp update_mode=locked, and what a run's time goes to.
tables      `show modes --prove` and `show state --prove`.
points      one free run with points as they are, with functions that do nothing in their place, and with its first
            steps traced, made in turn; and the calls of a step times what one call takes, which says more where the
            machine is not quiet.

Figures are medians over the rounds, with the least and the most; only `tables` is made once.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import threading
import time
import timeit
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Before Keras is imported.
os.environ["KERAS_BACKEND"] = "torch"
os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from trainer.config import Audit, Config, Search, Train, UpdateMode  # noqa: E402
from trainer.schedule import point as points  # noqa: E402
from trainer.schedule.operations import MODE, READ  # noqa: E402
from trainer.schedule.order import Order  # noqa: E402
from trainer.schedule.turnstile import Turnstile  # noqa: E402

GOAL_DECISION, GOAL_SEARCH, GOAL_TABLE = 25.0, 5.0, 180.0  # microseconds, seconds, seconds
DECISIONS = 4000
POINT_STEPS = 1000
TRACED_STEPS = 20


class Never:
    def is_set(self) -> bool:
        return False


def told(figures: Sequence[float], unit: str, digits: int = 1) -> str:
    median = statistics.median(figures)
    return f"{median:9.{digits}f} {unit:3} {min(figures):8.{digits}f} to {max(figures):.{digits}f}"


# Decisions.


def stay(order: Order) -> int:
    able = order.able()
    return order.last if order.last in able else able[0]


def rotate(order: Order) -> int:
    last = -1 if order.last is None else order.last
    return min(order.able(), key=lambda own: (own - last - 1) % order.num_replicas)


def decision(num_replicas: int, choose: Callable[[Order], int]) -> float:
    """Microseconds a decision."""

    def body(own: int) -> None:
        for _ in range(DECISIONS // num_replicas):
            points.point(READ, f"place {own}")

    order = Order(num_replicas, choose)
    bodies = [lambda own=own: body(own) for own in range(num_replicas)]
    start = time.perf_counter()
    Turnstile(order).run(bodies)
    return (time.perf_counter() - start) / len(order.granted) * 1e6


def turnstile(rounds: int) -> None:
    print(f"a decision of the turnstile (goal: under {GOAL_DECISION:g} us up to 8 replicas)")
    rows = [(num, name, choose) for num in (2, 4, 8) for name, choose in (("stays", stay), ("switches", rotate))]
    found: dict[tuple[int, str], list[float]] = {(num, name): [] for num, name, _ in rows}
    for _ in range(rounds):
        for num, name, choose in rows:
            found[num, name].append(decision(num, choose))
    for (num, name), figures in found.items():
        print(f"  {num} replicas, {name:9} {told(figures, 'us')}")
    for num in (2, 4, 8):
        ratio = statistics.median(found[num, "switches"]) / statistics.median(found[num, "stays"])
        print(f"  {num} replicas, switches / stays {ratio:.2f}")


# Orders.


class Split:
    """Adds up the seconds that calls take."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timing(self, owner: Any, name: str, part: str) -> Iterator[None]:
        plain = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return plain(*args, **kwargs)
            finally:
                self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start

        setattr(owner, name, timed)
        try:
            yield
        finally:
            setattr(owner, name, plain)


def search(rounds: int) -> None:
    from trainer import explore
    from trainer.one_run import explorer_of
    from trainer.strategies import threads

    threads.prepare(2, 1)
    config = Config(update_mode=UpdateMode("locked"), train=Train(steps=2), schedule=Search())
    print(f"\n2 replicas x 2 steps of model=mlp update_mode=locked, every order (goal: under {GOAL_SEARCH:g} s)")
    seconds: list[float] = []
    parts: dict[str, list[float]] = {"replicas": [], "judging": [], "building": []}
    for _ in range(rounds):
        split = Split()
        explorer = explorer_of(config, Never())
        once = explorer._once
        runs = 0

        def counted(choose: Callable[[Order], int], once: Callable[..., Any] = once) -> Any:
            nonlocal runs
            runs += 1
            return once(choose)

        explorer._once = counted  # type: ignore[method-assign]
        timings = (
            (explorer, "_once", "all"),
            (Turnstile, "run", "replicas"),
            (explore, "judge_order", "judging"),
            (threads.Threads, "complete", "judging"),
        )
        start = time.perf_counter()
        with split.timing(*timings[0]), split.timing(*timings[1]), split.timing(*timings[2]), split.timing(*timings[3]):
            explorer.run()
        seconds.append(time.perf_counter() - start)
        split.seconds["building"] = 2 * split.seconds["all"] - sum(split.seconds.values())
        for part, figures in parts.items():
            figures.append(split.seconds[part] / runs * 1e3)
    print(f"  {explorer.explored.orders} orders, {runs} runs      {told(seconds, 's', 2)}")
    for part, figures in parts.items():
        print(f"  a run, {part:9}       {told(figures, 'ms', 2)}")
    print(f"  a run                  {told([second / runs * 1e3 for second in seconds], 'ms', 2)}")


# Tables.


def tables(rounds: int) -> None:
    print(f"\nthe tables (goal for modes: under {GOAL_TABLE:g} s)")
    for what in ("modes", "state"):
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "trainer", "show", what, "--prove"], check=True, cwd=ROOT, stdout=subprocess.DEVNULL
        )
        print(f"  show {what} --prove    {time.perf_counter() - start:9.1f} s")


# Points.

NAMES = ("point", "points", "mark")


@contextmanager
def replaced(by: Callable[[str], Callable[..., None]]) -> Iterator[None]:
    """In every module that took them by name."""
    plain = {name: getattr(points, name) for name in NAMES}
    users = [module for name, module in list(sys.modules.items()) if name.startswith("trainer.")]
    places = [(module, name) for module in users for name in NAMES if getattr(module, name, None) is plain[name]]
    for module, name in places:
        setattr(module, name, by(name))
    try:
        yield
    finally:
        for module, name in places:
            setattr(module, name, plain[name])


def free_run(mode: str, steps: int, *, trace_steps: int = 0) -> float:
    """Microseconds a step."""
    from trainer.one_run import UNWATCHED, _prepare, empty_record
    from trainer.strategies import threads
    from trainer.workloads.train import Training

    config = Config(update_mode=UpdateMode(mode), train=Train(steps=steps), audit=Audit(trace_steps=trace_steps))
    training, record = Training(config), empty_record(config)
    _prepare(config, record, training)
    threads.train(config, training, record, UNWATCHED, Never())
    return record.duration_seconds / steps * 1e6


def free_points(rounds: int) -> None:
    from trainer.strategies import threads

    threads.prepare(2, 1)
    print(f"\npoints in a free run of 2 replicas, model=mlp audit=counters, {POINT_STEPS} steps")
    # The variable that a point looks at is what it is in a free run.
    times = timeit.repeat(lambda: points.point(READ, "precision mode", of=MODE), number=100_000, repeat=rounds)
    empty = timeit.repeat(lambda: None, number=100_000, repeat=rounds)
    call = (statistics.median(times) - statistics.median(empty)) / 100_000 * 1e9
    print(f"  one call              {call:9.1f} ns")
    for mode in ("locked", "all_reduce"):
        calls = counted_calls(mode)
        with_points: list[float] = []
        without: list[float] = []
        traced: list[float] = []
        for _ in range(rounds):
            with_points.append(free_run(mode, POINT_STEPS))
            with replaced(lambda name: lambda *args, **kwargs: None):
                without.append(free_run(mode, POINT_STEPS))
            traced.append(free_run(mode, POINT_STEPS, trace_steps=TRACED_STEPS))
        step = statistics.median(with_points)
        print(f"  {mode:10} a step      {told(with_points, 'us')}")
        for what, figures in (("no points", without), (f"{TRACED_STEPS} traced", traced)):
            ratio = statistics.median(figures) / step
            print(f"  {mode:10} {what:11} {told(figures, 'us')}   of the first {ratio:.3f}")
        print(
            f"  {mode:10} {calls:.2f} calls a replica and step x {call:.0f} ns = {calls * call / 1000:.2f} us, "
            f"{calls * call / step / 10:.2f} % of a step"
        )


def counted_calls(mode: str) -> float:
    """Calls of points by one replica in one step, on average."""
    lock, calls, steps = threading.Lock(), 0, 100

    def counting(name: str) -> Callable[..., None]:
        def count(*args: Any, **kwargs: Any) -> None:
            nonlocal calls
            with lock:
                calls += 1

        return count

    with replaced(counting):
        free_run(mode, steps)
    return calls / steps / 2


PARTS: dict[str, Callable[[int], None]] = {
    "turnstile": turnstile,
    "search": search,
    "tables": tables,
    "points": free_points,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="how often each figure is taken (default: 5)")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default: all)")
    given = parser.parse_args()
    if given.rounds < 1:
        parser.error("--rounds must be at least 1")
    if unknown := sorted(set(given.parts) - set(PARTS)):
        parser.error(f"PART must be one of {', '.join(PARTS)}; got {', '.join(unknown)}")
    for name in given.parts or PARTS:
        PARTS[name](given.rounds)


if __name__ == "__main__":
    main()

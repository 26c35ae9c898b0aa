"""What a section of `Synchronized` costs where nobody waits, beside a bare `threading.Lock`.

The time is the thread's own, without what other processes take. Every round times every row once, so that a machine
that slows down slows all of them. A row's figures are medians over the rounds: of its time, with what the middle half
of them covers, and of its time over the first row's in the same round.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
import timeit

from trainer.state.read_write_lock import ReadWriteLock
from trainer.state.synchronized import LockOrder, Synchronized, acquire_locked

WITH = "with lock: fn(value)"
TRY = """lock.acquire()
try:
    fn(value)
finally:
    lock.release()"""

# What is timed, on which lock, and how that is made. `fn` and `value` are the same for all. The first is the measure.
ROWS = [
    (WITH, "threading.Lock", "lock = threading.Lock()"),
    (TRY, "threading.Lock", "lock = threading.Lock()"),
    (WITH, "threading.RLock", "lock = threading.RLock()"),
    (TRY, "threading.RLock", "lock = threading.RLock()"),
    *(("s.with_lock(fn)", kind, f"s = Synchronized(value, {kind!r})") for kind in ("exclusive", "re_entrant")),
    ("with s.lock() as h: fn(h.value)", "exclusive", "s = Synchronized(value)"),
    ("s.with_lock(fn)", "exclusive, order", "s = Synchronized(value, order=LockOrder())"),
    *(
        (statement, kind, f"s = Synchronized(value, {kind!r})")
        for kind in ("read_write", "upgradable")
        for statement in (
            "s.with_rlock(fn)",
            "s.with_wlock(fn)",
            "with s.rlock() as h: fn(h.value)",
            "with s.wlock() as h: fn(h.value)",
        )
    ),
    ("with s.ulock() as h: fn(h.value)", "upgradable", "s = Synchronized(value, 'upgradable')"),
    ("with s.ulock() as h: h.upgrade(); fn(h.value)", "upgradable", "s = Synchronized(value, 'upgradable')"),
    (
        "with acquire_locked(s, t) as (h, i): fn(h.value)",
        "exclusive x 2",
        "s, t = Synchronized(value), Synchronized(0)",
    ),
    ("with lock.read(): fn(value)", "ReadWriteLock", "lock = ReadWriteLock()"),
    ("with lock.write(): fn(value)", "ReadWriteLock", "lock = ReadWriteLock()"),
]


def measured(rounds: int, calls: int) -> list[list[float]]:
    """Nanoseconds per section: for each row, one figure a round."""
    names: dict[str, object] = {"threading": threading, "acquire_locked": acquire_locked}
    names |= {each.__name__: each for each in (LockOrder, ReadWriteLock, Synchronized)}
    timers = [
        # The thread's own time: what other processes take of the machine is not the lock's doing.
        timeit.Timer(statement, f"value = [0]; fn = lambda value: value; {setup}", time.thread_time, names)
        for statement, _, setup in ROWS
    ]
    results: list[list[float]] = [[] for _ in ROWS]
    for _ in range(rounds):
        for timer, figures in zip(timers, results, strict=True):
            figures.append(timer.timeit(calls) / calls * 1e9)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=41, help="how often each row is timed (default: 41)")
    parser.add_argument("--calls", type=int, default=5000, help="sections each time (default: 5000)")
    arguments = parser.parse_args()
    if arguments.rounds < 2 or arguments.calls < 1:
        parser.error("--rounds must be at least 2 and --calls at least 1")
    results = measured(arguments.rounds, arguments.calls)
    print(f"{'section':58} {'lock':16} {'ns':>6} {'middle half':>13} {'x bare':>7}")
    for (statement, lock, _), figures in zip(ROWS, results, strict=True):
        low, median, high = statistics.quantiles(figures, n=4)
        ratio = statistics.median(each / bare for each, bare in zip(figures, results[0], strict=True))
        section = statement.replace("\n    ", " ").replace("\n", "; ")
        print(f"{section:58} {lock:16} {median:6.0f} {low:6.0f}-{high:<6.0f} {ratio:7.2f}")


if __name__ == "__main__":
    main()

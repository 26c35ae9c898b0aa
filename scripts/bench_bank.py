"""What each way of the bank costs: transfers a second of free threads, with their locks watched and unwatched.

No transfer has to be refused. One thread makes as many transfers as two make together. A figure is the median of some
rounds; every round takes every way once. The last line is what watching adds to a section that nobody waits for, in the
thread's own time.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
import timeit
from contextlib import nullcontext

from trainer.audit.records import ReplicaRecord, RunRecord
from trainer.config import Bank as Keys
from trainer.config import Config
from trainer.schedule.locks import shown_to
from trainer.state.layout import EMPTY
from trainer.strategies.lock_watch import LockWatch
from trainer.workloads.bank.transfers import WAYS
from trainer.workloads.bank.workload import Bank

# One way round only, so that nobody waits for ever.
TRANSFERS = ["x:y:1", "x:z:1", "y:z:1"]
ACCOUNTS = ["x:1000000000", "y:1000000000", "z:1000000000"]
COLUMNS = {"one": (1, False), "one, watched": (1, True), "two": (2, False), "two, watched": (2, True)}


def transfers_a_second(way: str, num_threads: int, steps: int, *, watched: bool) -> float:
    """Of all threads together."""
    config = Config(num_replicas=num_threads, workload=Keys(transfer=way, transfers=TRANSFERS, accounts=ACCOUNTS))
    record = RunRecord(EMPTY, steps, [ReplicaRecord.empty(own, 0, num_threads) for own in range(num_threads)])
    with shown_to(LockWatch().see) if watched else nullcontext():
        bank = Bank(config)
    never, go = threading.Event(), threading.Event()

    def body(own: int) -> None:
        go.wait()
        bank.replica(record, never, own)

    threads = [threading.Thread(target=body, args=(own,)) for own in range(num_threads)]
    for thread in threads:
        thread.start()
    start = time.perf_counter()
    go.set()
    for thread in threads:
        thread.join()
    return num_threads * steps / (time.perf_counter() - start)


def nanoseconds_more(rounds: int, sections: int = 20000) -> float:
    """What watching adds to `with lock: pass`."""
    real = threading.Lock()
    watched = LockWatch().see(real, "the lock")
    timers = [
        timeit.Timer("with lock: pass", timer=time.thread_time, globals={"lock": lock}) for lock in (real, watched)
    ]
    plain, more = ([timer.timeit(sections) / sections * 1e9 for _ in range(rounds)] for timer in timers)
    return statistics.median(more) - statistics.median(plain)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="how often each way is taken (default: 7)")
    parser.add_argument("--steps", type=int, default=20000, help="transfers of each thread (default: 20000)")
    arguments = parser.parse_args()
    if arguments.rounds < 1 or arguments.steps < 1:
        parser.error("--rounds and --steps must be at least 1")
    found: dict[tuple[str, str], list[float]] = {(way, column): [] for way in WAYS for column in COLUMNS}
    for _ in range(arguments.rounds):
        for way in WAYS:
            for column, (threads, watched) in COLUMNS.items():
                steps = arguments.steps * 2 // threads
                found[way, column].append(transfers_a_second(way, threads, steps, watched=watched))
    print(f"{'threads':18}" + "".join(f"{column:>14}" for column in COLUMNS))
    for way in WAYS:
        print(f"{way:18}" + "".join(f"{statistics.median(found[way, column]):>14,.0f}" for column in COLUMNS))
    print(f"a watched section: {nanoseconds_more(arguments.rounds):,.0f} ns more")


if __name__ == "__main__":
    main()

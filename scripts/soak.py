"""An hour of runs that nobody would think of, commands with mistakes in them, kills and sweeps: what breaks?

    python scripts/soak.py                        an hour, from a seed that it prints
    python scripts/soak.py --minutes 5 --seed 7   shorter, and the same items in the same order as any other of seed 7
    python scripts/soak.py --seed 7 --only 123    item 123 of seed 7 alone, as the summary has it of a finding

Exits with 1 where something was found, 130 after Ctrl-C. docs/soak.md says what is done and what it is held to.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Collection, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import numpy as np  # noqa: E402
from hypothesis.configuration import set_hypothesis_home_dir  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from soaking.commands import end_all  # noqa: E402
from soaking.draw import Draw  # noqa: E402
from soaking.items import KINDS, Items, Row  # noqa: E402
from soaking.places import EXAMPLES, Place  # noqa: E402

# Shares of items, to which --share adds that of whole commands.
SHARES = {"short": 50.0, "taken": 8.0, "refused": 36.0, "kill": 4.0, "sweep": 0.3}
SAID_SECONDS = 10.0
# Groups whose options take longer than their defaults.
SLOW = ("strategy", "schedule", "workload")
INTERRUPTED = 130
SHARED_MEMORY = Path("/dev/shm")


def main(arguments: Sequence[str] | None = None) -> int:
    asked = parsed(arguments)
    folder = asked.out or Path(tempfile.mkdtemp(prefix="soak-"))
    folder.mkdir(parents=True, exist_ok=True)
    # What Hypothesis keeps from one of its runs to the next is not for the working directory.
    set_hypothesis_home_dir(folder / "hypothesis")
    # The parts of scripts/examples are found here, too, where rules are asked.
    sys.path.append(str(EXAMPLES))
    # A finally clause below ends what runs.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    soak = Soak(asked.seed, folder, parts(asked), asked.jobs, asked.limit, SLOW if asked.quick else ())
    say(f"seed {asked.seed}, into {folder}")
    rows, interrupted = soak.run(asked.minutes * 60, asked.runs, asked.only)
    tell(rows, asked.seed, folder)
    if interrupted:
        return INTERRUPTED
    return 1 if any(row.findings for row in rows) else 0


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0, help="then no further item is begun (default: 60)")
    parser.add_argument("--runs", type=int, default=0, help="so many items at most; 0 is as many as there is time for")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6), help="(default: any)")
    parser.add_argument("--only", type=int, default=None, metavar="NUMBER", help="one item alone, and keep its folder")
    parser.add_argument("--share", type=float, default=0.05, help="of whole commands among items (default: 0.05)")
    parser.add_argument("--kinds", default=",".join(KINDS), help="of %(default)s")
    quick = "short runs only: threads in free order, which train"
    parser.add_argument("--quick", action="store_true", help=quick)
    limit = "seconds after which a run hangs; more on a machine that has other things to do (default: 150)"
    parser.add_argument("--limit", type=float, default=150.0, help=limit)
    parser.add_argument("--jobs", type=int, default=2, help="items at the same time (default: 2)")
    parser.add_argument("--out", type=Path, help="folder of log.jsonl and of what items with findings leave")
    asked = parser.parse_args(arguments)
    unknown = [each for each in asked.kinds.split(",") if each not in KINDS]
    if unknown or not 0 <= asked.share <= 1 or asked.jobs < 1 or asked.limit <= 60:
        parser.error(
            f"--kinds must be of {', '.join(KINDS)}, --share from 0 to 1, --jobs at least 1 and --limit above 60."
        )
    return asked


def parts(asked: argparse.Namespace) -> dict[str, float]:
    """Kind of item -> its share."""
    whole = {**SHARES, "command": sum(SHARES.values()) * asked.share / (1 - min(asked.share, 0.999))}
    return {kind: whole[kind] for kind in asked.kinds.split(",")}


class Soak:
    """Does items in threads, each with templates of its own, and logs what became of them."""

    def __init__(
        self,
        seed: int,
        folder: Path,
        shares: dict[str, float],
        jobs: int,
        limit_seconds: float,
        kept: Collection[str] = (),
    ) -> None:
        self.seed, self.folder, self.shares, self.jobs = seed, folder, shares, jobs
        self.limit_seconds = limit_seconds
        self.draw = Draw(files(folder), kept)
        self.own = threading.local()
        self.made: list[Items] = []

    def kind(self, number: int) -> str:
        chance = random.Random(f"{self.seed}/kind/{number}")
        return chance.choices(list(self.shares), list(self.shares.values()))[0]

    def run(self, seconds: float, most: int, only: int | None) -> tuple[list[Row], bool]:
        """Do items until the time is up; returns what came of them, and whether it was cut short."""
        rows: list[Row] = []
        before = shared_memory()
        begin, said = time.monotonic(), 0.0
        numbers = iter([only] if only is not None else range(most) if most else range(10**9))
        pool = ThreadPoolExecutor(self.jobs)
        waiting: set[Future[Row]] = set()
        interrupted = False
        with (self.folder / "log.jsonl").open("a", encoding="utf-8") as log:
            try:
                while True:
                    while len(waiting) < self.jobs and time.monotonic() - begin < seconds:
                        number = next(numbers, None)
                        if number is None:
                            break
                        waiting.add(pool.submit(self.item, number, only is not None))
                    if not waiting:
                        break
                    done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    for each in done:
                        note(rows, each.result(), log)
                    if time.monotonic() - said > SAID_SECONDS:
                        said = time.monotonic()
                        say(progress(rows, said - begin, seconds))
            except KeyboardInterrupt:
                interrupted = True
            finally:
                for each in self.made:
                    each.close()
                end_all()
                pool.shutdown(cancel_futures=True)
            for name in left_in_shared_memory(before):
                note(rows, Row(-1, "all", findings=[f"leak: left in shared memory: {name}"]), log)
        return rows, interrupted

    def item(self, number: int, keep: bool) -> Row:
        """One item, whose folder is kept where something was found."""
        if not hasattr(self.own, "items"):
            self.own.items = Items(self.seed, self.draw, self.limit_seconds)
            self.made.append(self.own.items)
        place = Place.made(self.folder / str(number), self.folder / "cache")
        try:
            row: Row = self.own.items.do(number, self.kind(number), place)
        except Exception:
            # Of the soak itself: it must not end the soak, and must not go unseen.
            row = Row(number, self.kind(number), findings=[f"the soak broke: {traceback.format_exc()}"])
        if not row.findings and not keep:
            place.remove()
        return row


def note(rows: list[Row], row: Row, log: IO[str]) -> None:
    rows.append(row)
    log.write(json.dumps(asdict(row)) + "\n")
    log.flush()
    for finding in row.findings:
        say(f"item {row.number} ({row.kind}): {finding}\n    {row.command[:2000]}")


def progress(rows: list[Row], elapsed: float, seconds: float) -> str:
    kinds = ", ".join(f"{number} {kind}" for kind, number in sorted(Counter(row.kind for row in rows).items()))
    found = sum(bool(row.findings) for row in rows)
    return f"{elapsed / 60:.1f} of {seconds / 60:g} min: {len(rows)} items ({kinds}); {found} with findings"


def tell(rows: list[Row], seed: int, folder: Path) -> None:
    """The summary: one line a kind, and what does each finding again."""
    table = Table("kind", "items", "killed", "resumed", "with findings", "median s", "most s", box=None)
    for kind in dict.fromkeys((*KINDS, *(row.kind for row in rows))):
        own = [row for row in rows if row.kind == kind]
        if own:
            taken = sorted(row.seconds for row in own)
            killed, resumed = (sum(getattr(row, each) for row in own) for each in ("killed", "resumed"))
            found = sum(bool(row.findings) for row in own)
            numbers = (len(own), killed, resumed, found, f"{taken[len(own) // 2]:.1f}", f"{taken[-1]:.1f}")
            table.add_row(kind, *map(str, numbers))
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    statuses = Counter(str(row.verdict or f"status {row.status}") for row in rows)
    print(", ".join(f"{number} {word}" for word, number in statuses.most_common()))
    for row in rows:
        if row.findings:
            print(f"\nitem {row.number} ({row.kind}): python scripts/soak.py --seed {seed} --only {row.number}")
            print(f"  {row.command[:2000]}\n  " + "\n  ".join(row.findings))
    print(f"\n{folder / 'log.jsonl'}")


def files(folder: Path) -> dict[str, tuple[str, ...]]:
    """Files of arrays for the options of `data` that read one, made here."""
    random_ = np.random.default_rng(0)
    images, flat, digits = folder / "images.npz", folder / "flat.npz", folder / "mnist.npz"
    labels = random_.integers(0, 5, 600)
    np.savez(images, x=random_.integers(0, 256, (600, 12, 8, 3), np.uint8), y=labels)
    np.savez(flat, train_x=random_.normal(size=(600, 7)), train_y=labels, test_x=np.ones((9, 7)), test_y=labels[:9])
    x, y = random_.integers(0, 256, (600, 28, 28), np.uint8), random_.integers(0, 10, 600).astype(np.uint8)
    np.savez(digits, x_train=x, y_train=y, x_test=x[:50], y_test=y[:50])
    return {"npz": (str(images), str(flat)), "mnist": (str(digits),)}


def shared_memory() -> set[str]:
    return {each.name for each in SHARED_MEMORY.iterdir()} if SHARED_MEMORY.is_dir() else set()


def left_in_shared_memory(before: set[str]) -> list[str]:
    """What has come since, and is no living process's. joblib's is another program's: the soak runs nothing by it."""
    names = {name for name in shared_memory() - before if not name.startswith(("sem.loky-", "joblib_"))}
    for process in filter(str.isdecimal, os.listdir("/proc")) if names else ():
        with suppress(OSError):
            maps = Path(f"/proc/{process}/maps").read_text(encoding="utf-8", errors="replace")
            links = [os.readlink(each) for each in Path(f"/proc/{process}/fd").iterdir()]
            names -= {name for name in names if f"/dev/shm/{name}" in maps or f"/dev/shm/{name}" in links}
    return sorted(names)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())

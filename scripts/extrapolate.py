"""Speed, lock waiting, staleness and lost updates of 1 to 10,000 replicas, predicted from a run's own profile.

    python scripts/extrapolate.py                               makes four short runs, and predicts from them
    python scripts/extrapolate.py RUN_FOLDER...                 from these, made with audit=profile
    python scripts/extrapolate.py RUN_FOLDER --modes locked,overwrite --replicas 1,10,100,1000 --cores-per-replica 1
    python scripts/extrapolate.py RUN_FOLDER --group-sizes 0,8 --local-steps 10 --cores-per-replica 1
    python scripts/extrapolate.py --check 1,2,4,8,16            and holds predictions to real runs
    python scripts/extrapolate.py --check 64 --with train.batch_size=16
    python scripts/extrapolate.py outputs/extrapolate/TIME/calibration.json --replicas 1,10000

A discrete-event simulation: each replica draws how long the pieces of its step take from what was measured, and waits
for cores, locks, barriers and messages as the update mode has it. docs/extrapolate.md says what is modelled, what is
not, and how well it agrees with real runs.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts"), str(ROOT / "scripts" / "rivals")]

from bench_speed import tables as shown  # noqa: E402
from extrapolation import check, pieces, plot, tables  # noqa: E402
from extrapolation.modes import MODES  # noqa: E402
from extrapolation.network import ALGORITHMS, Network  # noqa: E402
from extrapolation.pieces import BadRun, Calibration  # noqa: E402
from extrapolation.predict import Prediction, predict, switch_seconds  # noqa: E402
from extrapolation.simulate import Setting  # noqa: E402
from rich.console import Console  # noqa: E402

REPLICAS = [1, 2, 4, 8, 16, 64, 256, 1000, 10000]
MOST = 10_000
CORES = len(os.sched_getaffinity(0))
# The runs that are made where none is given: one replica alone, one on each core, and so many that cores change hands.
CALIBRATING = (("locked", 1), ("locked", CORES), ("all_reduce", max(2, CORES)), ("locked", 4 * CORES))
INTERPRETED = ("torchscript", "inductor", "eager")  # engines whose loop holds the interpreter's lock
INTERRUPTED = 130
WIDTH = 160


def main(arguments: Sequence[str] | None = None) -> int:
    asked = parsed(arguments)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        with tempfile.TemporaryDirectory() as runs:
            calibration = calibrated(asked, Path(runs))
            tell(calibration, asked, Path(runs))
    except (BadRun, OSError) as error:
        print(f"extrapolate: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN_FOLDER", help="or a calibration.json of before")
    parser.add_argument("--modes", type=several(MODES), default=list(MODES), help=f"of {', '.join(MODES)}")
    parser.add_argument("--replicas", type=numbers(MOST), default=REPLICAS, help=f"1 to {MOST:,}, as in 1,2,4")
    parser.add_argument("--group-sizes", type=numbers(MOST, least=0), default=[0], help="replicas a process; 0 is flat")
    parser.add_argument("--local-steps", type=positive(int), default=1, help="between two averages over processes")
    cores = parser.add_mutually_exclusive_group()
    cores.add_argument("--cores", type=positive(int), help="of one machine for all (default: the run's); flat only")
    cores.add_argument("--cores-per-replica", type=positive(float), help="each process has a machine for itself")
    parser.add_argument("--without-gil", action="store_true", help="as though nothing held the interpreter's lock")
    parser.add_argument("--variables", type=positive(int), default=4, help="that are locked or written one by one (4)")
    parser.add_argument(
        "--alpha-us", type=positive(float), default=50.0, help="of a message (50: TCP in a data centre)"
    )
    parser.add_argument("--gbit", type=positive(float), default=10.0, help="a second between processes (10: Ethernet)")
    parser.add_argument("--gradient-mb", type=positive(float), default=2.68, help="(2.68: MLP 784-512-512-10, float32)")
    parser.add_argument("--algorithm", choices=ALGORITHMS, default="ring", help="of the all-reduce (ring)")
    parser.add_argument("--means", action="store_true", help="each piece takes its mean, and is not drawn")
    parser.add_argument("--updates", type=positive(int), default=4000, help="simulated at least; 3 a replica (4000)")
    parser.add_argument("--seeds", type=positive(int), default=3, help="simulations of each; their spread is told (3)")
    parser.add_argument("--check", type=numbers(64), metavar="REPLICAS", help="make real runs, and compare")
    parser.add_argument(
        "--with", nargs="+", default=[], dest="overrides", metavar="KEY=VALUE", help="for the runs made"
    )
    parser.add_argument("--out", type=Path, help="folder of the files (default: outputs/extrapolate/TIME)")
    return parser.parse_args(arguments)


def calibrated(asked: argparse.Namespace, runs: Path) -> Calibration:
    """What the given runs say, or those that are made for it.

    Raises:
        BadRun: a folder says nothing, or a run did not come to its end.
    """
    if not asked.runs:
        folders = []
        for mode, replicas in dict.fromkeys(CALIBRATING):
            say(f"calibrating: update_mode={mode} num_replicas={replicas}")
            # As in runs with more replicas, which have no cores to spare.
            each = ["train.threads_per_replica=1", *asked.overrides]
            folders.append(check.make(mode, replicas, runs / "calibrating", each))
        asked.runs = folders
    found: list[pieces.Pieces] = []
    for path in asked.runs:
        found += read_file(path).runs if path.suffix == ".json" else [pieces.read(path)]
    return Calibration(tuple(each.as_means() if asked.means else each for each in found))


def read_file(path: Path) -> Calibration:
    try:
        return pieces.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadRun(f"{path} is no calibration.json of scripts/extrapolate.py: {error}.") from None


def tell(calibration: Calibration, asked: argparse.Namespace, runs: Path) -> None:
    """Predict, and check where that is asked for; print the tables and leave the files."""
    out = asked.out or ROOT / "outputs" / "extrapolate" / time.strftime("%Y-%m-%d_%H-%M-%S")
    out.mkdir(parents=True, exist_ok=True)
    (out / "calibration.json").write_text(json.dumps(pieces.as_json(calibration)), encoding="utf-8")
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    shown.show([tables.pieces(calibration)], console)
    asked.switch_seconds = 0.0
    asked.switch_seconds = switch_seconds(
        calibration, lambda mode, replicas: setting(calibration, asked, mode, replicas)
    )
    console.print(f"It takes a core {1e6 * asked.switch_seconds:.0f} us to go over to another thread.")
    if asked.check:
        compared: list[check.Compared] = []
        for lines in checked(calibration, asked, runs):
            compared += lines
            every = [tables.comparisons(compared), tables.errors(compared)]
            # After each run: whatever ends the program, those before are there.
            (out / "check.md").write_text(shown.markdown(every) + "\n", encoding="utf-8")
        if not compared:
            raise BadRun("--check: no run came to its end.")
        shown.show(every, console)
    else:
        rows = predictions(calibration, asked)
        shown.show([tables.predictions(rows)], console)
        tables.write_csv(rows, out / "predictions.csv")
        plot.save(rows, out / "extrapolation.png")
    print("\n".join(str(path) for path in sorted(out.iterdir())))


def predictions(calibration: Calibration, asked: argparse.Namespace) -> list[Prediction]:
    found = []
    for mode in asked.modes:
        for group_size in asked.group_sizes:
            for replicas in asked.replicas:
                if group_size < max(replicas, 1) or not group_size:
                    one = setting(calibration, asked, mode, replicas, group_size)
                    found.append(predict(calibration.of(mode, replicas), one, range(asked.seeds)))
                    say(f"{mode} {one.layout} {replicas:,}: {found[-1].micro_steps_per_second:,.0f} micro-steps/s")
    return found


def setting(
    calibration: Calibration, asked: argparse.Namespace, mode: str, replicas: int, group_size: int = 0
) -> Setting:
    made_of = calibration.of(mode, replicas)
    one_machine = asked.cores_per_replica is None and not group_size
    return Setting(
        mode,
        replicas,
        group_size=group_size,
        local_steps=asked.local_steps,
        cores=(asked.cores or made_of.cores) if one_machine else None,
        cores_per_replica=asked.cores_per_replica or 1.0,
        has_gil=made_of.engine in INTERPRETED and not asked.without_gil,
        num_variables=asked.variables,
        switch_seconds=asked.switch_seconds,
        updates=asked.updates,
        network=Network(asked.alpha_us * 1e-6, 8e-9 / asked.gbit, asked.gradient_mb * 1e6, asked.algorithm),
    )


def checked(calibration: Calibration, asked: argparse.Namespace, runs: Path) -> Iterator[list[check.Compared]]:
    """Make a real run of each mode with so many replicas, and hold the prediction to it."""
    overrides = [*check.overrides_of(calibration.runs[0].command), *asked.overrides]
    for mode in asked.modes:
        for replicas in asked.check:
            say(f"running: update_mode={mode} num_replicas={replicas}")
            try:
                real = check.measured(check.make(mode, replicas, runs / "checking", dict.fromkeys(overrides)))
            except BadRun as error:
                say(f"left out: {error}")
                continue
            # As many micro-steps as the run took: what is lost depends on how many there were.
            one = replace(setting(calibration, asked, mode, replicas), updates=check.MICRO_STEPS)
            yield check.compared(predict(calibration.of(mode, replicas), one, range(asked.seeds)), real)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def several(known: Iterable[str]) -> Callable[[str], list[str]]:
    known = list(known)

    def read(text: str) -> list[str]:
        found = [each for each in text.split(",") if each]
        for each in found:
            if each not in known:
                raise argparse.ArgumentTypeError(f"must be of {', '.join(known)}; got '{each}'.")
        return found

    return read


def numbers(most: int, least: int = 1) -> Callable[[str], list[int]]:
    def read(text: str) -> list[int]:
        found = text.split(",")
        if not all(each.isdecimal() and least <= int(each) <= most for each in found):
            raise argparse.ArgumentTypeError(f"must be numbers from {least} to {most:,}, as in 1,2,4; got '{text}'.")
        return [int(each) for each in found]

    return read


def positive(kind: Callable[[str], float]) -> Callable[[str], float]:
    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"must be above 0; got '{text}'.")
        return value

    return read


if __name__ == "__main__":
    sys.exit(main())

"""Speed of every update mode beside what others do the same with: one table, all measured in turn.

    python scripts/bench.py                              what the goals need: under 20 minutes once compiled
    python scripts/bench.py --quick                      whether it works: a minute, and no figure to quote
    python scripts/bench.py --all --replicas 1,2,4 --minutes 600    every mode, precision, audit and rival: hours
    python scripts/bench.py --models mlp --contenders threads/locked,hogwild --rounds 5
    python scripts/bench.py --from FOLDER/results.csv    the tables, the goals and the plot again
    python scripts/bench.py --from FOLDER/results.csv --write-docs    and into docs/speed.md

docs/speed.md says how it is measured and how to read it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts"), str(ROOT / "scripts" / "rivals")]

from bench_speed import plan, plot, results, tables  # noqa: E402
from bench_speed.contenders import ENGINES, Ours, contenders  # noqa: E402
from bench_speed.measure import Meter, here  # noqa: E402
from bench_speed.plan import Measurement  # noqa: E402
from bench_speed.results import Row  # noqa: E402
from cases import CASES  # noqa: E402
from rich.console import Console  # noqa: E402

from trainer.report.claims import replaced  # noqa: E402
from trainer.whole_file import whole  # noqa: E402

PAGE = ROOT / "docs" / "speed.md"
BEGIN, END = "<!-- speed: python scripts/bench.py -->", "<!-- end of speed -->"
MODELS = ("small_mlp", "mlp", "cnn", "transformer")
QUICK = ("threads/all_reduce/torchscript", "hogwild", "plain_torch")
INTERRUPTED = 130
WIDTH = 160


def main(arguments: Sequence[str] | None = None) -> int:
    asked = parsed(arguments)
    try:
        if asked.lists:
            for one in planned(asked, known_engines(asked.engines)):
                print(f"{one.kind:<7} {one.model:<12} {one.contender.name} {one.replicas}")
            return 0
        if asked.source:
            path = asked.source
            interrupted = False
        else:
            path, interrupted = measured(asked)
        rows = results.read(path)
        if rows:
            tell(rows, path, asked.write_docs)
    except (Mistake, results.BadFile, OSError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    return INTERRUPTED if interrupted else 0


class Mistake(ValueError):
    """In what was asked for, told in one line."""


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=several(CASES), default=list(MODELS), help=f"of {', '.join(CASES)}")
    parser.add_argument("--replicas", type=numbers, default=[1, 2], help="1 to 64, as in 1,2,4 (default: 1,2)")
    parser.add_argument("--contenders", type=split, default=[], help="names or their beginnings, up to a slash")
    parser.add_argument(
        "--engines",
        type=several((*ENGINES, "auto")),
        default=["auto"],
        help="of torchscript, inductor, native; auto is the last of them that works here (default: auto)",
    )
    parser.add_argument("--rounds", type=positive(int), default=3, help="each takes everybody once (default: 3)")
    parser.add_argument("--seconds", type=positive(float), default=1.5, help="of training, each time (default: 1.5)")
    limit = "a round that would not end by then is left out (default: 30)"
    parser.add_argument("--minutes", type=positive(float), default=30.0, help=limit)
    parser.add_argument("--cores", type=positive(int), default=2, help="that everybody shares (default: 2)")
    parser.add_argument("--out", type=Path, help="folder of results.csv and speed.png (default: outputs/bench/TIME)")
    parser.add_argument("--all", action="store_true", dest="everything", help="every contender, not what goals need")
    parser.add_argument("--list", action="store_true", dest="lists", help="print what would be measured, and end")
    parser.add_argument("--quick", action="store_true", help="three contenders, the small MLP, one short round")
    parser.add_argument("--from", type=Path, dest="source", metavar="CSV", help="measure nothing: tell of this file")
    parser.add_argument("--write-docs", action="store_true", help="put tables and plot into docs/speed.md")
    asked = parser.parse_args(arguments)
    if asked.quick:
        asked.models, asked.contenders, asked.engines = ["small_mlp"], list(QUICK), ["torchscript"]
        asked.rounds, asked.seconds = 1, 0.3
    return asked


def measured(asked: argparse.Namespace) -> tuple[Path, bool]:
    """Measure everything that is asked for; returns the file, and whether it was cut short by Ctrl-C.

    Raises:
        Mistake: a contender that cannot be measured as asked.
        OSError: the folder cannot be made, or has results already.
    """
    # Whichever engine it will be: a mistake is told before anything is made.
    planned(asked, known_engines(asked.engines))
    keep_to(asked.cores)
    meter = Meter(asked.seconds, here())
    folder = asked.out or ROOT / "outputs" / "bench" / time.strftime("%Y-%m-%d_%H-%M-%S")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "results.csv"
    results.begin(path)
    # A finally clause below ends what runs.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        todo = planned(asked, engines(asked.engines, meter, path))
        take_rounds(todo, asked.rounds, asked.minutes, meter, path)
    except KeyboardInterrupt:
        say(f"interrupted; {path} has what was measured")
        return path, True
    return path, False


def planned(asked: argparse.Namespace, wanted: Sequence[str]) -> list[Measurement]:
    everybody = contenders(tuple(dict.fromkeys((*ENGINES, *wanted))))
    if not asked.everything and not asked.contenders:
        return plan.default(everybody, wanted, asked.models, asked.replicas)
    every = plan.everything(everybody, ENGINES, asked.models, asked.replicas)
    if asked.contenders:
        for name in asked.contenders:
            if not plan.named(every, [name], wanted):
                known = any(f"{one}/".startswith(f"{name}/") for one in everybody)
                takes = f"takes none of --replicas {','.join(map(str, asked.replicas))}" if known else "is not known"
                raise Mistake(f"--contenders: {name} {takes}. --list --all prints who takes how many.")
        return plan.named(every, asked.contenders, wanted)
    return [one for one in every if getattr(one.contender, "engine", "") in ("", *wanted)]


def known_engines(names: Sequence[str]) -> list[str]:
    """The engines asked for, with `auto` as the last one that there may be."""
    return list(dict.fromkeys(ENGINES[-1] if name == "auto" else name for name in names))


def engines(names: Sequence[str], meter: Meter, path: Path) -> list[str]:
    """The engines asked for, with `auto` as the last of all that a run of one step gets through with."""
    found = [name for name in names if name != "auto"]
    if "auto" not in names:
        return found
    for name in reversed(ENGINES):
        row = meter.take(Measurement("start", Ours("threads", "all_reduce", name), "small_mlp", 1), 0)
        if not row.error:
            return list(dict.fromkeys((*found, name)))
        results.add(path, row)
        say(f"train.engine={name} is left out: {row.error}")
    raise Mistake("--engines: none of them gets through a run of one step.")


def take_rounds(todo: list[Measurement], rounds: int, minutes: float, meter: Meter, path: Path) -> None:
    """Take whole rounds: all of them, or as many as there is time for, and at least one."""
    begin = time.monotonic()
    for number in range(1, rounds + 1):
        took = take_round(todo, number, rounds, meter, path)
        if not took or number == rounds:
            return
        # Not the mean: the first round may have compiled, which no other one does.
        another = statistics.median(took) * len(todo)
        if time.monotonic() - begin + another > 60 * minutes:
            say(f"{number} of {rounds} rounds: another one would end after --minutes {minutes:g}")
            return


def take_round(todo: list[Measurement], number: int, rounds: int, meter: Meter, path: Path) -> list[float]:
    """Take each once, and return the seconds of each; what fails is a row with its reason and not tried again."""
    took: list[float] = []
    for done, one in enumerate(plan.in_turn(todo, number), start=1):
        begin = time.monotonic()
        row = meter.take(one, number)
        results.add(path, row)
        took.append(time.monotonic() - begin)
        if row.error:
            todo.remove(one)
        speed = f"{row.micro_steps_per_second:,.0f}/s" if row.micro_steps_per_second else row.error
        left = statistics.median(took) * (len(todo) - done + (rounds - number) * len(todo))
        what = "" if one.kind == "speed" else f" ({one.kind})"
        say(
            f"round {number} of {rounds}, {done} of {len(todo)}: {one.model} {one.contender.name} "
            f"{one.replicas}{what}: {speed}; about {left / 60:.0f} min left"
        )
    return took


def keep_to(cores: int) -> None:
    """Keep this process, and all that it starts, to so many of the cores that it may use, or to all that there are."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])


def tell(rows: list[Row], path: Path, write_docs: bool) -> None:
    """Print the tables, draw the plot beside the file, and put both into the documentation if asked to."""
    every = tables.tables(rows)
    # What goes to a file or a pipe need not fit a window.
    tables.show(every, Console(width=None if sys.stdout.isatty() else WIDTH))
    picture = path.with_name("speed.png")
    drawn = any(row.kind == "speed" and not row.error for row in rows)
    if drawn:
        plot.save(rows, picture)
    print(f"{rows[0].machine}\n{path}" + (f"\n{picture}" if drawn else ""))
    if write_docs:
        if not drawn:
            raise Mistake(f"--write-docs: {path} has no speeds.")
        text = f"Measured on {rows[0].machine}.\n\n![Micro-steps per second](speed.png)\n\n{tables.markdown(every)}"
        with whole(PAGE) as partial:
            partial.write_text(replaced(PAGE.read_text(encoding="utf-8"), text, BEGIN, END), encoding="utf-8")
        with whole(PAGE.with_name("speed.png")) as partial:
            shutil.copyfile(picture, partial)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def split(text: str) -> list[str]:
    return [each for each in text.split(",") if each]


def several(known: Iterable[str]) -> Callable[[str], list[str]]:
    known = list(known)

    def read(text: str) -> list[str]:
        for each in split(text):
            if each not in known:
                raise argparse.ArgumentTypeError(f"must be of {', '.join(known)}; got '{each}'.")
        return split(text)

    return read


def numbers(text: str) -> list[int]:
    if not all(each.isdecimal() and 1 <= int(each) <= 64 for each in split(text)):
        raise argparse.ArgumentTypeError(f"must be numbers from 1 to 64, as in 1,2,4; got '{text}'.")
    return [int(each) for each in split(text)]


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

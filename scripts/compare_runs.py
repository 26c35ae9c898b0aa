"""Put two runs beside each other: configurations, results, guarantees, and the first step at which they part.

python scripts/compare_runs.py A B                  A and B are runs' folders; the plot goes beside A
python scripts/compare_runs.py A B --output FILE    where the plot goes

Runs of audit=full are compared at every step, others where their event files have points (train.log_every).
Exit status: 0 the same; 1 different; 2 bad input, told on one line.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from trainer.audit.read import Unreadable  # noqa: E402
from trainer.report.compare import compare  # noqa: E402
from trainer.report.compare_show import draw, show  # noqa: E402
from trainer.report.console import standard_output  # noqa: E402


class Refused(Exception):
    """The user's mistake, on one line."""


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        asked = parser().parse_args(arguments)
        what = compare(asked.first, asked.second)
        path = asked.output or beside(asked.first, asked.second)
        drawn = draw(what, path)
    except (Refused, Unreadable) as mistake:
        return refuse(str(mistake))
    except OSError as problem:
        return refuse(f"{path} cannot be written: {problem.strerror or problem}. --output says where else.")
    show(what, standard_output())
    print(path if drawn else "no plot: neither run has a loss.")
    return 0 if what.same else 1


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("first", metavar="A", type=Path, help="a run's folder")
    found.add_argument("second", metavar="B", type=Path, help="another one's")
    found.add_argument(
        "--output", metavar="FILE", type=Path, help="the plot, a PNG file. Default: A_beside_B.png beside A"
    )

    def fail(message: str) -> NoReturn:
        raise Refused(f"{message}. --help says what it takes.")

    found.error = fail  # type: ignore[method-assign]
    return found


def beside(first: Path, second: Path) -> Path:
    return first.parent / f"{first.resolve().name}_beside_{second.resolve().name}.png"


def refuse(mistake: str) -> int:
    print(f"compare_runs: {' '.join(mistake.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())

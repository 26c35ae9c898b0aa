"""Measure the claims of the founding documents and put what they came to into README.md and docs/claims.md.

python scripts/claims.py                  measure all, rewrite both tables
python scripts/claims.py --check          measure what is certain; exit status 1 where README.md says otherwise
python scripts/claims.py --print S1.1 S4  measure these and print their rows
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from trainer.claims.claim import Claim  # noqa: E402
from trainer.claims.measure import CannotMeasure, measure  # noqa: E402
from trainer.claims.table import CLAIMS  # noqa: E402
from trainer.report.claims import between, free_table, replaced, table  # noqa: E402
from trainer.whole_file import whole  # noqa: E402

README, PAGE = ROOT / "README.md", ROOT / "docs" / "claims.md"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="CLAIM", help="S1.1 for one, S1 for all of a document")
    parser.add_argument("--check", action="store_true", help="compare with README.md, write nothing")
    parser.add_argument("--print", action="store_true", dest="prints", help="print the rows, write nothing")
    asked = parser.parse_args(arguments)
    claims = wanted(asked.names)
    if not claims:
        known = ", ".join(each.name for each in CLAIMS)
        parser.error(f"no claim is called {' or '.join(asked.names)}; there are {known}")
    if asked.names and not (asked.prints or asked.check):
        parser.error("the tables are written whole: leave the names out, or add --print or --check")
    try:
        found = measure(claims, free=not asked.check, report=say)
    except CannotMeasure as error:
        print(f"claims: {error}", file=sys.stderr)
        return 3
    rows = table(claims, [measured for measured, _ in found])
    if asked.check:
        return check(rows)
    frequencies = free_table(claims, [told for _, told in found])
    if asked.prints:
        print(f"{rows}\n\n{frequencies}")
        return 0
    for path, text in ((README, rows), (PAGE, frequencies)):
        with whole(path) as partial:
            partial.write_text(replaced(path.read_text(encoding="utf-8"), text), encoding="utf-8")
    return 0


def say(command: str) -> None:
    print(command, file=sys.stderr, flush=True)


def wanted(names: Sequence[str]) -> list[Claim]:
    """The claims of these names, or of documents of these names; all where none is named."""
    return [each for each in CLAIMS if not names or {each.name, each.name.partition(".")[0]} & set(names)]


def check(rows: str) -> int:
    """Exit status 1, and the rows, where README.md has other ones."""
    said = set(between(README.read_text(encoding="utf-8")).splitlines())
    off = [row for row in rows.splitlines() if row not in said]
    print("\n".join(off) if off else "README.md says what was measured.")
    return 1 if off else 0


if __name__ == "__main__":
    sys.exit(main())

"""Move the upper bounds of the packages whose internals we lean on up to their newest releases.

Each requirement in pyproject.toml becomes NAME>=LOWER,<=UPPER, and its exact pin in constraints.txt moves with it. The
newest release is the one that pip finds with the indexes that you have set up. No bound is ever lowered. Exit status:
0; 1 with --check if something would change; 2 if it cannot be told or written, and then both files are as they were.
"""

from __future__ import annotations

import argparse
import difflib
import platform
import shutil
import sys
from collections.abc import Iterable
from contextlib import ExitStack
from io import StringIO
from pathlib import Path

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.utils import canonicalize_name
from pin_files import Constraints, Pyproject
from pins import Unfit
from releases import NoAnswer, newest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from trainer.whole_file import whole  # noqa: E402

PACKAGES = ("tensorflow", "keras", "torch", "hydra-core", "tensorboard")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", nargs="*", metavar="PACKAGE", help=f"(default: {' '.join(PACKAGES)})")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="say what would change, a line for each pin")
    what.add_argument("--dry-run", action="store_true", help="show what would change, as a unified diff")
    parser.add_argument("--folder", type=Path, default=ROOT, help="where both files are (default: the checkout)")
    given = parser.parse_args()
    try:
        return bump(given.folder, given.packages or PACKAGES, check=given.check, dry_run=given.dry_run)
    except (Unfit, NoAnswer, OSError) as error:
        print(f"bump_pins: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def bump(folder: Path, packages: Iterable[str], *, check: bool, dry_run: bool) -> int:
    """From both files to the exit status.

    Raises:
        Unfit: something in them cannot be brought into form.
        NoAnswer: the newest release of a package cannot be known.
        OSError: a file cannot be read or written.
    """
    paths = [folder / Pyproject.file, folder / Constraints.file]
    old = [path.read_bytes() for path in paths]
    new, changes = moved([_decoded(path, content) for path, content in zip(paths, old, strict=True)], packages)
    if dry_run:
        for path, before, after in zip(paths, old, new, strict=True):
            sys.stdout.buffer.write(diff(path.name, before.decode(), after).encode())
        return 0
    if changes and not check:
        write(paths, old, new)
    print("\n".join(changes) or "nothing to change")
    return 1 if changes and check else 0


def moved(texts: list[str], packages: Iterable[str]) -> tuple[list[str], list[str]]:
    """Both files' texts with the pins moved, and a line for each that was.

    Raises:
        Unfit: something in them cannot be brought into form.
        NoAnswer: the newest release of a package cannot be known.
    """
    pyproject, constraints = Pyproject(texts[0]), Constraints(texts[1])
    _check_python(pyproject.requires_python)
    names = [canonicalize_name(package) for package in packages]
    # Nobody waits for pip to be told of a mistake.
    for name in names:
        if not pyproject.names(name):
            raise Unfit(f"{pyproject.file} does not name {name}")
    pinned = {name: constraints.pinned(name) for name in names}
    changes = []
    for name in names:
        release = newest(name)
        changes += pyproject.bound(name, release, pinned[name])
        changes += constraints.move(name, release)
    return [pyproject.text, constraints.text], changes


def _check_python(required: str) -> None:
    # pip answers for the Python that it runs on.
    try:
        fits = SpecifierSet(required).contains(platform.python_version(), prereleases=True)
    except InvalidSpecifier as error:
        raise Unfit(f"{Pyproject.file}: requires-python: {error}") from None
    if not fits:
        raise Unfit(f"requires-python is {required}; run this with such a Python, not {platform.python_version()}")


def _decoded(path: Path, content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise Unfit(f"{path.name} must be UTF-8; {error}") from None


def diff(name: str, old: str, new: str) -> str:
    """A unified diff, as `git apply` and `patch -p1` take it; empty where nothing changes."""
    # Lines end at a line feed alone: what else a comment may hold is not for a diff to break at.
    before, after = (StringIO(text, newline="\n").readlines() for text in (old, new))
    return "".join(
        line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n"
        for line in difflib.unified_diff(before, after, f"a/{name}", f"b/{name}")
    )


def write(paths: list[Path], old: list[bytes], new: list[str]) -> None:
    """Put new texts in place of old ones, all or none; their first is the first to get there.

    Raises:
        Unfit: somebody else has written one of them since it was read.
        OSError: they cannot be written.
    """
    with ExitStack() as stack:
        # All are written before any gets to its place, and the last to be entered is the first there: bounds before the
        # exact pins, so that whoever is killed in between leaves pins that are within their bounds.
        for path, before, text in reversed(list(zip(paths, old, new, strict=True))):
            if text.encode() != before:
                partial = stack.enter_context(whole(path.resolve()))
                partial.write_bytes(text.encode())
                shutil.copymode(path, partial)
        if [path.read_bytes() for path in paths] != old:
            raise Unfit("the files were written by somebody else meanwhile; run it again")


if __name__ == "__main__":
    sys.exit(main())

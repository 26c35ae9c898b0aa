"""`python -m trainer report FOLDER...`: table, CSV file, plot and page again, from what runs have left."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.text import Text

from trainer.audit.verdict import FILE_NAME
from trainer.report import sweep
from trainer.report.console import standard_output
from trainer.report.rows import Row, find, holds_runs

DESCRIPTION = """\
Makes the table, sweep.csv, sweep.png and report.html again, from the verdict.json of every run in and below the
folders. Runs that broke, were refused, or are under way are rows too; the plot says how many it leaves out. report.html
is one page with all of it, which needs neither other files nor the network. In the folder that the runs lie below it
also makes what TensorBoard shows first.
"""
EPILOG = (
    "Exit status: 0, whatever the verdicts are; 2 a folder is missing or holds no run, or a file cannot be written."
)


class _Refused(Exception):
    """The user's mistake, on one line."""


def report(arguments: list[str]) -> int:
    """Do what the arguments ask for, and return the exit status."""
    try:
        asked = _parser().parse_args(arguments)
        return _report(*_checked(asked.folders, asked.output), asked.junit)
    except _Refused as mistake:
        print(f"trainer: {' '.join(str(mistake).split())}", file=sys.stderr)
        return 2


def _report(folders: list[Path], output: Path, test_results: Path | None) -> int:
    rows, console = find(*folders), standard_output()
    try:
        output.mkdir(parents=True, exist_ok=True)
        sweep.write_csv(rows, output)
    except FileExistsError:
        raise _Refused(f"report: {output} is a file; give a folder as --output.") from None
    except OSError as problem:
        raise _Refused(f"{sweep.cannot_write(output, problem)} --output says where else.") from None
    sweep.show(rows, console, str(output / sweep.CSV_NAME))
    made = [sweep.plot(rows, output, console), sweep.page(rows, folders, output, console)]
    if [folder.resolve() for folder in folders] == [output.resolve()]:
        made.append(sweep.board(rows, output, console))
    if test_results is not None:
        made.append(_write_test_results(rows, folders, test_results, console))
    sweep.tell_viewer(folders, console)
    return 0 if all(made) else 2


def _write_test_results(rows: list[Row], folders: list[Path], path: Path, console: Console) -> bool:
    from trainer.report import junit

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        junit.write(rows, folders, path)
    except OSError as problem:
        raise _Refused(sweep.cannot_write(path, problem)) from None
    console.print(Text(str(path)), soft_wrap=True)
    return True


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m trainer report",
        usage="python -m trainer report FOLDER... [--output FOLDER] [--junit FILE]",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "folders",
        metavar="FOLDER",
        nargs="*",
        type=Path,
        help="a run's, a sweep's, or one that holds some; the runs of several are one table",
    )
    parser.add_argument(
        "--output",
        metavar="FOLDER",
        type=Path,
        help="where sweep.csv, sweep.png and report.html go, over older ones; made if it is not there. Default: FOLDER "
        "itself; with several, the working directory",
    )
    parser.add_argument(
        "--junit",
        metavar="FILE",
        type=Path,
        help="write an XML file of test results for build servers too: a suite for each run, a case for its verdict "
        "and for each guarantee that it claimed or that was required",
    )

    def fail(message: str) -> NoReturn:
        raise _Refused(f"report: {message}. `python -m trainer report --help` says what it takes.")

    parser.error = fail  # type: ignore[method-assign]
    return parser


def _checked(folders: list[Path], output: Path | None) -> tuple[list[Path], Path]:
    """The folders, without those that others of them hold, and where the files go.

    Raises:
        _Refused: there is no folder, or one that is missing or holds no run.
    """
    if not folders:
        raise _Refused("report takes folders of runs or sweeps, as in `python -m trainer report multirun`; got none.")
    for folder in folders:
        if not folder.exists():
            raise _Refused(f"report: {folder} does not exist.")
        if not folder.is_dir():
            raise _Refused(f"report: {folder} is a file; give the folder that holds it.")
        if not os.access(folder, os.R_OK | os.X_OK):
            raise _Refused(f"report: {folder} cannot be read: no permission.")
        if not holds_runs(folder):
            raise _Refused(f"report: {folder} holds no run: no {FILE_NAME} in or below it.")
    apart = [folder for folder in folders if not any(_holds(other, folder) for other in folders)]
    once = list({folder.resolve(): folder for folder in apart}.values())
    return once, output or (once[0] if len(once) == 1 else Path())


def _holds(folder: Path, other: Path) -> bool:
    return folder.resolve() in other.resolve().parents

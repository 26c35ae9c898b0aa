"""Runs as test results in JUnit's XML, which build servers read: a suite for each run.

A suite has a case `verdict` and one for each guarantee that the run claimed or that was required. A guarantee that was
violated is a failure, with its witness; one that was not checked is skipped. A run that broke, or left no verdict to
read, is an error, and so is a sweep some of whose runs never began. `verdict` fails where the verdict alone makes the
run fail, as `fail_on=anomaly` has it. A run that was refused is skipped, as it is no failure of its sweep, unless all
were.

Written with the standard library: the format is a dozen elements, and a library for it would be one more to pin.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from trainer.audit.verdict import WORDS, Guarantee, Verdict, exit_status
from trainer.report import words
from trainer.report.planned import jobs_of, planned
from trainer.report.rows import Row
from trainer.whole_file import whole

# What no XML file can hold, however it is escaped.
NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
PROPERTIES = ("command", "strategy", "update_mode", "num_replicas", "model", "precision", "schedule", "seed")


class Case(NamedTuple):
    """One test case; `outcome` is the element inside it, and nothing where it passed."""

    name: str
    outcome: str = ""
    kind: str = ""
    message: str = ""
    text: str = ""


def write(rows: Sequence[Row], folders: Sequence[Path], path: Path) -> None:
    """Write the file, so that a reader sees the whole file or none.

    Args:
        folders: in which the rows were found.

    Raises:
        OSError: it cannot be written.
    """
    root = ElementTree.Element("testsuites", name="trainer")
    all_refused = bool(rows) and all(row.error.get("kind") == "refused" for row in rows)
    for row in rows:
        place = folders[0] / row.folder if len(folders) == 1 else Path(row.folder)
        _suite(root, row, list(_cases(row, _fail_on(place), refused="error" if all_refused else "skipped")))
    missing = (jobs_of(planned(folders), folders) or 0) - len(rows)
    if missing > 0:
        sweep = Row(folders[0].resolve().name, folders[0].resolve().name)
        _suite(
            root, sweep, [Case("all_runs", "error", "missing", f"{missing} of {missing + len(rows)} runs never began")]
        )
    for count in ("tests", "failures", "errors", "skipped"):
        root.set(count, str(sum(int(suite.get(count, "0")) for suite in root)))
    ElementTree.indent(root)
    with whole(path) as partial:
        ElementTree.ElementTree(root).write(partial, encoding="utf-8", xml_declaration=True)


def _suite(root: ElementTree.Element, row: Row, cases: Sequence[Case]) -> None:
    name = _text(row.folder if row.folder != "." else row.job)
    suite = ElementTree.SubElement(root, "testsuite", name=name, tests=str(len(cases)))
    for count, outcome in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        suite.set(count, str(sum(case.outcome == outcome for case in cases)))
    suite.set("time", _seconds(row))
    properties = ElementTree.SubElement(suite, "properties")
    for key in PROPERTIES:
        if row.run.get(key) is not None:
            ElementTree.SubElement(properties, "property", name=key, value=_text(row.run[key]))
    for case in cases:
        # The run is one process: its time is its verdict's.
        time = _seconds(row) if case.name == "verdict" else "0"
        element = ElementTree.SubElement(suite, "testcase", classname=name, name=_text(case.name), time=time)
        if case.outcome:
            came = ElementTree.SubElement(element, case.outcome, message=_text(case.message))
            if case.outcome != "skipped":
                came.set("type", _text(case.kind))
            came.text = _text(case.text) or None


def _cases(row: Row, fail_on: str, *, refused: str) -> Iterator[Case]:
    held = [each for each in row.guarantees if each.required or (each.claimed and each.status != "not_applicable")]
    yield _verdict(row, fail_on, refused, violated=any(each.status == "violated" for each in held))
    for each in held:
        yield _guarantee(row, each)


def _verdict(row: Row, fail_on: str, refused: str, *, violated: bool) -> Case:
    if row.error.get("kind") == "refused":
        return Case("verdict", refused, "refused", row.reason)
    if row.error or row.word not in WORDS or row.word == "broken":
        return Case("verdict", "error", str(row.error.get("kind") or row.word), row.reason or row.word, _again(row))
    verdict = Verdict(row.word, {})
    if exit_status(verdict, fail_on) == 0 or violated:
        return Case("verdict")
    seen = [f"{each.kind}: {words.seen(each)}" for each in row.witnesses]
    return Case("verdict", "failure", row.word, f"{row.word}, and fail_on={fail_on}", "\n".join([*seen, _again(row)]))


def _guarantee(row: Row, what: Guarantee) -> Case:
    match what.status:
        case "violated":
            return Case(what.name, "failure", what.status, what.evidence, "\n\n".join([*_witnesses(row), _again(row)]))
        case "not_checked" | "not_applicable":
            return Case(what.name, "skipped", message=f"{what.status.replace('_', ' ')}: {what.evidence}")
        case _:
            return Case(what.name)


def _witnesses(row: Row) -> Iterator[str]:
    """Everything that was seen: a verdict does not say which guarantee an anomaly breaks."""
    for each in row.witnesses:
        yield "\n".join(
            [f"{each.kind}: {words.seen(each)}", *(f"{name}: {text}" for name, text in words.told_of(each))]
        )


def _again(row: Row) -> str:
    return f"again: {row.run['command']}" if row.run.get("command") else ""


def _fail_on(folder: Path) -> str:
    """What the run was told to fail on; the default where its configuration is not there any more."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    from trainer.config import Config

    try:
        found = str(OmegaConf.load(folder / ".hydra" / "config.yaml").fail_on)
    except (OSError, AttributeError, YAMLError, OmegaConfBaseException):
        return Config().fail_on
    return found if found in (*WORDS, "never") else Config().fail_on


def _seconds(row: Row) -> str:
    seconds = row.run.get("duration_seconds")
    return f"{seconds:.3f}" if isinstance(seconds, int | float) else "0"


def _text(value: object) -> str:
    return NOT_XML.sub("\ufffd", str(value))

"""A verdict and a configuration as Markdown, for TensorBoard's Text page."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict

from trainer.audit.verdict import Anomaly, Verdict
from trainer.config import Config
from trainer.report import words


def verdict(what: Verdict, fail_on: str) -> str:
    parts = [f"**{what.verdict}** ({words.exit_meaning(what, fail_on)})"]
    if what.error is not None:
        parts.append(_cell(words.error(what.error)))
    if numbers := words.measured(what):
        parts.append(_cell(numbers))
    if told := words.told(what.guarantees):
        rows = [
            (f"`{each.name}`", words.claimed(each), f"**{each.status}**", words.covered(each), _cell(each.evidence))
            for each in told
        ]
        parts.append(_table(("guarantee", "claimed", "status", "covers", "evidence"), rows))
    parts += [_anomaly(each) for each in what.anomalies]
    if untold := words.untold(what.guarantees):
        parts.append(_cell(untold))
    return "\n\n".join(parts)


def config(what: Config) -> str:
    return f"```\n{json.dumps(asdict(what), indent=2, default=str)}\n```"


def _anomaly(what: Anomaly) -> str:
    lines = [f"**{what.kind}**: {_cell(words.seen(what))}", ""]
    for title, text in words.told_of(what):
        # Below its first line a witness has a picture, of which every space counts.
        told, _, picture = text.partition("\n")
        lines.append(f"- {title}: {_cell(told)}")
        if picture:
            lines += ["", "```", picture, "```", ""]
    return "\n".join(lines)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    """Text that Markdown leaves as it is: no end of a cell, no tags, no emphasis by underscores and stars."""
    escaped = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;")
    return "".join(f"\\{character}" if character in "\\`*_[]" else character for character in escaped)

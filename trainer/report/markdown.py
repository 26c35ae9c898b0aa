"""A verdict and a configuration as Markdown, for TensorBoard's Text page."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict

from trainer.audit.verdict import Anomaly, Guarantee, Verdict
from trainer.config import Config
from trainer.report import words
from trainer.updates.mechanisms import COLUMNS, MODES, Mechanism


def verdict(what: Verdict, fail_on: str) -> str:
    """What was seen comes first: TensorBoard shows the top of a text, and the rest when it is scrolled."""
    parts = [f"**{what.verdict}** ({words.exit_meaning(what, fail_on)})"]
    if what.error is not None:
        parts.append(cell(words.error(what.error)))
    if numbers := words.measured(what):
        parts.append(cell(numbers))
    parts += [anomaly(each) for each in what.anomalies]
    if told := words.told(what.guarantees):
        # Few columns: TensorBoard breaks words in the narrow ones.
        rows = [(_held(each), cell(each.evidence), words.covered(each)) for each in told]
        parts.append(table(("guarantee", "evidence", "covers"), rows))
    if untold := words.untold(what.guarantees):
        parts.append(cell(untold))
    if mode := MODES.get(str(what.run.get("update_mode"))):
        parts.append(_mode(mode))
    if command := what.run.get("command"):
        parts.append(f"The same run again:\n\n```\n{command}\n```")
    return "\n\n".join(parts)


def _held(what: Guarantee) -> str:
    """`**upheld** no_lost_updates (claimed)`."""
    by = {"yes": " (claimed)", "required": " (required)", "no": ""}[words.claimed(what)]
    return f"**{what.status}** `{what.name}`{by}"


def _mode(what: Mechanism) -> str:
    said = [f"`update_mode={what.name}` {cell(what.summary)}"] if what.summary else []
    if what.name == "custom":
        return " ".join(said)
    broken = [name for name in COLUMNS if name not in what.claims | what.not_applicable]
    claims = ", ".join(f"`{name}`" for name in COLUMNS if name in what.claims) or "nothing"
    said.append(f"It reads under {what.read_under}, writes what is based on {what.base} under {what.write_under}.")
    said.append(f"It claims {claims}" + (f", and not {', '.join(f'`{name}`' for name in broken)}." if broken else "."))
    return " ".join(said)


def modes() -> str:
    """The table of `show modes`: what each update mode does, and what it therefore claims."""
    head = ("update_mode", "strategy", "how", *COLUMNS)
    rows = [
        (
            f"`{mode.name}`",
            " ".join(mode.strategies),
            f"read under {mode.read_under}; write based on {mode.base}, under {mode.write_under}",
            *(claim(mode, name) for name in COLUMNS),
        )
        for mode in MODES.values()
        if mode.name != "custom"
    ]
    return table(tuple(name.replace("_", " ") for name in head), rows)


def claim(mode: Mechanism, guarantee: str) -> str:
    """`yes` where the mode claims a guarantee, `no` where some order breaks it, `n/a` where it makes no sense."""
    if guarantee in mode.not_applicable:
        return "n/a"
    return "yes" if guarantee in mode.claims else "**no**"


def config(what: Config) -> str:
    return f"```\n{json.dumps(asdict(what), indent=2, default=str)}\n```"


def anomaly(what: Anomaly) -> str:
    lines = [f"**{what.kind}**: {cell(words.seen(what))}", ""]
    for title, text in words.told_of(what):
        # Below its first line a witness has a picture, of which every space counts.
        told, _, picture = text.partition("\n")
        lines.append(f"- {title}: {cell(told)}")
        if picture:
            lines += ["", "```", picture, "```", ""]
    return "\n".join(lines)


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(text: str) -> str:
    """Text that Markdown leaves as it is: no end of a cell, no tags, no emphasis by underscores and stars."""
    escaped = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;")
    return "".join(f"\\{character}" if character in "\\`*_[]" else character for character in escaped)

"""The claims table as Markdown, and its place in a document. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence

from trainer.claims.claim import Claim, Measured
from trainer.claims.measure import command

BEGIN, END = "<!-- claims: python scripts/claims.py -->", "<!-- end of claims -->"
HEAD = ("claim", "in every order, or forced", "finding", "command")


def table(claims: Sequence[Claim], measured: Sequence[Measured]) -> str:
    """What is the same each time that it is measured."""
    rows = [
        (f"**{claim.name}** {claim.said}", found.told, found.word, _code(command(claim.runs[0])))
        for claim, found in zip(claims, measured, strict=True)
    ]
    return "\n".join(map(_row, [HEAD, ("---",) * len(HEAD), *rows]))


def free_table(claims: Sequence[Claim], told: Sequence[str]) -> str:
    """What differs from time to time."""
    rows = [
        (claim.name, text, _code(command(claim.free[0])))
        for claim, text in zip(claims, told, strict=True)
        if claim.free
    ]
    return "\n".join(map(_row, [("claim", "in free runs", "command"), ("---",) * 3, *rows]))


def replaced(document: str, text: str, begin: str = BEGIN, end: str = END) -> str:
    """The document with the text between its two marks.

    Raises:
        ValueError: it has no such marks.
    """
    before, mark, rest = document.partition(begin)
    _, other, after = rest.partition(end)
    if not mark or not other:
        raise ValueError(f"there is no place for the table: it goes between {begin} and {end}.")
    return f"{before}{begin}\n{text}\n{end}{after}"


def between(document: str, begin: str = BEGIN, end: str = END) -> str:
    """What stands between the two marks."""
    return document.partition(begin)[2].partition(end)[0].strip("\n")


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _code(text: str) -> str:
    return f"`{text}`"

"""What a requirement says of versions, and the same in canonical form: `NAME[extras]>=LOWER,<=UPPER; marker`.

Only the piece between the name with its extras and the marker is ever rewritten.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

NAME = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
PIECES = re.compile(rf"(?P<subject>\s*(?P<name>{NAME})(?:\s*\[[^]]*\])?)(?P<bounds>[^;]*)(?P<marker>.*)", re.DOTALL)
CANONICAL = re.compile(r">=[^,\s]+,<=(?P<upper>[^,\s]+)")

# To drop such a clause would let in what it keeps out, and the canonical form has no place for it.
UNFIT = {
    "!=": "an exclusion has no place in >=LOWER,<=UPPER; put the lower bound above it, or remove it",
    ">": "> does not name the first release that fits; write >= and that release",
    "===": "=== compares letters; write == and a version",
}


class Unfit(Exception):
    """What cannot be brought into form, and what to do about it, on one line."""


def name_of(text: str) -> str | None:
    """The normalized name of the package that a requirement is about; None where it does not begin with a name."""
    pieces = PIECES.match(text)
    return canonicalize_name(pieces["name"]) if pieces else None


def public(version: str) -> Version:
    """A version without its local part: 2.13.0+cpu is 2.13.0 in another build, and no newer release."""
    return Version(Version(version).public)


@dataclass(frozen=True)
class Pin:
    """A requirement in the three pieces that make up its text, and what its bounds say.

    `lower` is the highest lower bound, as written. `tested` is the lowest inclusive upper bound; one such as `<3` is a
    guess about releases to come and counts for nothing.
    """

    subject: str
    bounds: str
    marker: str
    lower: str | None
    tested: Version | None

    @property
    def text(self) -> str:
        return self.subject + self.bounds + self.marker

    def bounded(self, newest: Version, pinned: Version) -> Pin:
        """The same up to the newest release; its text is kept where it has that form and bound already.

        An upper bound is never lowered. `pinned`, the release that is installed, stays within the bounds, and is the
        lower one of a requirement that has none.

        Raises:
            Unfit: no release reaches the lower bound.
        """
        lower = self.lower or str(pinned)
        upper = max(newest, pinned, self.tested or newest)
        if upper < Version(lower):
            raise Unfit(f"no release reaches the lower bound; the newest is {newest}")
        form = CANONICAL.fullmatch(self.bounds)
        if form and Version(form["upper"]) == upper:
            return self
        return replace(self, bounds=f">={lower},<={upper}")


def parse(text: str) -> Pin:
    """A requirement as a pin.

    Raises:
        Unfit: it is no requirement, or has a clause that the canonical form cannot say.
    """
    try:
        requirement = Requirement(text)
    except InvalidRequirement as error:
        raise Unfit(f"that is no requirement; {str(error).splitlines()[0]}") from None
    pieces = PIECES.fullmatch(text)
    if requirement.url or not pieces:
        raise Unfit("a URL has no bounds; name the package and its versions")
    clauses = [(clause.operator, clause.version) for clause in requirement.specifier]
    for operator, _ in clauses:
        if operator in UNFIT:
            raise Unfit(UNFIT[operator])
    # `==2.13.*` is a lower bound alone, and no bound may name a local version.
    lowers = [_bare(version) for operator, version in clauses if operator in (">=", "~=", "==")]
    tested = [
        public(version) for operator, version in clauses if operator in ("<=", "==") and not version.endswith(".*")
    ]
    return Pin(
        pieces["subject"],
        pieces["bounds"],
        pieces["marker"],
        lower=max(lowers, key=Version, default=None),
        tested=min(tested, default=None),
    )


def _bare(version: str) -> str:
    return version.removesuffix(".*").partition("+")[0]

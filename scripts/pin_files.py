"""The two files that hold pins: text in, pins moved, text out; every other byte is kept."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement
from packaging.version import Version
from pins import NAME, Pin, Unfit, name_of, parse, public

EXACT = re.compile(
    rf"(?P<before>\s*{NAME}\s*==\s*)(?P<version>[^\s*,;#=]+)(?P<marker>(?:\s*;.*?)?)(?P<rest>\s+#.*|\s*)", re.DOTALL
)


class Pyproject:
    """`pyproject.toml`: the requirements in `project.dependencies` and `project.optional-dependencies`.

    Its text is changed in place and never made anew from the document, so that nothing but a bound can change.

    Raises:
        Unfit: it is not TOML, or holds something else in these places.
    """

    file = "pyproject.toml"

    def __init__(self, text: str) -> None:
        self.text = text
        try:
            self._document = _read(text)
        except tomllib.TOMLDecodeError as error:
            raise Unfit(f"{self.file} is not TOML; {error}") from None
        project = self._table(self._document, "project")
        self.requires_python = str(project.get("requires-python", ""))
        self._lists = [project.get("dependencies", []), *self._table(project, "optional-dependencies").values()]
        if not all(isinstance(each, list) for each in self._lists):
            raise Unfit(f"{self.file}: project.dependencies and each of project.optional-dependencies must be a list")

    def names(self, name: str) -> bool:
        """Whether a package is among the requirements."""
        return any(True for _ in self._entries(name))

    def bound(self, name: str, newest: Version, pinned: Version) -> list[str]:
        """Bring every requirement of a package to canonical form; a line for each that changes.

        Raises:
            Unfit: one of them cannot be.
        """
        changes = []
        for requirements, index in self._entries(name):
            told = " ".join(requirements[index].split())
            try:
                old = parse(requirements[index])
                new = old.bounded(newest, pinned)
                if new != old:
                    requirements[index] = new.text
                    self.text = self._rewritten(old, new)
                    changes.append(f"{self.file}: {told} -> {new.text.strip()}")
            except Unfit as error:
                raise Unfit(f"{self.file}: {told}: {error}") from None
        return changes

    def _rewritten(self, old: Pin, new: Pin) -> str:
        """The text that reads as the document does by now; the same words may stand in comments and other tables."""
        for place in re.finditer(re.escape(old.subject + old.bounds), self.text):
            text = self.text[: place.start()] + new.subject + new.bounds + self.text[place.end() :]
            try:
                if _read(text) == self._document:
                    return text
            except tomllib.TOMLDecodeError:
                continue
        raise Unfit("its name or bounds are written with escapes; write them plainly")

    def _entries(self, name: str) -> Iterator[tuple[list[Any], int]]:
        for requirements in self._lists:
            for index, requirement in enumerate(requirements):
                if isinstance(requirement, str) and name_of(requirement) == name:
                    yield requirements, index

    def _table(self, parent: dict[str, Any], key: str) -> dict[str, Any]:
        table = parent.get(key, {})
        if not isinstance(table, dict):
            raise Unfit(f"{self.file}: {key} must be a table")
        return table


def _read(text: str) -> dict[str, Any]:
    # Floats as they are written: nan would not be equal to itself.
    return tomllib.loads(text, parse_float=str)


class Constraints:
    """`constraints.txt`: a requirement a line, and comments."""

    file = "constraints.txt"

    def __init__(self, text: str) -> None:
        self._lines = text.splitlines(keepends=True)

    @property
    def text(self) -> str:
        return "".join(self._lines)

    def pinned(self, name: str) -> Version:
        """The release to which a package is pinned, the newest where markers tell several apart.

        Raises:
            Unfit: it is not pinned, or not exactly.
        """
        versions = [public(exact["version"]) for _, exact in self._pins(name)]
        if not versions:
            raise Unfit(f"{self.file}: {name} is not pinned; add a line {name}==VERSION")
        return max(versions)

    def move(self, name: str, newest: Version) -> list[str]:
        """Move every pin of a package up to the newest release; a line for each that changes.

        Raises:
            Unfit: one of them is not exact.
        """
        changes = []
        for index, exact in self._pins(name):
            if public(exact["version"]) < newest:
                self._lines[index] = f"{exact['before']}{newest}{exact['marker']}{exact['rest']}"
                old, new = (f"{exact['before']}{version}".strip() for version in (exact["version"], newest))
                changes.append(f"{self.file}: {old} -> {new}")
        return changes

    def _pins(self, name: str) -> Iterator[tuple[int, re.Match[str]]]:
        for index, line in enumerate(self._lines):
            if name_of(line) != name:
                continue
            try:
                exact = EXACT.fullmatch(line)
                Requirement(exact["before"] + exact["version"] + exact["marker"] if exact else "")
            except InvalidRequirement:
                exact = None
            if not exact:
                raise Unfit(f"{self.file}: {line.strip()}: that is not an exact pin; write {name}==VERSION")
            yield index, exact

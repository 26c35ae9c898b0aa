"""The experiments that come with the trainer: what each file says of itself."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "configs" / "experiment"


def experiments() -> dict[str, str]:
    """Name -> the first comment of its file, sorted by name."""
    return {path.stem: _first_comment(path) for path in sorted(FOLDER.glob("*.yaml"))}


def _first_comment(path: Path) -> str:
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#") and "@package" not in line:
            return line.lstrip("# ")
    return ""

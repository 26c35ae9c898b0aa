"""Where one item of the soak does its work: a folder of its own, and what is left there afterwards."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
ROOT = EXAMPLES.parent.parent
# In the environment of whatever a command starts, so that it is found wherever it has gone.
MARK = "SOAK_PLACE"


@dataclass(frozen=True)
class Place:
    """A folder: `here` is where commands are given, `run` is the run's, `tmp` what its processes take for /tmp."""

    folder: Path
    cache: Path

    @classmethod
    def made(cls, folder: Path, cache: Path) -> Place:
        for each in (folder / "here", folder / "tmp", cache):
            each.mkdir(parents=True, exist_ok=True)
        return cls(folder, cache)

    @property
    def here(self) -> Path:
        return self.folder / "here"

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def environment(self) -> dict[str, str]:
        """What differs from this process's environment. The parts of scripts/examples are found, as if brought."""
        path = [str(ROOT), str(EXAMPLES), *filter(None, [os.environ.get("PYTHONPATH")])]
        return {
            "PYTHONPATH": os.pathsep.join(path),
            "TMPDIR": str(self.folder / "tmp"),
            "XDG_CACHE_HOME": str(self.cache),
            MARK: str(self.folder),
        }

    def left_in_tmp(self) -> list[str]:
        """What processes left in their /tmp, but for the one folder that torch keeps there for each user."""
        found = (str(each.relative_to(self.folder)) for each in (self.folder / "tmp").rglob("*"))
        return sorted(each for each in found if not each.startswith("tmp/torchinductor_"))

    def left_here(self) -> list[str]:
        return sorted(str(each.relative_to(self.here)) for each in self.here.rglob("*"))

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

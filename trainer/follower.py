"""How a sweep's runs end, told by the command when their workers write to logs of their own."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

from trainer.audit.verdict import FILE_NAME

LOOK_SECONDS = 0.5


class Follower:
    """Prints a line for each run below a folder as its verdict comes.

    It begins with its making; `end` is called by the same thread.

    Args:
        jobs: how many runs there will be, where that is known.
    """

    def __init__(self, folder: Path, jobs: int | None) -> None:
        self.folder, self.jobs = folder, jobs
        self._told: set[Path] = set()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="follower", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Tell what has ended until now, and nothing more."""
        self._ended.set()
        self._thread.join()

    def _follow(self) -> None:
        while not self._ended.wait(LOOK_SECONDS):
            self._look()
        self._look()

    def _look(self) -> None:
        # Verdicts appear whole, under their name: see trainer/whole_file.py.
        for path in sorted(self.folder.glob(f"*/{FILE_NAME}"), key=lambda path: path.stat().st_mtime_ns):
            if path not in self._told:
                self._told.add(path)
                self._tell(path)

    def _tell(self, path: Path) -> None:
        found = json.loads(path.read_text(encoding="utf-8"))
        of = "" if self.jobs is None else f"/{self.jobs}"
        error = found["error"]
        how = "refused" if error and error["kind"] == "refused" else found["verdict"]
        print(f"[{len(self._told)}{of}] {path.parent.name}: {how}", flush=True)
        if error:
            kind = "" if how == "refused" else f"{error['kind']}: "
            print(f"trainer: {path.parent} is {how}: {kind}{error['message']}", file=sys.stderr, flush=True)

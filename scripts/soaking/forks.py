"""Runs and commands as forks of a template, which has imported everything and computed nothing."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from soaking.ended import Ended
from soaking.places import EXAMPLES, Place, read
from trainer.config import Config

TEMPLATE = Path(__file__).resolve().parent / "template.py"


class Template:
    """A template process, started when it is first needed.

    Thread-safety: one thread.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.process: subprocess.Popen[str] | None = None
        self.closed = False

    def run(self, config: Config, place: Place, limit_seconds: float, command: str, asked_seconds: float = 0) -> Ended:
        """Do one run in a fork, in the folder `run` of its place.

        Args:
            asked_seconds: after which it is asked to end; 0 never.
        """
        folder = place.folder / "run"
        folder.mkdir()
        request = {"config": dataclasses.asdict(config), "folder": str(folder), "command": command}
        return self._ask(place, limit_seconds, folder / "console.log", run=request, asked_seconds=asked_seconds)

    def command(self, arguments: list[bytes], place: Place, limit_seconds: float) -> Ended:
        """Give a command in a fork, in the folder `here` of its place, and end it where it would start a run."""
        request = {"arguments": [each.hex() for each in arguments], "config": str(place.folder / "taken.json")}
        return self._ask(place, limit_seconds, place.folder / "errors", **request)

    def close(self) -> None:
        """End the template and what it runs, for good."""
        self.closed = True
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, 9)
            self.process.wait()
            for stream in (self.process.stdin, self.process.stdout):
                with suppress(BrokenPipeError):
                    stream.close()  # type: ignore[union-attr]
            self.process = None

    def _ask(self, place: Place, limit_seconds: float, errors: Path, **request: Any) -> Ended:
        asked = {
            **request,
            "folder": str(place.here),
            "output": str(place.folder / "output"),
            "errors": str(errors),
            "environment": place.environment,
            "path": [str(EXAMPLES)],
            "limit_seconds": limit_seconds,
        }
        reply = self._exchange(asked)
        census = place.here / "census.json"
        found = json.loads(census.read_text(encoding="utf-8")) if census.exists() else {}
        return Ended(
            reply["status"],
            reply["seconds"],
            reply["how"],
            read(place.folder / "output"),
            read(errors),
            reply["left"],
            found,
        )

    def _exchange(self, asked: dict[str, Any]) -> dict[str, Any]:
        if self.closed:
            raise Gone(f"the template of {self.kind} was closed")
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, "-P", str(TEMPLATE), self.kind],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                start_new_session=True,
            )
            self._reply()
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        return self._reply()

    def _reply(self) -> dict[str, Any]:
        assert self.process is not None
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise Gone(f"the template of {self.kind} ended with status {self.process.wait()}")
        found: dict[str, Any] = json.loads(line)
        return found


class Gone(Exception):
    """A template has ended."""

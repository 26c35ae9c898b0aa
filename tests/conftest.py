from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from command import Command

# For tests that use Keras in this process: it has one backend a process. Runs and helpers of tests choose their own.
os.environ["KERAS_BACKEND"] = "torch"


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Command]:
    """`python -m trainer` in an empty folder. Whatever a failed test leaves running is ended."""
    folder = tmp_path / "here"
    folder.mkdir()
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    yield Command(folder)
    for process in psutil.Process().children(recursive=True):
        if process.pid not in before:
            process.kill()

"""A model that a test brings: in one process it goes wrong in the middle of a run, in the way that is asked for.

FAILS=raise|hang|kill, in the process FAILING_RANK, unless a launcher has started the run again
"""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import torch

CALLS = 40
lock = threading.Lock()
calls = 0


class Failing(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
        if os.environ["RANK"] == os.environ.get("FAILING_RANK") and not again:
            count()
        found: torch.Tensor = self.layer(x.reshape(len(x), -1))
        return found


def count() -> None:
    global calls
    with lock:
        calls += 1
        if calls != CALLS:
            return
    Path("failed_at").write_text(repr(time.time()))
    match os.environ["FAILS"]:
        case "raise":
            raise ValueError("a bad batch")
        case "hang":
            threading.Event().wait()
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)


def build(**_: Any) -> torch.nn.Module:
    return Failing()

"""Data of a user's, as data._target_=leaky.NAME: what the soak must find, and what it must not."""

from __future__ import annotations

import os
import subprocess
import tempfile
import threading
import time
from typing import Any

import numpy as np

KEPT: list[Any] = []


def nothing(*, seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {"x": random.normal(size=(200, 3)).astype(np.float32), "y": random.integers(0, 2, 200)}


def a_thread(*, seed: int) -> dict[str, np.ndarray]:
    threading.Thread(target=time.sleep, args=(60,), name="forgotten", daemon=True).start()
    return nothing(seed=seed)


def a_process(*, seed: int) -> dict[str, np.ndarray]:
    KEPT.append(subprocess.Popen(["sleep", "60"]))
    return nothing(seed=seed)


def an_open_file(*, seed: int) -> dict[str, np.ndarray]:
    KEPT.append(open("../forgotten", "w"))  # noqa: SIM115
    return nothing(seed=seed)


def a_temporary_file(*, seed: int) -> dict[str, np.ndarray]:
    os.close(tempfile.mkstemp()[0])
    return nothing(seed=seed)


def a_crash(*, seed: int) -> dict[str, np.ndarray]:
    raise ArithmeticError("broken on purpose")


def a_sudden_end(*, seed: int) -> dict[str, np.ndarray]:
    os._exit(0)


def a_hang(*, seed: int) -> dict[str, np.ndarray]:
    time.sleep(60)
    return nothing(seed=seed)

"""One run as Hydra's launcher calls it: in the command's own process, or in a worker process of joblib's."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from trainer.audit.verdict import FILE_NAME, Error
from trainer.checkpoint.store import steps_in
from trainer.config import ConfigError
from trainer.folders import from_here, settle
from trainer.invocation import INVOCATION, command_of, complain, config_of
from trainer.launch import launch
from trainer.processes import launched
from trainer.rules import validate

PARENT_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Job:
    """The task that Hydra runs.

    Attributes:
        parent: process id of the command.
    """

    parent: int

    def __call__(self, composed: DictConfig) -> int:
        """Do the run and return its exit status."""
        INVOCATION.running = True
        hydra = HydraConfig.get()
        folder = from_here(Path(hydra.runtime.output_dir))
        config = config_of(composed)
        command = command_of(hydra.overrides.task)
        worker = os.getpid() != self.parent
        if worker:
            _serve(self.parent)
        elif INVOCATION.sweep is not None:
            of = "" if INVOCATION.jobs is None else f"/{INVOCATION.jobs}"
            print(f"\n[{hydra.job.num + 1}{of}] {folder.name}", flush=True)
        if hydra.mode == RunMode.MULTIRUN:
            # A single run's rules were checked before it had a folder; here a refusal is a row.
            try:
                validate(config)
            except ConfigError as error:
                settle(config, folder, command, Error("refused", str(error)))
                return complain(f"{folder.name} is refused: {error}")
        INVOCATION.status = launch(config, folder, command, silent=worker)
        place = launched(config)
        if place is None or not place.rank or INVOCATION.status:
            _tell(folder, INVOCATION.status, worker)
        return INVOCATION.status


def _serve(parent: int) -> None:
    """Leave Ctrl-C to the command that this process works for, and end with it."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_POLL_SECONDS)
        os._exit(1)

    if all(thread.name != "parent" for thread in threading.enumerate()):
        threading.Thread(target=watch, name="parent", daemon=True).start()


def _tell(folder: Path, status: int, worker: bool) -> None:
    """Say how a run ended where its own table could not: it broke, or was kept from standard output."""
    verdict: dict[str, Any] = json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))
    if error := verdict["error"]:
        complain(f"{folder} is broken: {error['kind']}: {error['message']}", status)
        if steps := steps_in(folder):
            complain(f"resume={folder} goes on after step {steps[0]}, with the same command otherwise.")
    elif worker:
        print(f"{folder.name}: {verdict['verdict']}", flush=True)

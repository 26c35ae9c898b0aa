"""One run as Hydra's launcher calls it: in the command's own process, or in a worker process, here or elsewhere."""

from __future__ import annotations

import json
import os
import platform
import signal
import threading
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from trainer.audit.verdict import FILE_NAME, Error
from trainer.checkpoint.store import steps_in
from trainer.config import Config, ConfigError
from trainer.folders import from_here, settle
from trainer.interrupts import Interrupted, interruptible, is_alive
from trainer.invocation import INVOCATION, command_of, complain, config_of
from trainer.launch import launch
from trainer.launchers import ASKED, BATCH, GROUP
from trainer.processes import folder_of, launched
from trainer.rules import validate

PARENT_POLL_SECONDS = 0.5
# Slurm, or submitit for it, asks a job to end before it kills it: by SIGUSR2 some time before, by SIGTERM at the end.
ASKED_TO_END = {signal.SIGUSR2: signal.SIGTERM, signal.SIGTERM: signal.SIGTERM}


@dataclass(frozen=True)
class Job:
    """The task that Hydra runs. A launcher may send it to another process or machine.

    Attributes:
        parent: process id of the command.
        host: the machine that it runs on.
    """

    parent: int
    host: str = field(default_factory=platform.node)

    def __call__(self, composed: DictConfig) -> int:
        """Do the run and return its exit status."""
        INVOCATION.running = True
        hydra = HydraConfig.get()
        folder = from_here(Path(hydra.runtime.output_dir))
        config = config_of(composed)
        command = command_of(hydra.overrides.task)
        worker = (os.getpid(), platform.node()) != (self.parent, self.host)
        launcher = str(hydra.runtime.choices[GROUP])
        if worker:
            elsewhere = launcher in BATCH or platform.node() != self.host
            _serve(None if elsewhere else self.parent)
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
        try:
            with _ending_when_asked(worker and launcher in ASKED):
                INVOCATION.status = launch(config, folder, command, silent=worker)
        except Interrupted as interruption:
            if not worker:
                raise
            # It has its verdict, and is a row of the sweep like the others.
            INVOCATION.status = interruption.status
        place = launched(config)
        if place is None or not place.rank or INVOCATION.status:
            _tell(config, folder, INVOCATION.status, worker)
        return INVOCATION.status


def _serve(parent: int | None) -> None:
    """Leave Ctrl-C to the command that this process works for, and end with it.

    Args:
        parent: its process id; None where it may be on another machine, and its end is not this process's.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    if parent is None:
        return
    # Not os.getppid(): a launcher may have a process of its own in between, which outlives the command.
    try:
        command = psutil.Process(parent)
    except psutil.NoSuchProcess:
        os._exit(1)

    def watch() -> None:
        while is_alive(command):
            time.sleep(PARENT_POLL_SECONDS)
        os._exit(1)

    if all(thread.name != "parent" for thread in threading.enumerate()):
        threading.Thread(target=watch, name="parent", daemon=True).start()


def _ending_when_asked(asked: bool) -> AbstractContextManager[object]:
    """End the run well when the machine asks for it, in place of the launcher's own way, which starts it again."""
    return interruptible(ASKED_TO_END) if asked else nullcontext()


def _tell(config: Config, folder: Path, status: int, worker: bool) -> None:
    """Say how a run ended where its own table could not: it broke, or was kept from standard output."""
    verdict: dict[str, Any] = json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))
    if error := verdict["error"]:
        complain(f"{folder} is broken: {error['kind']}: {error['message']}", status)
        # A launched process other than the first has a folder that is no run's.
        steps = [{*steps_in(folder_of(folder, rank))} for rank in range(config.num_processes)]
        if common := set.intersection(*steps):
            complain(f"resume={folder} goes on after step {max(common)}, with the same command otherwise.")
    elif worker:
        print(f"{folder.name}: {verdict['verdict']}", flush=True)

"""Whoever watches a run: event file, progress bar, final table and log, behind the few calls that a run makes."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console

from trainer.audit.orders import Explored
from trainer.audit.records import Evaluation, RunRecord
from trainer.audit.verdict import Verdict
from trainer.config import Config
from trainer.doing import listening
from trainer.report import console
from trainer.report.progress import ProgressBar
from trainer.report.tensorboard import RunEvents
from trainer.workloads.small import heeds

LOG_NAME = "console.log"


class Observer:
    """Reports one run, from before its first step until its verdict.

    Leaving the `with` block closes everything, however the run ended; a run that was not `finished` by then is marked
    as failed in the HParams table.

    Args:
        folder: the run's folder, which exists.
        output: where to print; standard output when None.

    Thread-safety: none; all calls come from one thread. Replicas may write the record meanwhile.

    Raises:
        OSError: the folder cannot be written to.
    """

    def __init__(self, config: Config, folder: Path, output: Console | None = None) -> None:
        self._config = config
        self._folder = folder
        self._output = output or console.standard_output()
        self._closing = ExitStack()

    def __enter__(self) -> Self:
        config = self._config
        doing = config.update_mode.name if heeds(config, "update_mode") else config.workload.name
        title = f"{config.strategy.name} {doing} x{config.replicas_in_all}"
        with ExitStack() as closing:
            self._events = RunEvents(config, self._folder)
            closing.callback(self._events.close)
            self._bar = ProgressBar(self._output, title, config.train.steps, explores=config.controlled)
            self._bar.start()
            closing.callback(self._bar.stop)
            closing.enter_context(listening(self._doing))
            self._closing = closing.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.close()

    def _doing(self, what: str | None) -> None:
        """Show what takes long, and put it into the log."""
        self._bar.doing(what)
        if what is not None:
            with (self._folder / LOG_NAME).open("a", encoding="utf-8") as stream:
                stream.write(f"{what}\n")

    def progress(self, record: RunRecord) -> None:
        """Report the steps that were completed since the previous call; as good as free where there are none."""
        self._events.rows(record)
        self._bar.update(record)

    def kept(self, step: int, kept: float, made: int, apart: float | None = None) -> None:
        """Report how many of the contributions `made` so far the canaries hold, after `step` steps.

        Args:
            apart: largest difference between the copies by then, where there is more than one.
        """
        self._events.kept(step, kept, made, apart)

    def evaluated(self, evaluation: Evaluation) -> None:
        self._events.evaluated(evaluation)

    def warned(self, message: str) -> None:
        self._output.print(f"warning: {message}", soft_wrap=True)

    def explored(self, explored: Explored, share: float) -> None:
        self._bar.explored(explored, share)

    def finished(self, record: RunRecord | None, verdict: Verdict) -> None:
        """Write the end of the event file, and the verdict to the console and the log.

        Args:
            record: None when the run broke before there was one.
        """
        self._events.finished(record, verdict)
        if record is not None:
            self._bar.update(record, last=True)
        self._bar.stop()
        console.show(self._output, verdict, self._folder, self._config.fail_on)
        with (self._folder / LOG_NAME).open("a", encoding="utf-8") as stream:
            console.show(console.log_file(stream), verdict, self._folder, self._config.fail_on)

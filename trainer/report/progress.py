"""The progress bar of a run: steps, throughput and loss. Nothing at all where there is no terminal to draw it on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from trainer.audit.guarantees import GUARANTEES
from trainer.audit.orders import Explored
from trainer.audit.records import RunRecord
from trainer.report import words

# Drawing takes some milliseconds in which replicas that run Python wait, so it is done a few times a second only, and
# by the caller: a thread that redraws by itself would interrupt the replicas at times of its own.
SECONDS_BETWEEN_DRAWINGS = 0.25
# Columns from which there is room for the time that remains.
WIDE = 100


class Clock:
    """Calls with the seconds that have passed, each second from now on until `stop`.

    By a thread of its own, since whoever imports or compiles does not come by: there are no replicas yet to disturb.
    """

    def __init__(self, tick: Callable[[float], None]) -> None:
        self._tick = tick
        self._began = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="clock", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(1):
            self._tick(time.monotonic() - self._began)


class ProgressBar:
    """One run's bar, from the start of the steps to their end.

    Args:
        explores: it is to show orders instead of steps.

    Thread-safety: none; one thread draws, but for the clock of what is done before the first step.
    """

    def __init__(self, console: Console, title: str, steps: int, *, explores: bool = False) -> None:
        self._quiet = not console.is_interactive
        self._title = title
        self._clock: Clock | None = None
        self._steps, self._explores = steps, explores
        wide = console.width >= WIDE
        of_steps = (
            MofNCompleteColumn(),
            *([TextColumn("steps")] if wide else []),
            TextColumn("{task.fields[speed]} micro-steps/s"),
            TextColumn("loss {task.fields[loss]}"),
        )
        of_orders = (TaskProgressColumn(), TextColumn("{task.fields[speed]}"))
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            *(of_orders if explores else of_steps),
            *([TimeRemainingColumn()] if wide else []),
            console=console,
            auto_refresh=False,
            disable=self._quiet,
            expand=True,
        )
        self._task = self._progress.add_task(title, total=steps, speed="-", loss="-")
        self._drawn_at = 0.0
        # When micro-steps were first and last seen to be done, and how many: start-up, capture and the audit at the end
        # are no part of the throughput.
        self._first: tuple[float, int] | None = None
        self._newest = (0.0, 0)

    def start(self) -> None:
        self._progress.start()
        self._progress.refresh()

    def update(self, record: RunRecord, *, last: bool = False) -> None:
        """Draw where the run stands, if it is time to or for the `last` time."""
        if self._quiet or self._explores:
            return
        now, done = time.monotonic(), record.micro_steps_done
        if done > self._newest[1]:
            self._newest = now, done
            self._first = self._first or self._newest
        if now - self._drawn_at >= SECONDS_BETWEEN_DRAWINGS or last:
            self._drawn_at = now
            self._draw(record)

    def explored(self, explored: Explored, share: float) -> None:
        """Draw how far a search is, by its own estimate."""
        if not self._quiet:
            broken = sum(name in GUARANTEES for name in explored.counts)
            told = f"{explored.orders:,} orders in {explored.runs:,} runs, {broken} guarantees broken"
            self._progress.update(self._task, completed=share * self._steps, speed=told)
            self._progress.refresh()

    def doing(self, what: str | None) -> None:
        """Show what is done while no step is taken, and for how long, in place of the title; None puts that back."""
        if self._clock is not None:
            self._clock.stop()
            self._clock = None
        if self._quiet:
            return
        self._describe(what or self._title)
        if what is not None:
            self._clock = Clock(lambda seconds: self._describe(f"{what}, {seconds:.0f} s"))

    def _describe(self, text: str) -> None:
        self._progress.update(self._task, description=text)
        self._progress.refresh()

    def stop(self) -> None:
        """Leave the bar as it stands."""
        self.doing(None)
        self._progress.stop()

    def _draw(self, record: RunRecord) -> None:
        (began, before), (now, done) = self._first or self._newest, self._newest
        speed = words.number((done - before) / (now - began) if now > began else None, 3)
        steps = record.steps_done
        losses = [float(replica.losses[steps - 1]) for replica in record.replicas if steps and record.trains]
        loss = words.number(sum(losses) / len(losses) if losses else None)
        self._progress.update(self._task, completed=steps, speed=speed, loss=loss)
        self._progress.refresh()

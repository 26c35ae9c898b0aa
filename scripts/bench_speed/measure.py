"""One measurement: a program run in a folder of its own, and the row that it comes to."""

from __future__ import annotations

import json
import os
import platform
import shlex
import tempfile
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cases import ROOT

from bench_speed.contenders import FIRST_STEPS, Contender, Ours, Rival
from bench_speed.goals import HARDWARE_BFLOAT16
from bench_speed.plan import Measurement
from bench_speed.processes import Ended, TimedOut, run
from bench_speed.results import Row

# Canaries count up to here, so that runs cannot be longer.
MOST_STEPS = 2**24 - 1
# Steps of a memory run: enough for every buffer to have been used.
MEMORY_STEPS = 40
# A run that was this part of the seconds asked for is too short, and made again with more steps.
ENOUGH = 0.5
ATTEMPTS = 4
# A step may have to be compiled first.
LIMIT_SECONDS = 600.0
LONGEST_REASON = 300

Family = tuple[Any, ...]


class Meter:
    """Takes measurements, and learns from each how many steps the next one needs.

    Attributes:
        seconds: of training that a measurement of speed is to take.
        machine: what all rows say they were measured on.
    """

    def __init__(self, seconds: float, machine: str) -> None:
        self.seconds, self.machine = seconds, machine
        # Steps a second: of this very measurement, and of those that are like it.
        self.own: dict[Measurement, float] = {}
        self.family: dict[Family, float] = {}
        # What has run before, so that nothing is left to compile for it.
        self.warm: set[tuple[Contender, str, int]] = set()

    def take(self, measurement: Measurement, number: int) -> Row:
        """The row of one measurement; where it failed, with the reason."""
        contender = measurement.contender
        engine = contender.engine if isinstance(contender, Ours) else ""
        row = Row(
            number,
            measurement.kind,
            measurement.model,
            contender.name,
            engine,
            measurement.replicas,
            machine=self.machine,
        )
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            try:
                if isinstance(contender, Rival):
                    return self._rival(contender, measurement, row, folder)
                if measurement.kind == "speed":
                    return self._long_enough(contender, measurement, row, Path(folder))
                steps = 1 if measurement.kind == "start" else MEMORY_STEPS
                # Else compiling would count as start-up, and the compiler's memory as the run's.
                if contender.engine and (contender, measurement.model, measurement.replicas) not in self.warm:
                    self._ours(contender, measurement, row, Path(folder, "warm_up"), steps)
                return self._ours(contender, measurement, row, Path(folder, "run"), steps)
            except TimedOut as error:
                return replace(row, error=str(error))

    def _rival(self, rival: Rival, measurement: Measurement, row: Row, folder: str) -> Row:
        command = rival.command(measurement.model, measurement.replicas, self.seconds)
        ended = run(command, folder, LIMIT_SECONDS)
        row = replace(row, wall_seconds=ended.wall_seconds, command=_shown(command))
        if ended.status:
            return replace(row, error=_reason(ended))
        # What TensorFlow prints comes before the one line that counts.
        return replace(row, **json.loads(ended.output.splitlines()[-1]))

    def _long_enough(self, ours: Ours, measurement: Measurement, row: Row, folder: Path) -> Row:
        """A run of about `seconds`: of as many steps as the last one was fast, again where that was far too few."""
        like = (measurement.model, *ours.family)
        rate = self.own.get(measurement) or self.family.get(like)
        steps = FIRST_STEPS[measurement.model] if rate is None else self._steps(rate)
        for attempt in range(ATTEMPTS):
            found = self._ours(ours, measurement, row, folder / str(attempt), steps)
            if found.micro_steps_per_second is None or found.seconds is None:
                return found
            rate = found.micro_steps_per_second / measurement.replicas
            self.own[measurement] = self.family[like] = rate
            if found.seconds >= ENOUGH * self.seconds or steps >= MOST_STEPS:
                break
            steps = self._steps(rate)
        return found

    def _steps(self, rate: float) -> int:
        return min(MOST_STEPS, max(1, round(rate * self.seconds)))

    def _ours(self, ours: Ours, measurement: Measurement, row: Row, folder: Path, steps: int) -> Row:
        command = ours.command(measurement.model, measurement.replicas, steps, folder)
        ended = run(command, str(ROOT), LIMIT_SECONDS)
        # The folder is gone by the time that anybody could type this.
        row = replace(row, wall_seconds=ended.wall_seconds, command=_shown(command[:-1]))
        verdict = folder / "verdict.json"
        if ended.status or not verdict.exists():
            return replace(row, error=_reason(ended, verdict))
        self.warm.add((ours, measurement.model, measurement.replicas))
        metrics = json.loads(verdict.read_text(encoding="utf-8"))["metrics"]
        speed = metrics["micro_steps_per_second"]
        return replace(
            row,
            micro_steps_per_second=speed,
            steps=steps,
            seconds=measurement.replicas * steps / speed,
            loss_last=metrics["loss"],
            peak_rss_bytes=ended.peak_rss_bytes,
        )


def _shown(command: list[str]) -> str:
    """As one types it in the checkout."""
    words = [word.removeprefix(f"{ROOT}/") for word in command[1:]]
    return shlex.join(["python", *words])


def _reason(ended: Ended, verdict: Path | None = None) -> str:
    """Why a program failed, in one line."""
    if verdict and verdict.exists():
        error = json.loads(verdict.read_text(encoding="utf-8"))["error"]
        if error:
            return _short(error["message"])
    lines = [line for line in (ended.errors + ended.output).splitlines() if line.strip()]
    return _short(lines[-1] if lines else f"exit status {ended.status}, and nothing said")


def _short(text: str) -> str:
    return " ".join(text.split())[:LONGEST_REASON]


def here() -> str:
    """The machine and the versions, in one line."""
    lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()]
    said = {name.strip(): value.strip() for name, _, value in lines}
    # One of them: x86 calls it flags, Arm Features.
    flags = {*said.get("flags", "").split(), *said.get("Features", "").split()}
    bfloat16 = f" {HARDWARE_BFLOAT16}" if {"avx512_bf16", "amx_bf16", "bf16"} & flags else ""
    cores = len(os.sched_getaffinity(0))
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "tensorflow", "keras", "numpy"))
    return (
        f"{said.get('model name', 'unknown CPU')}{bfloat16}, {cores} core{'s' if cores > 1 else ''}; "
        f"Python {platform.python_version()}, {packages}"
    )

"""What the soak does, one item after another: each does something in a place of its own and tells what was wrong."""

from __future__ import annotations

import copy
import json
import os
import random
import shlex
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace

import psutil

from soaking import verdicts
from soaking.commands import Command
from soaking.draw import Draw, Drawn
from soaking.ended import Ended, of_process, of_refusal, of_run
from soaking.forks import Template
from soaking.growth import Growth
from soaking.places import Place
from soaking.spoil import spoilt
from soaking.template import BACKENDS, TAKEN
from trainer.checkpoint.store import steps_in
from trainer.config import Config, Custom
from trainer.holders import at_risk
from trainer.processes import folder_of
from trainer.updates.mechanisms import MODES

# When a run in many orders is asked to end.
ASKED_SECONDS = 10.0
REFUSED_SECONDS = 60.0
SWEEP_SECONDS = 600.0
# A run that is to be killed has steps for about so many seconds, by the speed of one of a few.
KILLED_SECONDS = 8.0
# Those that are killed as soon as their process is there.
EARLY = 0.15
MEASURED_STEPS, MOST_STEPS, ENDLESS = 30, 50_000, 10_000_000
SET_FOR_A_KILL = ("train.steps", "train.timeout_seconds", "audit.repeat", "checkpoint.every")
# Of runs that promise the same bits those that are made twice.
AGAIN = 0.15
SWEEP_RUNS = 4
SWEEP_REFUSED = 40


@dataclass
class Row:
    """One item, as the log has it.

    Attributes:
        findings: what was wrong.
        command: what does it again without the soak.
    """

    number: int
    kind: str
    command: str = ""
    status: int | None = None
    verdict: str | None = None
    seconds: float = 0.0
    killed: bool = False
    resumed: bool = False
    findings: list[str] = field(default_factory=list)


class Items:
    """Does items.

    Args:
        draw: shared by all.
        limit_seconds: a run that is not done by then hangs.

    Thread-safety: one thread; others have their own, with templates of their own.
    """

    def __init__(self, seed: int, draw: Draw, limit_seconds: float) -> None:
        self.seed, self.draw, self.limit_seconds = seed, draw, limit_seconds
        self.templates = {kind: Template(kind) for kind in (*BACKENDS, "command")}

    def do(self, number: int, kind: str, place: Place) -> Row:
        """One item; the same for the same seed, number and kind, as far as free threads and kills ever are."""
        row = Row(number, kind)
        KINDS[kind](self, row, place, random.Random(f"{self.seed}/{number}"))
        return row

    def drawn(self, chance: random.Random) -> Drawn:
        return self.draw.drawn(chance.getrandbits(48))

    def close(self) -> None:
        for template in self.templates.values():
            template.close()

    def short(self, row: Row, place: Place, chance: random.Random) -> None:
        """A run in a fork. One that promises the same bits is made twice."""
        drawn = self.drawn(chance)
        row.command = told(drawn.overrides)
        if drawn.raised:
            row.findings.append(f"the rules raised {drawn.raised}")
            return
        config = drawn.config
        if config.strategy.name not in BACKENDS:
            # It has processes of its own to start.
            self._whole(row, place, drawn)
            return
        ended = self._run(config, place, row.command)
        _note(row, ended, place)
        row.findings += of_run(ended, place, config)
        if not row.findings and row.verdict != "broken" and _same_bits(config) and chance.random() < AGAIN:
            row.findings += self._reference(config, place, "again")
            first, second = (verdicts.verdict(each) for each in (place.run, place.folder / "again"))
            if first["final_parameters_sha256"] != second.get("final_parameters_sha256"):
                row.findings.append("the same bits are promised, and made again there are others")

    def refused(self, row: Row, place: Place, chance: random.Random) -> None:
        """A command with a mistake in it, in a fork."""
        one, other = self.drawn(chance), self.drawn(chance)
        mistake = spoilt(self.draw, one, other, chance)
        row.command = told(mistake.arguments)
        ended = self._command(mistake.arguments, place)
        _note(row, ended, place)
        row.findings += of_refusal(ended, place, mistake.refused, TAKEN)

    def taken(self, row: Row, place: Place, chance: random.Random) -> None:
        """A command without a mistake, in a fork, up to where its run would start: is it what was meant?"""
        drawn = self.drawn(chance)
        row.command = told(drawn.overrides)
        ended = self._command(drawn.overrides, place)
        _note(row, ended, place)
        row.findings += of_process(ended, place)
        if ended.status != TAKEN:
            row.findings.append(f"refused, though the rules take it: {ended.errors.strip()[-300:]}")
            return
        found = json.loads((place.folder / "taken.json").read_text(encoding="utf-8"))
        for name, value in json.loads(json.dumps(asdict(drawn.config))).items():
            if found.get(name) != value:
                row.findings.append(f"{name} is read as {found.get(name)} and was meant as {value}")

    def command(self, row: Row, place: Place, chance: random.Random) -> None:
        """A whole command, as a user gives it."""
        self._whole(row, place, self.drawn(chance))

    def _whole(self, row: Row, place: Place, drawn: Drawn) -> None:
        row.command = told(drawn.overrides)
        more = [] if drawn.config.train.timeout_seconds else [f"train.timeout_seconds={self.limit_seconds - 30:g}"]
        limited = drawn.config.controlled and not drawn.raised
        with Command(place, [*drawn.overrides, *more, "hydra.run.dir=../run"]) as command:
            if limited:
                command.until(lambda: command.process.poll() is not None, ASKED_SECONDS)
                if command.process.poll() is None:
                    command.process.send_signal(signal.SIGTERM)
            ended = command.ended(self.limit_seconds)
        if limited and ended.status == 143:
            ended = replace(ended, how="asked")
        _note(row, ended, place)
        row.findings += of_run(ended, place, drawn.config)
        row.findings += _of_words(ended)

    def kill(self, row: Row, place: Place, chance: random.Random) -> None:
        """A run that is killed, mostly while it trains: its command says so, and with checkpoints it goes on."""
        drawn = self.drawn(chance)
        while drawn.raised or not _can_go_on(drawn.config):
            drawn = self.drawn(chance)
        config = copy.deepcopy(drawn.config)
        resumes = hasattr(config, "checkpoint")
        row.findings += self._measured(config, place, resumes)
        if row.findings:
            return
        overrides = [each for each in drawn.overrides if each.partition("=")[0] not in SET_FOR_A_KILL]
        overrides += [f"train.steps={config.train.steps}", "train.timeout_seconds=0", "audit.repeat=1"]
        if resumes:
            every = max(1, config.train.steps // chance.randint(4, 40))
            # Where copies are averaged now and then, a checkpoint has to stand at an average.
            averaged = getattr(config.update_mode, "average_every", 1)
            config.checkpoint.every = -(-every // averaged) * averaged
            overrides.append(f"checkpoint.every={config.checkpoint.every}")
        row.command = told(overrides)
        ended = self._killed(place, overrides, config, resumes, chance)
        _note(row, ended, place)
        row.findings += of_process(ended, place)
        row.findings += verdicts.problems(place.run, config, ended.status)
        error = verdicts.verdict(place.run).get("error")
        # A run may have ended by itself, by what train.on_nonfinite=stop found.
        if error and error["kind"] not in ("refused", "nonfinite"):
            row.killed = True
            if (ended.status, error["kind"]) != (3, "killed"):
                row.findings.append(f"killed, with status {ended.status} and error {error}")
            saved = [{*steps_in(folder_of(place.run, rank))} for rank in range(config.num_processes)]
            if set.intersection(*saved):
                self._resume(row, place, config, overrides)

    def _measured(self, config: Config, place: Place, resumes: bool) -> Iterator[str]:
        """Give the run steps for a few seconds, by the speed of one of few; without checkpoints, steps for good."""
        config.train.steps, config.train.timeout_seconds, config.audit.repeat = MEASURED_STEPS, 0.0, 1
        if not resumes:
            config.train.steps = ENDLESS
            return
        config.checkpoint.every = 0
        yield from self._reference(config, place, "speed")
        rate = verdicts.verdict(place.folder / "speed").get("metrics", {}).get("micro_steps_per_second") or 0.0
        config.train.steps = max(MEASURED_STEPS, min(MOST_STEPS, int(KILLED_SECONDS * rate / config.replicas_in_all)))

    def _killed(
        self, place: Place, overrides: list[str], config: Config, resumes: bool, chance: random.Random
    ) -> Ended:
        """How a command ended whose run was killed: as it began, at a step or after a while."""
        early, at = chance.random() < EARLY, chance.random()
        with Command(place, [*overrides, "hydra.run.dir=../run"]) as command:
            if early:
                command.until(command.run, self.limit_seconds)
            elif resumes:
                command.until(lambda: command.saved() > 0.8 * at * config.train.steps, self.limit_seconds)
            elif command.until(command.trains, self.limit_seconds):
                command.until(lambda: False, time.monotonic() - command.begin + at)
            run = command.run()
            if run is not None:
                with suppress(psutil.NoSuchProcess):
                    run.send_signal(signal.SIGKILL)
            return command.ended(self.limit_seconds)

    def _resume(self, row: Row, place: Place, config: Config, overrides: list[str]) -> None:
        """Go on with a run that was killed; where its bits are promised, they are those of one that was not."""
        more = [f"resume={place.run}", "hydra.run.dir=../resumed"]
        with Command(place, [*overrides, *more]) as command:
            ended = command.ended(self.limit_seconds)
        row.resumed = True
        row.findings += [f"resumed: {each}" for each in of_process(ended, place)]
        config.resume = str(place.run)
        folder = place.folder / "resumed"
        row.findings += [f"resumed: {each}" for each in verdicts.problems(folder, config, ended.status)]
        found = verdicts.verdict(folder)
        if error := found.get("error"):
            row.findings.append(f"resumed: broken: {error['kind']}: {error['message']}")
            return
        if found and _same_bits(config):
            config.resume = ""
            row.findings += self._reference(config, place, "whole")
            whole = verdicts.verdict(place.folder / "whole").get("final_parameters_sha256")
            if whole != found["final_parameters_sha256"]:
                row.findings.append(f"resumed: bits {found['final_parameters_sha256']}, and not killed {whole}")

    def sweep(self, row: Row, place: Place, chance: random.Random) -> None:
        """Many runs in one command, most of which are refused; its process must not grow."""
        drawn = self.drawn(chance)
        while drawn.raised or drawn.config.controlled or drawn.config.strategy.name == "mirrored":
            drawn = self.drawn(chance)
        overrides = [each for each in drawn.overrides if not each.startswith("train.seed=")]
        # There is no seed below 0.
        seeds = ",".join(str(each) for each in range(-SWEEP_REFUSED, SWEEP_RUNS))
        arguments = ["-m", *overrides, f"train.seed={seeds}"]
        row.command = told(arguments)
        with Command(place, [*arguments, "hydra.sweep.dir=../run"]) as command, Growth(command.process.pid) as growth:
            ended = command.ended(SWEEP_SECONDS)
        _note(row, ended, place)
        row.findings += of_process(ended, place)
        row.findings += growth.problems()
        folders = sorted({path.parent for path in place.run.rglob(".hydra")})
        if ended.how == "itself" and len(folders) != SWEEP_RUNS + SWEEP_REFUSED:
            row.findings.append(f"{len(folders)} of {SWEEP_RUNS + SWEEP_REFUSED} runs have a folder")
        for folder in folders:
            found = verdicts.verdict(folder)
            if not found:
                row.findings.append(f"no verdict in {folder.name}")
            elif found["error"] and found["error"]["kind"] not in ("refused", "deadlock"):
                row.findings.append(f"{folder.name} broken: {found['error']}")

    def _reference(self, config: Config, place: Place, name: str) -> Iterator[str]:
        """A run in a fork beside the item's own."""
        beside = Place.made(place.folder / f"{name}_place", place.cache)
        ended = self._run(config, beside, "")
        yield from (f"{name}: {each}" for each in of_run(ended, beside, config))
        if beside.run.exists():
            beside.run.rename(place.folder / name)

    def _run(self, config: Config, place: Place, command: str) -> Ended:
        asked = ASKED_SECONDS if config.controlled else 0.0
        return self.templates[config.strategy.name].run(config, place, self.limit_seconds, command, asked)

    def _command(self, arguments: Sequence[str], place: Place) -> Ended:
        return self.templates["command"].command([os.fsencode(each) for each in arguments], place, REFUSED_SECONDS)


# What may be done, with the share of each in a hundred items.
KINDS: dict[str, Callable[[Items, Row, Place, random.Random], None]] = {
    each.__name__: each for each in (Items.short, Items.taken, Items.refused, Items.command, Items.kill, Items.sweep)
}


def told(overrides: Sequence[str]) -> str:
    return f"PYTHONPATH=scripts/examples {shlex.join(['python', '-m', 'trainer', *overrides])}"


def _note(row: Row, ended: Ended, place: Place) -> None:
    row.status, row.seconds = ended.status, ended.seconds
    row.verdict = verdicts.verdict(place.run).get("verdict")


def _of_words(ended: Ended) -> Iterator[str]:
    """A command says on standard error why it did not do what was asked for, on one line, and nothing else."""
    if ended.how == "ended":
        return
    lines = ended.errors.splitlines()
    if "Traceback" in ended.errors:
        yield f"traceback: {lines[-1]}"
    elif ended.status in (0, 1) and lines:
        yield f"on standard error: {ended.errors[:300]!r}"
    elif ended.status in (2, 3) and not lines:
        yield f"status {ended.status} and no word on standard error"


def _can_go_on(config: Config) -> bool:
    if config.strategy.name not in BACKENDS:
        return False
    return not config.controlled and config.workload.name == "train" and not isinstance(config.update_mode, Custom)


def _same_bits(config: Config) -> bool:
    """Whether two free runs of it end in the same bits."""
    trains = _can_go_on(config) and config.train.engine == "torchscript"
    return trains and "same_bits" in MODES[config.update_mode.name].claims and not at_risk(config)

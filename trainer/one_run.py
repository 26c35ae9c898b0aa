"""The story of a run, top to bottom. Imported in the run's own process only, with the backend already chosen."""

from __future__ import annotations

import importlib
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from data import DataError
from trainer.audit import copies, history
from trainer.audit.findings import Finding
from trainer.audit.judge import find, judge
from trainer.audit.orders import Explored
from trainer.audit.records import Evaluation, ReplicaRecord, RunRecord
from trainer.audit.verdict import Error, ErrorKind, Verdict, save
from trainer.checkpoint.checkpoints import Checkpoints, alone, digests
from trainer.config import Config, ConfigError, Custom, Replay
from trainer.describe import describe, threads_per_replica
from trainer.doing import doing
from trainer.explore import Broken, Explorer
from trainer.imports import frameworks
from trainer.processes import Place, here, recorded
from trainer.report import trace
from trainer.report.observer import Observer
from trainer.schedule.case import Case
from trainer.schedule.point import Hidden
from trainer.schedule.search import Unsteady
from trainer.schedule.tokens import Diverged
from trainer.schedule.turnstile import Failed, Stalled
from trainer.state.layout import EMPTY
from trainer.state.settings import ASKED_BY, snapshot
from trainer.stop import Stop
from trainer.strategies.hosting import RunBroken, StopFlag, Watcher
from trainer.updates.mechanisms import MODES
from trainer.workloads.small import SmallWorkload, small

if TYPE_CHECKING:
    from trainer.workloads.train import Training

log = logging.getLogger(__name__)

# Strategy -> where its training step is that can be run in one order after another.
CASES = {
    "threads": ("trainer.strategies.controlled_threads", "ThreadsCase"),
    "mirrored": ("trainer.strategies.controlled_mirrored", "MirroredCase"),
}


def run(config: Config, folder: Path, command: str, stop: Stop) -> Verdict | None:
    """Run `config`, leave event file and `verdict.json` in `folder`, and return the verdict.

    What goes wrong in the run itself is a verdict too, `broken`; nothing is raised for it. Of a run's several processes
    the first gives the verdict; another has none to give, unless it breaks.
    """
    place = here(config)
    if place.rank:
        return _take_part(config, folder, command, stop, place)
    started = time.monotonic()
    with Observer(config, folder) as observer:
        came = _Came(empty_record(config), folder)
        _train(config, came, observer, stop)
        if stop.is_set():
            came.error = _stopped(came, stop.reason or "", place)
        about = describe(config, command)
        about["engine"] = came.record.engine or None
        if came.checkpoints is not None:
            about |= {"resumed": came.checkpoints.resumed, "checkpoints": came.checkpoints.told}
        about["duration_seconds"] = round(time.monotonic() - started, 3)
        if config.audit.name == "full":
            history.save(came.record, folder)
        if came.record.trace is not None:
            trace.save(came.record.trace, folder, config.train.steps)
        verdict = judge(config, came.record, came.error, about, came.outcomes, came.explored)
        save(verdict, folder)
        observer.finished(came.record, verdict)
    return verdict


def _take_part(config: Config, folder: Path, command: str, stop: Stop, place: Place) -> Verdict | None:
    """Run the replicas of a process that is not the first, which judges and reports what all of them have done.

    Returns:
        Broken, and why; None where there is nothing to say.
    """
    came = _Came(empty_record(config), folder)
    _train(config, came, UNWATCHED, stop)
    if stop.is_set():
        came.error = _stopped(came, stop.reason or "", place)
    if came.error is None:
        return None
    verdict = Verdict("broken", describe(config, command), came.error)
    save(verdict, folder)
    return verdict


def _stopped(came: _Came, reason: str, place: Place) -> Error:
    """Why a run has ended that was told to stop.

    A launcher stops the processes that are left when one has failed: then it is the failure that counts.
    """
    before = came.error if place.size > 1 else None
    if before is not None and before.kind != "killed":
        return before
    after = f"; before that {before.message}" if before is not None else ""
    return Error("interrupted", f"{reason}{after}", step=came.record.steps_done)


@dataclass
class _Came:
    """What a run has come to.

    Attributes:
        folder: the run's.
        outcomes: what it and each of its repetitions ended in.
        explored: what its orders showed, where a schedule has had it run in many.
        checkpoints: what it has saved and what it has gone on from, if it does either.
    """

    record: RunRecord
    folder: Path
    error: Error | None = None
    outcomes: list[str] = field(default_factory=list)
    explored: Explored | None = None
    checkpoints: Checkpoints | None = None


def _train(config: Config, came: _Came, watcher: Watcher, stop: Stop) -> None:
    """Do what the configuration asks for, and note what broke it, if anything did."""
    try:
        _start(config, came, watcher, stop)
    except (ConfigError, DataError, Unsteady, Diverged) as mistake:
        came.error = Error("refused", str(mistake))
    except RunBroken as broken:
        came.error = Error(broken.kind, broken.message, broken.replica, broken.step)
    except Exception as error:
        log.exception("the run broke")
        came.error = Error("crash", f"{type(error).__name__}: {error}", step=came.record.steps_done)
    place = here(config)
    if came.error is not None and place.size > 1 and not came.error.message.startswith("process "):
        came.error.message = f"{place.name}: {came.error.message}"


def _start(config: Config, came: _Came, watcher: Watcher, stop: Stop) -> None:
    # The framework is imported here and nowhere before; it must be set up before Keras builds anything.
    with doing(f"importing {os.environ['KERAS_BACKEND']} and keras"), frameworks(config):
        strategy = importlib.import_module(f"trainer.strategies.{config.strategy.name}")
    strategy.prepare(config.num_replicas, came.record.threads_per_replica)
    if config.controlled:
        _explore(config, came, watcher, stop)
    elif (own := small(config)) is not None:
        came.record.findings = _module(own).run(config, came.record, watcher, stop)
    elif isinstance(config.workload, Custom):
        from trainer.workloads import own_loop

        own_loop.train(config, came.record, watcher, stop)
    else:
        _repeat(config, came, watcher, stop, strategy)


def _repeat(config: Config, came: _Came, watcher: Watcher, stop: Stop, strategy: ModuleType) -> None:
    """Train, as often as asked; the record is the first time's."""
    from trainer.workloads.train import Training

    for repetition in range(config.audit.repeat):
        training = Training(config)
        own = empty_record(config) if repetition else came.record
        _prepare(config, own, training)
        came.checkpoints = _checkpoints(config, came, training, watcher, strategy)
        strategy.train(config, training, own, UNWATCHED if repetition else watcher, stop, came.checkpoints)
        if stop.is_set():
            break
        came.outcomes.append(copies.outcome(own))


def _checkpoints(
    config: Config, came: _Came, training: Training, watcher: Watcher, strategy: ModuleType
) -> Checkpoints | None:
    """What is saved, and what is gone on from, which is in the record then; None where it is neither."""
    if not config.checkpoint.every and not config.resume:
        return None
    made_of = digests(training.layout, training.initial, training.dataset)
    tell_all = partial(strategy.tell_all, config) if config.num_processes > 1 else alone
    checkpoints = Checkpoints(config, came.folder, made_of, came.record, watcher.warned, tell_all)
    for evaluation in came.record.evaluations:
        watcher.evaluated(evaluation)
    return checkpoints


def _module(own: SmallWorkload) -> ModuleType:
    return importlib.import_module(f"trainer.workloads.{own.module}")


def _prepare(config: Config, record: RunRecord, training: Training) -> None:
    record.layout, record.initial = training.layout, training.initial
    # With everything built, so that what a user's code has set on the way is asked for.
    record.settings_asked = {**snapshot(), **ASKED_BY[config.strategy.name], **training.settings_of_replicas}


def _explore(config: Config, came: _Came, watcher: Watcher, stop: Stop) -> None:
    """Run one case in one order after another."""
    explorer = explorer_of(config, stop, watcher.explored)
    try:
        for _ in range(config.audit.repeat):
            came.record = explorer.run()
            if came.record.ended:
                came.outcomes.append(copies.outcome(came.record))
    except Broken as broken:
        raise _told(broken) from broken.__cause__
    finally:
        came.explored = explorer.explored
        came.record.trace = explorer.trace()
    watcher.progress(came.record)
    if isinstance(config.schedule, Replay) and not came.record.ended:
        # One order that has been asked for, and cannot be finished: that is a run that broke.
        raise RunBroken("deadlock", explorer.explored.told_deadlock, step=came.record.steps_done)


def explorer_of(
    config: Config, stop: StopFlag, report: Callable[[Explored, float], None] = lambda explored, share: None
) -> Explorer:
    """What runs a configuration in the orders of its schedule. The strategy must be prepared."""
    case: Case
    training: Training | None = None
    own = small(config)
    if own is not None:
        case = _module(own).case(config)
    elif isinstance(config.workload, Custom):
        from trainer.workloads.own_loop import LoopCase

        case = LoopCase(config)
    else:
        from trainer.workloads.train import Training

        training = Training(config)
        module, name = CASES[config.strategy.name]
        case = getattr(importlib.import_module(module), name)(config, training, UNWATCHED, stop)

    def new_record() -> RunRecord:
        record = empty_record(config)
        if training is not None:
            _prepare(config, record, training)
        return record

    def found(record: RunRecord) -> dict[str, Finding]:
        return find(config, record) if record.findings is None else dict(record.findings)

    return Explorer(config, case, new_record, found, report, stop)


def _told(broken: Broken) -> RunBroken | ConfigError:
    """What broke, where, and how to see it again."""
    error = broken.__cause__
    assert isinstance(error, Failed | Stalled)
    if isinstance(error.__cause__, Hidden):
        return ConfigError(str(error.__cause__))
    steps = [event.step for event in broken.order.history.events if event.replica == error.replica]
    kind: ErrorKind = "deadlock" if isinstance(error, Stalled) else "crash"
    return RunBroken(kind, f"{error} (schedule=replay schedule.token={broken.token})", error.replica, max([0, *steps]))


class _Unwatched:
    """Watches a repetition, or one order of many: the reports are the first run's."""

    def progress(self, record: RunRecord) -> None: ...

    def kept(self, step: int, kept: float, made: int, apart: float | None = None) -> None: ...

    def evaluated(self, evaluation: Evaluation) -> None: ...

    def warned(self, message: str) -> None: ...

    def explored(self, explored: Explored, share: float) -> None: ...


UNWATCHED = _Unwatched()


def empty_record(config: Config) -> RunRecord:
    """A record of a run of this configuration in which nothing has happened yet."""
    steps, num_replicas = config.train.steps, config.replicas_in_all
    trains = small(config) is None
    # A small workload's steps leave no rows.
    rows = steps if trains else 0
    here_too = recorded(config)
    replicas = [
        (ReplicaRecord.empty if replica_id in here_too else ReplicaRecord.elsewhere)(replica_id, rows, num_replicas)
        for replica_id in range(num_replicas)
    ]
    return RunRecord(
        EMPTY,
        steps,
        replicas,
        threads_per_replica=threads_per_replica(config),
        batch_size=config.train.batch_size,
        joint="barrier" in MODES[config.update_mode.name].read_under,
        trains=trains,
    )

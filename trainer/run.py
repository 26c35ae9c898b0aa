"""The story of a run, top to bottom. Imported in the run's own process only, with the backend already chosen."""

from __future__ import annotations

import importlib
import logging
import time
from pathlib import Path

from data import DataError
from trainer.audit import copies, history
from trainer.audit.judge import judge
from trainer.audit.records import Evaluation, ReplicaRecord, RunRecord
from trainer.audit.verdict import Error, Verdict, save
from trainer.config import Config, ConfigError, Custom
from trainer.describe import describe, threads_per_replica
from trainer.report.observer import Observer
from trainer.state.layout import EMPTY
from trainer.state.settings import ASKED_BY, snapshot
from trainer.stop import Stop
from trainer.strategies.hosting import RunBroken, Watcher
from trainer.workloads.small import small

log = logging.getLogger(__name__)


def run(config: Config, folder: Path, command: str, stop: Stop) -> Verdict:
    """Run `config`, leave event file and `verdict.json` in `folder`, and return the verdict.

    What goes wrong in the run itself is a verdict too, `broken`; nothing is raised for it.
    """
    started = time.monotonic()
    with Observer(config, folder) as observer:
        record = _empty_record(config)
        outcomes: list[str] = []
        error = _train(config, record, observer, stop, outcomes)
        if stop.is_set():
            error = Error("interrupted", stop.reason or "", step=record.steps_done)
        about = describe(config, command)
        about["engine"] = record.engine or None
        about["duration_seconds"] = round(time.monotonic() - started, 3)
        if config.audit.name == "full":
            history.save(record, folder)
        verdict = judge(config, record, error, about, outcomes)
        save(verdict, folder)
        observer.finished(record, verdict)
    return verdict


def _train(config: Config, record: RunRecord, watcher: Watcher, stop: Stop, outcomes: list[str]) -> Error | None:
    """Train, as often as asked, and fill the record of the first time; what broke the run, if anything did."""
    try:
        # The framework is imported here and nowhere before; it must be set up before Keras builds anything.
        strategy = importlib.import_module(f"trainer.strategies.{config.strategy.name}")
        strategy.prepare(config.num_replicas, record.threads_per_replica)

        if isinstance(config.workload, Custom):
            from trainer.workloads import own_loop

            own_loop.train(config, record, watcher, stop)
            return None

        if (own_case := small(config)) is not None:
            workload = importlib.import_module(f"trainer.workloads.{own_case.module}")
            record.findings = workload.run(config, record, watcher, stop)
            return None

        from trainer.workloads.train import Training

        for repetition in range(config.audit.repeat):
            training = Training(config)
            own = _empty_record(config) if repetition else record
            own.layout, own.initial = training.layout, training.initial
            # With everything built, so that what a user's code has set on the way is asked for.
            own.settings_asked = {**snapshot(), **ASKED_BY[config.strategy.name]}
            strategy.train(config, training, own, _Unwatched() if repetition else watcher, stop)
            if stop.is_set():
                break
            outcomes.append(copies.outcome(own))
    except (ConfigError, DataError) as mistake:
        return Error("refused", str(mistake))
    except RunBroken as broken:
        return Error(broken.kind, broken.message, broken.replica, broken.step)
    except Exception as error:
        log.exception("the run broke")
        return Error("crash", f"{type(error).__name__}: {error}", step=record.steps_done)
    return None


class _Unwatched:
    """Watches a repetition: the reports are the first run's."""

    def progress(self, record: RunRecord) -> None: ...

    def kept(self, step: int, kept: float, made: int) -> None: ...

    def evaluated(self, evaluation: Evaluation) -> None: ...


def _empty_record(config: Config) -> RunRecord:
    steps, num_replicas = config.train.steps, config.num_replicas
    replicas = [ReplicaRecord.empty(replica_id, steps, num_replicas) for replica_id in range(num_replicas)]
    return RunRecord(
        EMPTY,
        steps,
        replicas,
        threads_per_replica=threads_per_replica(config),
        batch_size=config.train.batch_size,
        trains=small(config) is None,
    )

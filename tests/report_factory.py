"""Hand-made runs for the tests of `trainer/report`: real records and verdicts, no training, no framework.

Also a program, for tests that look at a fresh process: `python tests/report_factory.py FOLDER [--unfinished]` reports a
safe and an unsafe run below FOLDER, as a sweep would, and prints which frameworks that imported.
"""

from __future__ import annotations

import io
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from trainer import config as schema
from trainer import holders
from trainer.audit import verdict as verdicts
from trainer.audit.guarantees import GUARANTEES, checkable
from trainer.audit.judge import claimed as claims
from trainer.audit.records import DTYPES, FRACTURED, Evaluation, Noted, Reference, ReplicaRecord, RunRecord, code
from trainer.audit.verdict import Anomaly, Covers, Error, ErrorKind, Guarantee, PrecisionRow, Status, Verdict
from trainer.report.observer import Observer
from trainer.state.layout import plan
from trainer.updates.mechanisms import MODES

SAFE, UNSAFE = "locked", "overwrite"
NAMES = {SAFE: "00_threads_locked_2", UNSAFE: "01_threads_overwrite_2"}


def make_config(
    mode: str = SAFE, *, replicas: int = 2, steps: int = 45, log_every: int = 10, precision: str = "float32"
) -> schema.Config:
    config = schema.Config(num_replicas=replicas, update_mode=schema.UpdateMode(mode))
    config.precision = replace(schema.OPTIONS["precision"][precision])
    config.strategy = schema.Strategy(MODES[mode].strategies[0])
    config.train = replace(config.train, steps=steps, log_every=log_every)
    return config


def make_record(config: schema.Config, *, seed: int = 0) -> RunRecord:
    """A record of which no step is done yet: `complete` completes steps of it."""
    steps, replicas = config.train.steps, config.num_replicas
    layout = plan(
        [("kernel", (4, 3)), ("bias", (3,))],
        [],
        [],
        counter=False,
        num_replicas=replicas,
        loss_scale=config.precision.name == "mixed_float16",
    )
    random = np.random.default_rng(seed)
    record = RunRecord(layout, steps, [ReplicaRecord.empty(each, steps, replicas) for each in range(replicas)])
    record.initial = np.zeros(layout.size, np.float32)
    for replica in record.replicas:
        noise = random.normal(0, 0.05, steps)
        replica.losses[:] = 2.3 * np.exp(-np.arange(steps) / (steps / 3)) + noise + 0.1 * replica.replica_id
    return record


def complete(record: RunRecord, steps: int, *, audited: bool = True, torn: bool = False) -> None:
    """Let every replica have completed so many steps, with its audit columns read off or not yet; all in float32."""
    float32 = code("float32")
    for replica in record.replicas:
        replica.steps_done = steps
        if audited:
            replica.staleness[:steps] = (np.arange(steps) + replica.replica_id) % record.num_replicas
            replica.read_version[:steps] = np.arange(steps) * record.num_replicas
            replica.read_state[:steps] = FRACTURED if torn else 0
            replica.noted[:steps] = Noted(0, 0, batch=0, asked=float32, entry=0, exit=0)
            replica.loss_scale[:steps, 0] = 32768
            read_off(replica, activations=[float32] * steps, gradients=[float32] * steps)


def read_off(replica: ReplicaRecord, **codes: Sequence[int]) -> None:
    """Let these codes have been read off a replica's first steps: `activations`, `gradients`, or fields of `Noted`."""
    for name, column in codes.items():
        if name == "activations":
            replica.computed_in[: len(column)] = column
            found = Counter(column)
            replica.computed = Counter({DTYPES[each]: count for each, count in found.items()})
        elif name == "gradients":
            replica.gradients_in[: len(column)] = column
        else:
            replica.noted[: len(column), Noted._fields.index(name)] = column


def add_references(record: RunRecord, every: int = 20) -> None:
    """Gradient references: both replicas along the same direction, and a joint gradient that is their mean."""
    for step in range(0, record.steps, every):
        direction = np.zeros(record.layout.read_size, np.float32)
        for segment in record.layout.read_segments:
            direction[segment.span] = 1.0
        for replica in record.replicas:
            own = direction * np.float32(1 + replica.replica_id)
            joint = direction * np.float32((1 + record.num_replicas) / 2)
            record.references.append(Reference(replica.replica_id, step, direction, own, joint, own, joint))


def end(record: RunRecord, *kept: int) -> None:
    """Let the one copy have kept so many updates of each replica, in every variable."""
    record.copies = np.zeros((1, record.layout.size), np.float32)
    record.copies[:, record.layout.canaries] = np.array(kept, np.float32)


def make_verdict(config: schema.Config, record: RunRecord, *, kept: int | None = None) -> Verdict:
    """The verdict of a run that kept so many of its updates; all of them by default."""
    expected = config.num_replicas * config.train.steps
    kept = expected if kept is None else kept
    mode = MODES[config.update_mode.name]
    guarantees = [_guarantee(name, config, lost=expected - kept) for name in GUARANTEES]
    anomalies = []
    if kept < expected:
        witness = "step 12: replica 1 wrote over replica 0's update; kernel holds 12 of replica 0's 13 updates"
        anomalies.append(
            Anomaly(
                "overwritten_update", expected - kept, expected, "all 2 shared variables", witness, remedy=mode.remedy
            )
        )
    done = [replica.losses[: replica.steps_done] for replica in record.replicas]
    metrics: dict[str, float | int | None] = {
        "loss": float(np.mean([losses[-1] for losses in done])) if record.steps_done else None,
        "accuracy": 0.9472,
        "updates_expected": expected,
        "updates_kept": kept,
        "staleness_mean": 0.5,
        "staleness_max": config.num_replicas - 1,
        "torn_reads": 0,
        "gradient_cosine_min": 1.0,
        "gradient_error_max": 0.0,
        "replica_divergence_max": None if config.strategy.name == "threads" else 0.0,
        "micro_steps_per_second": 1234.5,
    }
    run = {
        "command": "trainer",
        "workload": "train",
        "strategy": config.strategy.name,
        "engine": "torch",
        "update_mode": config.update_mode.name,
        "num_replicas": config.num_replicas,
        "model": config.model.name,
        "data": config.data.name,
        "optimizer": config.optimizer.name,
        "precision": config.precision.name,
        "state": holders.state(config),
        "schedule": "free",
        "audit": "counters",
        "steps": config.train.steps,
        "batch_size": config.train.batch_size,
        "seed": config.train.seed,
        "threads_per_replica": 1,
        "duration_seconds": 1.5,
        "versions": {"python": "3.11"},
    }
    return Verdict(
        verdicts.sum_up(None, guarantees),
        run,
        guarantees=guarantees,
        anomalies=anomalies,
        precision=[
            PrecisionRow(each.replica_id, "float32", dict(each.computed), record.steps, 0) for each in record.replicas
        ],
        metrics=metrics,
        final_parameters_sha256="0" * 64,
    )


def _guarantee(name: str, config: schema.Config, *, lost: int) -> Guarantee:
    mode = MODES[config.update_mode.name]
    claimed, required = name in claims(config), name in config.require
    if name in mode.not_applicable:
        return Guarantee(name, claimed, required, "not_applicable", Covers(), "")
    if name not in checkable(config):
        return Guarantee(name, claimed, required, "not_checked", Covers(), "")
    seen = lost > 0 and name == "no_lost_updates"
    evidence = (
        f"{lost} of {config.num_replicas * config.train.steps} updates are missing at the end"
        if seen
        else "nothing seen"
    )
    status: Status = ("violated" if seen else "upheld") if claimed or required else ("anomaly" if seen else "not_seen")
    return Guarantee(name, claimed, required, status, Covers(), evidence)


def report_run(
    folder: Path, mode: str, *, finish: bool = True, console: Console | None = None, precision: str = "float32"
) -> RunRecord:
    """Report a whole run of 45 steps in chunks, as a run would, and leave its verdict in the folder."""
    config = make_config(mode, precision=precision)
    record = make_record(config)
    folder.mkdir(parents=True)
    with Observer(config, folder, console or Console(file=io.StringIO())) as observer:
        for steps in (0, 7, 30, 45):
            complete(record, steps)
            observer.progress(record)
            if steps:
                observer.kept(steps, 2 * steps if mode == SAFE else steps, 2 * steps, 0.0 if mode == SAFE else 0.1)
        observer.evaluated(Evaluation(45, accuracy=0.9472, loss=0.21))
        if finish:
            add_references(record)
            end(record, *((45, 45) if mode == SAFE else (0, 45)))
            verdict = make_verdict(config, record, kept=90 if mode == SAFE else 45)
            observer.finished(record, verdict)
            verdicts.save(verdict, folder)
    return record


def add_run(
    folder: Path,
    job: int,
    mode: str,
    *,
    replicas: int = 2,
    kept: int | None = None,
    anomalies: Sequence[Anomaly] = (),
    **changed: Any,
) -> None:
    """Leave the verdict of a run as a sweep's job would; `changed` are other values among its run's or its metrics."""
    config = make_config(mode, replicas=replicas)
    record = make_record(config)
    complete(record, config.train.steps)
    verdict = make_verdict(config, record, kept=kept)
    verdict.anomalies += anomalies
    for name, value in changed.items():
        (verdict.metrics if name in verdict.metrics else verdict.run)[name] = value
    run_folder = folder / f"{job}_{config.strategy.name}_{mode}_{replicas}"
    run_folder.mkdir(parents=True)
    verdicts.save(verdict, run_folder)


def seen(kind: str, count: int, of: int) -> Anomaly:
    return Anomaly(kind, count, of, where="everywhere", witness="somewhere")


def add_broken(folder: Path, job: int, kind: ErrorKind, message: str) -> None:
    """Leave the verdict of a run that was refused or that broke."""
    run_folder = folder / f"{job}_mirrored_locked_2"
    run_folder.mkdir(parents=True)
    run = {"strategy": "mirrored", "update_mode": "locked", "num_replicas": 2, "model": "mlp", "steps": 45}
    verdicts.save(Verdict("broken", run, error=Error(kind, message)), run_folder)


if __name__ == "__main__":
    for mode, name in NAMES.items():
        report_run(Path(sys.argv[1]) / name, mode, finish="--unfinished" not in sys.argv)
    print(sorted({"tensorflow", "torch", "keras", "jax"} & set(sys.modules)))

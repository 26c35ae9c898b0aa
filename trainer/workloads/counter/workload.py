"""`workload=counter`: replicas that count in one variable, freely and timed, or in every order of a small case."""

from __future__ import annotations

import importlib.metadata

from trainer.audit.findings import Finding
from trainer.audit.records import RunRecord
from trainer.config import Config
from trainer.schedule.case import Case
from trainer.strategies.hosting import StopFlag, Watcher
from trainer.workloads.counter import free
from trainer.workloads.counter.ended import Ended
from trainer.workloads.counter.found import find
from trainer.workloads.counter.free import Counted
from trainer.workloads.counter.ways import GRADIENT, TENSORFLOW, num_writers, variable_of, way_of


def run(config: Config, record: RunRecord, watcher: Watcher, stop: StopFlag) -> dict[str, Finding]:
    record.findings = {}  # of a run that is stopped
    if config.strategy.name == "mirrored":
        from trainer.workloads.counter import mirrored

        ended = mirrored.count(config, record, watcher, stop)
        if stop.is_set():
            return {}
        record.metrics = {"updates_expected": ended.made, "updates_kept": ended.kept}
        return find(ended)
    return _threads(config, record, watcher, stop)


def case(config: Config) -> Case:
    if config.strategy.name == "mirrored":
        from trainer.workloads.counter.mirrored import MirroredCase

        return MirroredCase(config)
    _prepare(config, None)
    from trainer.workloads.counter.orders import ThreadsCase

    return ThreadsCase(config)


def _prepare(config: Config, record: RunRecord | None) -> None:
    """Set up the framework of the variable, where it is not the strategy's own."""
    if variable_of(config) == TENSORFLOW:
        from trainer.workloads.counter import tensorflow_variable

        tensorflow_variable.prepare(record.threads_per_replica if record else 1)


def _threads(config: Config, record: RunRecord, watcher: Watcher, stop: StopFlag) -> dict[str, Finding]:
    record.engine = "eager"
    if variable_of(config) == TENSORFLOW:
        # The strategy's own packages are in the verdict as it is.
        record.engine += f", tensorflow {importlib.metadata.version('tensorflow')}"
    _prepare(config, record)
    free.warm_up(config)
    # On both sides of the run, for what else the machine does comes and goes.
    beside = [free.unsafe(config, stop)]
    counted = free.count(config, record, lambda: watcher.progress(record), stop)
    beside.append(free.unsafe(config, stop))
    if stop.is_set():
        return {}
    if config.workload.counts == "down":
        record.replicas[-1].steps_done = record.steps  # it waits, and takes none of its own
    record.duration_seconds = counted.seconds
    ended = Ended(config, counted.values[None, :, None], counted.roles.isolation.given, counted.roles.left)
    found = find(ended)
    times = [microseconds(counted), microseconds(*(each for each in beside if each is not None))]
    found["no_lost_updates"].evidence += _told(config, counted, *times)
    record.metrics = {
        "updates_expected": ended.made,
        "updates_kept": ended.kept,
        "seconds": counted.seconds,
        "micro_steps_per_second": 1e6 / times[0] if times[0] else None,
        "ratio_to_unsafe": times[0] / times[1] if times[0] and times[1] else None,
        "count_late_max": counted.late if counted.looks else None,
    }
    return found


def microseconds(*runs: Counted) -> float:
    """For one increment, over all threads; 0 where there was none."""
    increments = sum(each.increments for each in runs)
    return sum(each.seconds for each in runs) / increments * 1e6 if increments else 0.0


def _told(config: Config, counted: Counted, time: float, unsafe: float) -> str:
    """What it cost, and where threads were seen to wait for each other."""
    one = "a step" if way_of(config).base == GRADIENT else "an increment"
    told = f"; {counted.seconds:.2f} s, {time:,.2f} us {one}"
    if unsafe:
        told += f", {time / unsafe:.2f} times the {unsafe:,.2f} us with nothing held"
    if counted.looks:
        private = config.workload.private_increments
        told += (
            f"; others saw the count late by up to {counted.late:,} (in {counted.looks:,} looks; by "
            f"{num_writers(config) * private:,} at most), and what a thread has not merged is lost if it ends early"
        )
    if waited := counted.waits.told():
        told += f"; threads were seen to wait for each other in {waited} (show bytecode)"
    return told

"""A free run of threads: as fast as they can, timed, with the same increments and nothing held beside it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from trainer.audit.records import ReplicaRecord, RunRecord
from trainer.config import Config, UpdateMode
from trainer.state.layout import EMPTY
from trainer.strategies.hosting import StopFlag
from trainer.strategies.replica_threads import ReplicaThreads
from trainer.workloads.counter.build import roles_of, variable_for
from trainer.workloads.counter.bytecode import Waits
from trainer.workloads.counter.pace import FreePace
from trainer.workloads.counter.roles import Roles
from trainer.workloads.counter.shared import Numbers
from trainer.workloads.counter.ways import num_writers, unprotected, way_of

# Of the run's steps, those that the loop with nothing held is timed for, before the run and once more after it: one in
# so many.
SHARE_OF_UNSAFE = 8
# But no fewer than this, where there are so many.
FEWEST_STEPS = 100
# Increments before anything is timed.
WARM_UP = 16


@dataclass
class Counted:
    """What threads have come to.

    Attributes:
        values: the variable at the end, [elements].
        seconds: from the common start to when the last replica was through.
        waits: where in the bytecode threads were seen waiting.
        late: the most increments that threads were seen to have made and not merged yet, in `looks` looks.
    """

    roles: Roles
    values: Numbers
    seconds: float
    increments: int
    waits: Waits = field(default_factory=Waits)
    late: int = 0
    looks: int = 0


def count(config: Config, record: RunRecord, report: Callable[[], None], stop: StopFlag) -> Counted:
    """Run every replica's thread to its end.

    Raises:
        RunBroken: a replica raised, or none made an increment for `watchdog.seconds`.
    """
    variable = variable_for(config)
    shared = variable.make()
    roles = roles_of(config, variable, shared)
    ended, writers = threading.Event(), num_writers(config)
    paces = [FreePace(each, ended) for each in record.replicas]
    found = Counted(roles, variable.values(shared.total), 0.0, writers * config.train.steps)

    def look() -> None:
        found.waits.look()
        if config.workload.private_increments > 1:
            found.late, found.looks = max(found.late, roles.unmerged), found.looks + 1
        report()

    threads = ReplicaThreads(
        record,
        lambda own: roles.body(own, paces[own]),
        ended,
        abort=roles.isolation.abort,
        report=look,
        stop=stop,
        stall_seconds=config.watchdog.seconds,
    )
    threads.run()
    found.seconds, found.values = threads.seconds, variable.values(shared.total)
    return found


def warm_up(config: Config) -> None:
    """Make a few increments that nobody counts: a framework's first operations take much longer than all later ones."""
    config, variable = _unprotected(config, 1), variable_for(config)
    roles = roles_of(config, variable, variable.make())
    roles.isolation.add(0, WARM_UP, roles.amounts[0])


def unsafe(config: Config, stop: StopFlag) -> Counted | None:
    """The same increments with nothing held, for a share of the steps; None where the run itself is that.

    Readers and who waits for zero have no part in it.
    """
    own, steps = config.workload, config.train.steps
    bare = config.update_mode.name == unprotected(way_of(config)) and own.private_increments == 1
    if bare or own.readers or own.counts == "down":
        return None
    config, writers = _unprotected(config, max(steps // SHARE_OF_UNSAFE, min(steps, FEWEST_STEPS))), num_writers(config)
    # Threads are watched through a record; this one is no part of the run's.
    replicas = [ReplicaRecord.empty(own, 0, writers) for own in range(writers)]
    return count(config, RunRecord(EMPTY, config.train.steps, replicas), lambda: None, stop)


def _unprotected(config: Config, steps: int) -> Config:
    """The same increments, one by one, with nothing held round them."""
    way = way_of(config)
    return replace(
        config,
        update_mode=UpdateMode(unprotected(way)),
        workload=replace(config.workload, operation=way.name, private_increments=1, section_increments=1),
        train=replace(config.train, steps=steps),
    )

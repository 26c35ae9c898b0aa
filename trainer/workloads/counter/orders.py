"""Threads that count in one order after another, with everything that they share made anew for each."""

from __future__ import annotations

from contextlib import ExitStack
from functools import cache, partial

from trainer.audit.records import RunRecord
from trainer.config import Config
from trainer.schedule.attributes import announced
from trainer.schedule.locks import known_to_the_schedule, modelled
from trainer.schedule.order import Order
from trainer.strategies.controlled_threads import turnstile
from trainer.workloads.counter.build import roles_of, variable_for
from trainer.workloads.counter.ended import Ended
from trainer.workloads.counter.found import find
from trainer.workloads.counter.pace import TurnPace
from trainer.workloads.counter.ways import JOINT


class ThreadsCase:
    """`trainer/schedule/case.py` for replicas that are threads."""

    copies = False

    def __init__(self, config: Config) -> None:
        self.num_replicas = config.num_replicas
        self.joint = config.update_mode.name in JOINT
        self._config = config
        self._variable = variable_for(config)
        self._announced = cache(announced)  # it reads the class's source

    def run(self, order: Order, record: RunRecord) -> None:
        config = self._config
        record.engine = "eager"
        with ExitStack() as scope:
            scope.enter_context(modelled())
            if config.workload.counts == "down":
                # What waits for zero waits at a `threading.Event`.
                scope.enter_context(known_to_the_schedule())
            roles = roles_of(config, self._variable, self._variable.visible(), self._announced)
            paces = [TurnPace(each) for each in record.replicas]
            turnstile(order, config).run([partial(roles.body, own, pace) for own, pace in enumerate(paces)])
        for each in record.replicas:
            each.steps_done = record.steps  # whoever waits takes none of its own
        values = self._variable.values(roles.shared.total)
        record.findings = find(Ended(config, values[None, :, None], roles.isolation.given, roles.left))
        record.ended_in = values.tobytes()

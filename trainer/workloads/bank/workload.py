"""A run of the bank: freely, with its locks watched, or in the orders of a schedule."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from functools import partial

from trainer.audit.findings import Finding
from trainer.audit.records import RunRecord
from trainer.config import Config
from trainer.schedule.locks import modelled, shown_to
from trainer.schedule.operations import BEGIN
from trainer.schedule.order import Order
from trainer.schedule.point import mark
from trainer.schedule.turnstile import Turnstile
from trainer.state.synchronized import Poisoned
from trainer.strategies.hosting import StopFlag, Watcher
from trainer.strategies.lock_watch import LockWatch
from trainer.strategies.replica_threads import ReplicaThreads
from trainer.workloads.bank import ledger, plan
from trainer.workloads.bank.accounts import CHANGES, Account, Refused, Seen
from trainer.workloads.bank.ledger import Ledger
from trainer.workloads.bank.transfers import WAYS, InSynchronized

ENGINE = "python"
# Longer than a replica takes from one announcement to the next on a busy machine.
STALL_SECONDS = 20.0


class Bank:
    """The accounts, the way that transfers are made, and what replicas note. Built anew for each run."""

    def __init__(self, config: Config) -> None:
        self._config = config.workload
        self._seed = config.train.seed
        self._num_movers = config.num_replicas - self._config.auditors
        self.initial = plan.balances(self._config)
        self.accounts = {name: Account(name, balance) for name, balance in self.initial.items()}
        self.way = WAYS[self._config.transfer](self.accounts, CHANGES[self._config.refused])
        self.ledgers = [Ledger(own) for own in range(config.num_replicas)]

    def replica(self, record: RunRecord, ended: threading.Event, own: int) -> None:
        """The body of one thread."""
        notes, expected = self.ledgers[own], sum(self.initial.values())
        transfers = plan.transfers(self._config, own, self._num_movers, self._seed)
        for step in range(record.steps):
            if ended.is_set():
                break
            mark(BEGIN)
            try:
                if own >= self._num_movers:
                    notes.note_audit(step, self.way.audit(), expected)
                else:
                    transfer = next(transfers)
                    self.way.transfer(transfer)
                    notes.note_made()
            except Refused as refusal:
                notes.note_refused(step, transfer, refusal)
            except Poisoned:
                notes.note_poisoned()
            record.replicas[own].steps_done = step + 1

    @property
    def final(self) -> dict[str, Seen]:
        return {name: account.now for name, account in self.accounts.items()}

    def find(self) -> dict[str, Finding]:
        poisoned = isinstance(self.way, InSynchronized) and self.way.poisoned
        return ledger.find(self.ledgers, self.initial, self.final, audited=self._config.auditors > 0, poisoned=poisoned)


def run(config: Config, record: RunRecord, watcher: Watcher, stop: StopFlag) -> Mapping[str, Finding]:
    record.engine = ENGINE
    locks, ended = LockWatch(), threading.Event()
    with shown_to(locks.see):
        bank = Bank(config)
    threads = ReplicaThreads(
        record,
        partial(bank.replica, record, ended),
        ended,
        abort=lambda: None,
        report=lambda: watcher.progress(record),
        stop=stop,
        stall_seconds=config.watchdog.seconds,
        locks=locks,
    )
    threads.run()
    record.duration_seconds = threads.seconds
    record.metrics = ledger.metrics(bank.ledgers, bank.final, threads.seconds)
    return {**bank.find(), "no_deadlock": Finding("every replica came to its end, and none waited for ever")}


class BankCase:
    """The bank, opened anew for each order (`trainer/schedule/case.py`)."""

    joint = copies = False

    def __init__(self, config: Config) -> None:
        self.num_replicas = config.num_replicas
        self._config = config

    def run(self, order: Order, record: RunRecord) -> None:
        record.engine = ENGINE
        never = threading.Event()
        with modelled():
            bank = Bank(self._config)
            bodies = [partial(bank.replica, record, never, own) for own in range(self.num_replicas)]
            Turnstile(order, min(self._config.watchdog.seconds, STALL_SECONDS)).run(bodies)
        record.findings = bank.find()
        record.ended_in = repr({name: seen.balance for name, seen in bank.final.items()}).encode()


def case(config: Config) -> BankCase:
    return BankCase(config)

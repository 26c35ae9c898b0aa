"""Accounts, and three ways to make a transfer between them: when a transfer that cannot be made is refused.

Nothing here locks: `transfers.py` says under which locks it is done.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from trainer.schedule.operations import READ, WRITE
from trainer.schedule.point import point
from trainer.workloads.bank.plan import Transfer


class Refused(Exception):
    """A transfer that was not made.

    Attributes:
        writes: balances that were written all the same: 1, and the money is gone; 2, and it is back.
    """

    def __init__(self, why: str, writes: int = 0) -> None:
        super().__init__(why)
        self.writes = writes


class UnknownAccount(Refused):
    pass


class Overdraft(Refused):
    pass


class Seen(NamedTuple):
    """What an account held when it was read.

    Attributes:
        writes: those that the balance is made of, one on another. Whoever writes from what has been overwritten
            leaves others' out: that is how they are counted.
    """

    balance: int
    writes: int


class Account:
    """One balance. Reading and writing it are two operations, announced to a schedule where there is one."""

    def __init__(self, name: str, balance: int) -> None:
        self.name = name
        self.now = Seen(balance, 0)

    def read(self) -> Seen:
        point(READ, self.name)
        return self.now

    def write(self, seen: Seen, amount: int) -> None:
        """Put what was seen, changed by an amount."""
        balance = seen.balance + amount
        point(WRITE, self.name, value=balance)
        self.now = Seen(balance, seen.writes + 1)


Accounts = Mapping[str, Account]
# What is done under the locks. Returns a refusal that has changed nothing, raises one that has.
Change = Callable[[Accounts, Transfer], Refused | None]


def before(accounts: Accounts, transfer: Transfer) -> Refused | None:
    """Everything is looked at before anything is changed."""
    source, destination = accounts.get(transfer.source), accounts.get(transfer.destination)
    if source is None or destination is None:
        return unknown(transfer.destination if source else transfer.source)
    seen = source.read()
    if seen.balance < transfer.amount:
        return overdraft(transfer, seen)
    source.write(seen, -transfer.amount)
    destination.write(destination.read(), transfer.amount)
    return None


def midway(accounts: Accounts, transfer: Transfer) -> Refused | None:
    """Debit, then look the destination up: where it is unknown, the money has left and not arrived."""
    source = accounts.get(transfer.source)
    if source is None:
        return unknown(transfer.source)
    seen = source.read()
    if seen.balance < transfer.amount:
        return overdraft(transfer, seen)
    source.write(seen, -transfer.amount)
    destination = accounts.get(transfer.destination)
    if destination is None:
        raise unknown(transfer.destination, writes=1)
    destination.write(destination.read(), transfer.amount)
    return None


def undone(accounts: Accounts, transfer: Transfer) -> Refused | None:
    """As `midway`, and what was debited is put back."""
    try:
        return midway(accounts, transfer)
    except UnknownAccount:
        source = accounts[transfer.source]
        source.write(source.read(), transfer.amount)
        return unknown(transfer.destination, writes=2)


CHANGES: dict[str, Change] = {"before": before, "midway": midway, "undone": undone}


def unknown(name: str, writes: int = 0) -> UnknownAccount:
    return UnknownAccount(f"no account is called {name}", writes)


def overdraft(transfer: Transfer, seen: Seen) -> Overdraft:
    return Overdraft(f"{transfer.source} holds {seen.balance}, less than {transfer.amount}")


def total(accounts: Accounts) -> int:
    """The sum of all balances, read one after the other."""
    return sum(account.read().balance for account in accounts.values())

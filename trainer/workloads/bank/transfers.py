"""The ways to make a transfer while others make theirs, unsafe and safe side by side.

Each is built with the accounts and a change (`accounts.py`), makes `transfer`s, and sums all accounts in an
`audit`.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Protocol, TypeVar

from trainer.schedule.locks import Lock
from trainer.state.synchronized import Synchronized, acquire_locked
from trainer.workloads.bank.accounts import Accounts, Change, Refused, total, unknown
from trainer.workloads.bank.plan import Transfer


class Way(Protocol):
    """Thread-safety: what each way is about."""

    def __init__(self, accounts: Accounts, change: Change) -> None: ...

    def transfer(self, transfer: Transfer) -> None:
        """Make it.

        Raises:
            Refused: it was not made.
            Poisoned: an earlier one was left half made.
        """

    def audit(self) -> int:
        """The sum of all balances."""


T = TypeVar("T")


def made(refusal: Refused | None) -> None:
    """Raise what a transfer was refused for, if it was."""
    if refusal is not None:
        raise refusal


def both(kept: Mapping[str, T], transfer: Transfer) -> tuple[T, T]:
    """What is kept for the two accounts of a transfer, before anything is acquired.

    Raises:
        UnknownAccount: there is none for one of them.
    """
    for name in (transfer.source, transfer.destination):
        if name not in kept:
            raise unknown(name)
    return kept[transfer.source], kept[transfer.destination]


class Unlocked:
    """No lock."""

    def __init__(self, accounts: Accounts, change: Change) -> None:
        self._accounts, self._change = accounts, change

    def transfer(self, transfer: Transfer) -> None:
        made(self._change(self._accounts, transfer))

    def audit(self) -> int:
        return total(self._accounts)


class BareLock:
    """One lock, acquired and released. What raises in between leaves it held: nobody releases it ever."""

    def __init__(self, accounts: Accounts, change: Change) -> None:
        self._accounts, self._change = accounts, change
        self._lock = Lock("the bank's lock")

    def transfer(self, transfer: Transfer) -> None:
        self._lock.acquire()
        made(self._change(self._accounts, transfer))
        self._lock.release()

    def audit(self) -> int:
        self._lock.acquire()
        found = total(self._accounts)
        self._lock.release()
        return found


class WithLock:
    """One lock and `with`, which releases it on the way out of an exception. What was changed stays changed."""

    def __init__(self, accounts: Accounts, change: Change) -> None:
        self._accounts, self._change = accounts, change
        self._lock = Lock("the bank's lock")

    def transfer(self, transfer: Transfer) -> None:
        with self._lock:
            made(self._change(self._accounts, transfer))

    def audit(self) -> int:
        with self._lock:
            return total(self._accounts)


class InSynchronized:
    """The accounts in a `Synchronized`: not to be had without the lock, and poisoned by an exception in the section.

    A refusal that has changed nothing is therefore handed out of the section, and raised outside.
    """

    def __init__(self, accounts: Accounts, change: Change) -> None:
        self._accounts, self._change = Synchronized(accounts, name="accounts"), change

    def transfer(self, transfer: Transfer) -> None:
        made(self._accounts.with_lock(lambda accounts: self._change(accounts, transfer)))

    def audit(self) -> int:
        return self._accounts.with_lock(total)

    @property
    def poisoned(self) -> bool:
        return self._accounts.poisoned_by is not None


class LockPerAccount:
    """A lock for each account, the source's first. Who transfers the other way acquires them the other way round.

    An auditor that goes from lock to lock sees money before it has left and after it has come.
    """

    def __init__(self, accounts: Accounts, change: Change) -> None:
        self._accounts, self._change = accounts, change
        self._locks = {name: Lock(f"lock of {name}") for name in accounts}

    def transfer(self, transfer: Transfer) -> None:
        source, destination = both(self._locks, transfer)
        with source, destination:
            made(self._change(self._accounts, transfer))

    def audit(self) -> int:
        found = 0
        for name, account in self._accounts.items():
            with self._locks[name]:
                found += account.read().balance
        return found


class OrderedLocks:
    """A lock for each account, acquired in the order of names by everybody."""

    def __init__(self, accounts: Accounts, change: Change) -> None:
        self._accounts, self._change = accounts, change
        self._locks = {name: Lock(f"lock of {name}") for name in sorted(accounts)}

    def transfer(self, transfer: Transfer) -> None:
        both(self._locks, transfer)
        first, second = sorted((transfer.source, transfer.destination))
        with self._locks[first], self._locks[second]:
            made(self._change(self._accounts, transfer))

    def audit(self) -> int:
        with ExitStack() as held:
            for lock in self._locks.values():
                held.enter_context(lock)
            return total(self._accounts)


class AcquireLocked:
    """Each account in a `Synchronized` of its own; `acquire_locked` acquires both in one order, whatever is asked."""

    def __init__(self, accounts: Accounts, change: Change) -> None:
        self._accounts = {name: Synchronized(account, name=name) for name, account in accounts.items()}
        self._change = change

    def transfer(self, transfer: Transfer) -> None:
        with acquire_locked(*both(self._accounts, transfer)) as (source, destination):
            accounts = {transfer.source: source.value, transfer.destination: destination.value}
            refusal = self._change(accounts, transfer)
        made(refusal)

    def audit(self) -> int:
        with acquire_locked(*self._accounts.values()) as handles:
            return total({handle.value.name: handle.value for handle in handles})


WAYS: dict[str, type[Way]] = {
    "unlocked": Unlocked,
    "bare_lock": BareLock,
    "with_lock": WithLock,
    "synchronized": InSynchronized,
    "lock_per_account": LockPerAccount,
    "ordered_locks": OrderedLocks,
    "acquire_locked": AcquireLocked,
}

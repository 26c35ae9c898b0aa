"""The accounts of a bank and the transfers that its replicas are to make. Standard library only."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import NamedTuple

from trainer.config import Bank, ConfigError

# The largest amount of a transfer that was drawn and is no overdraft.
MOST = 10
# Whom transfers are drawn to that cannot be made: no account is called so.
NOBODY = "nobody"

_ACCOUNT = re.compile(r"([A-Za-z]\w*):(\d+)")
_TRANSFER = re.compile(r"([A-Za-z]\w*):([A-Za-z]\w*):(\d+)")


class Transfer(NamedTuple):
    source: str
    destination: str
    amount: int

    def __str__(self) -> str:
        return f"{self.source}:{self.destination}:{self.amount}"


def balances(config: Bank) -> dict[str, int]:
    """What each account holds at first.

    Raises:
        ConfigError: an entry is none.
    """
    found: dict[str, int] = {}
    for entry in config.accounts:
        match = _ACCOUNT.fullmatch(entry)
        if match is None or match[1] in found or match[1] == NOBODY:
            raise ConfigError(
                f"workload.accounts must list NAME:BALANCE, each name once and none '{NOBODY}', as in [x:25,y:100]; "
                f"got '{entry}'."
            )
        found[match[1]] = int(match[2])
    return found


def listed(config: Bank) -> list[Transfer]:
    """The transfers that the configuration lists.

    Raises:
        ConfigError: an entry is none.
    """
    found = []
    for entry in config.transfers:
        match = _TRANSFER.fullmatch(entry)
        if match is None or match[1] == match[2] or int(match[3]) == 0:
            raise ConfigError(
                "workload.transfers must list SOURCE:DESTINATION:AMOUNT, two names and at least 1, as in [x:y:5]; "
                f"got '{entry}'."
            )
        found.append(Transfer(match[1], match[2], int(match[3])))
    return found


def transfers(config: Bank, own: int, num_movers: int, seed: int) -> Iterator[Transfer]:
    """What a replica is to transfer, one after another without end: the same whenever it is asked.

    Args:
        num_movers: replicas that make transfers.
    """
    given = listed(config)
    if given:
        return (given[(step * num_movers + own) % len(given)] for step in count())
    return _drawn(config, balances(config), random.Random(f"{seed} {own}"))


def _drawn(config: Bank, accounts: Mapping[str, int], draw: random.Random) -> Iterator[Transfer]:
    names: Sequence[str] = list(accounts)
    while True:
        source, destination = draw.sample(names, 2)
        amount, fate = draw.randint(1, MOST), draw.random()
        if fate < config.unknown:
            destination = NOBODY
        elif fate < config.unknown + config.overdrafts:
            amount = sum(accounts.values()) + 1
        yield Transfer(source, destination, amount)

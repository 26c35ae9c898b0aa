"""What the keys of `workload=bank` have to keep to, and what each way to transfer claims. Standard library only."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from trainer.config import Bank, ConfigError, Replay, nearest
from trainer.workloads.bank import plan

if TYPE_CHECKING:
    from trainer.config import Config

# What each way keeps, whatever transfers are made in whatever order.
TRANSFERS: dict[str, frozenset[str]] = {
    "unlocked": frozenset(("no_deadlock",)),
    "bare_lock": frozenset(("no_lost_updates", "no_torn_reads", "invariants_kept")),
    "with_lock": frozenset(("no_lost_updates", "no_torn_reads", "invariants_kept", "no_deadlock")),
    "synchronized": frozenset(("no_lost_updates", "no_torn_reads", "invariants_kept", "no_deadlock")),
    "lock_per_account": frozenset(("no_lost_updates", "invariants_kept")),
    "ordered_locks": frozenset(("no_lost_updates", "no_torn_reads", "invariants_kept", "no_deadlock")),
    "acquire_locked": frozenset(("no_lost_updates", "no_torn_reads", "invariants_kept", "no_deadlock")),
}
REFUSED = ("before", "midway", "undone")
# Those that need both accounts before they acquire anything, so that nothing is refused later.
LOOK_UP_FIRST = ("lock_per_account", "ordered_locks", "acquire_locked")


def check(config: Config) -> None:
    """Hold the bank's keys to their ranges and to each other.

    Raises:
        ConfigError: the first rule that is broken, in one line.
    """
    bank = config.workload
    _one_of("workload.transfer", bank.transfer, TRANSFERS)
    _one_of("workload.refused", bank.refused, REFUSED)
    if bank.transfer in LOOK_UP_FIRST and bank.refused != "before":
        fits = ", ".join(way for way in TRANSFERS if way not in LOOK_UP_FIRST)
        raise ConfigError(
            f"workload.refused={bank.refused} does not go with workload.transfer={bank.transfer}, which looks both "
            f"accounts up before it acquires anything. It goes with {fits}."
        )
    _check_plan(bank)
    if not 0 <= bank.auditors < config.num_replicas:
        raise ConfigError(f"workload.auditors must be from 0 to num_replicas - 1; got {bank.auditors}.")
    if getattr(config.schedule, "granularity", "variable") != "variable":
        raise ConfigError("schedule.granularity=memory does not go with workload=bank: a balance has no pieces.")
    if config.audit.repeat > 1 and not isinstance(config.schedule, Replay):
        raise ConfigError(
            f"audit.repeat={config.audit.repeat} needs schedule=replay under workload=bank. Leave audit.repeat out."
        )


def claims(config: Config) -> frozenset[str]:
    """What the way to transfer keeps. Money that leaves before its destination is known may not arrive."""
    bank = config.workload
    return TRANSFERS[bank.transfer] - (frozenset(("invariants_kept",)) if bank.refused == "midway" else frozenset())


def _check_plan(bank: Bank) -> None:
    if len(plan.balances(bank)) < 2:
        raise ConfigError(f"workload.accounts must list at least 2 accounts; got {len(bank.accounts)}.")
    plan.listed(bank)
    for key in ("unknown", "overdrafts"):
        share = getattr(bank, key)
        if not 0 <= share <= 1:
            raise ConfigError(f"workload.{key} must be from 0 to 1; got {share:g}.")
    if bank.unknown + bank.overdrafts > 1:
        raise ConfigError(
            f"workload.unknown and workload.overdrafts must be at most 1 together; got {bank.unknown:g} and "
            f"{bank.overdrafts:g}."
        )


def _one_of(key: str, value: str, known: Iterable[str]) -> None:
    known = list(known)
    if value not in known:
        raise ConfigError(f"{key} must be one of {', '.join(known)}; got '{value}'.{nearest(value, known)}")

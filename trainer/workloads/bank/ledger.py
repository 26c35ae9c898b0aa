"""What each replica notes of its transfers, and what all notes together say about the accounts they have left."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from trainer.audit.findings import Finding, not_checked
from trainer.audit.verdict import Anomaly
from trainer.workloads.bank.accounts import Overdraft, Refused, Seen
from trainer.workloads.bank.plan import Transfer

# How an anomaly is remedied.
LOOK_FIRST = "workload.refused=before looks at everything before it changes anything"
ONE_LOCK = "workload.transfer=with_lock,synchronized,ordered_locks,acquire_locked keep transfers apart"
ALL_LOCKS = "workload.transfer=ordered_locks,acquire_locked let an auditor hold all locks at once"


@dataclass
class Ledger:
    """One replica's notes. Thread-safety: its own thread; the main thread's once that has ended.

    Attributes:
        writes: balances that it wrote.
        refused: why its transfers were not made -> how many.
        half, half_sum: transfers that took money and brought it nowhere, and how much; `first_half` tells the first.
        audits: totals that it saw -> how often; `other` the first that was not the bank's, with its step.
    """

    own: int
    made: int = 0
    writes: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    half: int = 0
    half_sum: int = 0
    first_half: str = ""
    audits: Counter[int] = field(default_factory=Counter)
    other: str = ""

    def note_made(self) -> None:
        self.made += 1
        self.writes += 2

    def note_refused(self, step: int, transfer: Transfer, refusal: Refused) -> None:
        self.refused["overdraft" if isinstance(refusal, Overdraft) else "unknown account"] += 1
        self.writes += refusal.writes
        if refusal.writes == 1:
            self.half += 1
            self.half_sum += transfer.amount
            told = f"replica {self.own}'s transfer {step}, {transfer}, debited {transfer.source}: {refusal}"
            self.first_half = self.first_half or told

    def note_poisoned(self) -> None:
        self.refused["poisoned"] += 1

    def note_audit(self, step: int, found: int, expected: int) -> None:
        self.audits[found] += 1
        if found != expected and not self.other:
            self.other = f"replica {self.own}'s audit {step} came to {found}, where the accounts hold {expected}"


def find(
    ledgers: Sequence[Ledger],
    initial: Mapping[str, int],
    final: Mapping[str, Seen],
    *,
    audited: bool,
    poisoned: bool,
) -> dict[str, Finding]:
    """What the accounts tell, by guarantee, besides `no_deadlock`.

    Args:
        initial: what each account held at first.
        final: what each account is left with.
        audited: whether there are auditors.
        poisoned: whether nobody gets at the accounts any more.
    """
    kept, made = _writes(final), sum(each.writes for each in ledgers)
    before, after = sum(initial.values()), sum(each.balance for each in final.values())
    torn = Finding("nobody sums the accounts (workload.auditors)", applies=False)
    if audited and (kept != made or any(each.half for each in ledgers)):
        torn = not_checked("money was lost on the way, so that a total does not tell how it was read")
    elif audited:
        torn = _torn_reads(ledgers, before)
    return {
        "no_lost_updates": _lost_updates(kept, made, final),
        "no_torn_reads": torn,
        "invariants_kept": _money(ledgers, before, after, poisoned=poisoned),
    }


def metrics(ledgers: Sequence[Ledger], final: Mapping[str, Seen], seconds: float) -> dict[str, float | int | None]:
    """The bank's own numbers: `transfers_made`, `transfers_refused`, `audits`, `money`."""
    steps = sum(each.made + each.refused.total() + each.audits.total() for each in ledgers)
    return {
        "transfers_made": sum(each.made for each in ledgers),
        "transfers_refused": sum(each.refused.total() for each in ledgers),
        "audits": sum(each.audits.total() for each in ledgers),
        "money": sum(each.balance for each in final.values()),
        "updates_expected": sum(each.writes for each in ledgers),
        "updates_kept": _writes(final),
        "micro_steps_per_second": steps / seconds if seconds > 0 else None,
    }


def _writes(final: Mapping[str, Seen]) -> int:
    return sum(each.writes for each in final.values())


def _lost_updates(kept: int, made: int, final: Mapping[str, Seen]) -> Finding:
    """Count the writes that the last balances are made of."""
    finding = Finding(f"{kept:,} of {made:,} written balances kept, by the count beside each of {len(final)} balances")
    if kept != made:
        where = ", ".join(f"{name}: {seen.writes:,} kept" for name, seen in final.items())
        witness = f"{made - kept:,} balances were written over by ones that were computed before them"
        finding.anomalies.append(Anomaly("overwritten_update", made - kept, made, where, witness, remedy=ONE_LOCK))
    return finding


def _torn_reads(ledgers: Sequence[Ledger], expected: int) -> Finding:
    """Hold what auditors saw to what there was all the time, between any two transfers."""
    audits = sum(each.audits.total() for each in ledgers)
    off = audits - sum(each.audits[expected] for each in ledgers)
    finding = Finding(f"{audits - off:,} of {audits:,} audits came to {expected:,}")
    if off:
        where = ", ".join(
            f"replica {each.own}: {each.audits.total() - each.audits[expected]:,}" for each in ledgers if each.audits
        )
        witness = next(each.other for each in ledgers if each.other)
        finding.anomalies.append(Anomaly("fractured_read", off, audits, where, witness, remedy=ALL_LOCKS))
    return finding


def _money(ledgers: Sequence[Ledger], before: int, after: int, *, poisoned: bool) -> Finding:
    """Hold the sum of all balances to what it was."""
    refused: Counter[str] = sum((each.refused for each in ledgers), Counter())
    told = [f"{number:,} refused ({why})" for why, number in sorted(refused.items())]
    made = f"{sum(each.made for each in ledgers):,} transfers made"
    finding = Finding(f"the accounts hold {after:,}, at first {before:,}; {', '.join([made, *told])}")
    if after != before:
        finding.anomalies.append(_changed_money(ledgers, before, after, refused["poisoned"] if poisoned else None))
    return finding


def _changed_money(ledgers: Sequence[Ledger], before: int, after: int, told: int | None) -> Anomaly:
    """Why the sum is another one.

    Args:
        told: steps that came too late and were told that the accounts are poisoned; None where they are not.
    """
    half = [each for each in ledgers if each.half]
    where = ", ".join(f"replica {each.own}: {each.half_sum:,} in {each.half:,} half made" for each in half)
    first = half[0].first_half if half else f"the accounts hold {after:,}, at first {before:,}"
    remedy = LOOK_FIRST if half else ONE_LOCK
    if told is None:
        kind = "lost_money" if after < before else "money_created"
        return Anomaly(kind, abs(before - after), before, where, first, remedy=remedy)
    witness = f"{first}; who came later was told, {told:,} in all, and changed nothing"
    return Anomaly("poisoned", before - after, before, where, witness, remedy=f"repair() lets one mend it; {remedy}")

"""S1.5 to S1.7 and S2: a bank, and values that are used under their lock."""

from __future__ import annotations

from collections.abc import Sequence

from trainer.claims.claim import Claim, Measured, Ran, of

# One goes to an account that does not exist, and one is as it should be; two that go opposite ways.
_UNKNOWN = "train.steps=1 schedule=search workload.transfers=[x:nobody:5,y:z:10]"
_OPPOSITE = "workload=bank train.steps=1 schedule=search workload.transfers=[x:y:5,y:x:10]"
_BARE, _WITH = f"experiment=bank_bare_lock {_UNKNOWN}", f"experiment=bank_with_statement {_UNKNOWN}"
_SYNCHRONIZED = f"experiment=bank_synchronized {_UNKNOWN}"


def _bare(ran: Sequence[Ran]) -> Measured:
    goes_on, ends, frees = (each.broken("no_deadlock") for each in ran)
    always = goes_on[0] == goes_on[1]
    return Measured(
        "reproduced" if always and ends[0] > 0 and not frees[0] else "refuted",
        f"whoever raised goes on to its next transfer: deadlock in {of(goes_on)}; it ends: in {of(ends)}, those in "
        "which another comes after it; with `with`: in none",
    )


def _releases(ran: Sequence[Ran]) -> Measured:
    (freed,) = (each.broken("no_deadlock") for each in ran)
    return Measured("reproduced" if not freed[0] else "refuted", f"deadlock in {of(freed)}")


def _is_not_undoing(ran: Sequence[Ran]) -> Measured:
    midway, undone, before = ran
    lost, orders = midway.broken("invariants_kept")
    kept = undone.held("invariants_kept") and before.held("invariants_kept")
    return Measured(
        "reproduced" if lost == orders and kept else "refuted",
        f"money is lost in {of((lost, orders))}; none where the debit is undone, or the destination looked up first",
    )


def _opposite(ran: Sequence[Ran]) -> Measured:
    crossed, *others = (each.broken("no_deadlock") for each in ran)
    unlocked = ran[-1].broken("invariants_kept")
    safe = not any(count for count, _ in others)
    return Measured(
        "reproduced" if crossed[0] and safe else "refuted",
        f"a lock per account, the source's first: deadlock in {of(crossed)}; in one order, or by `acquire_locked`: in "
        f"none; without locks money is lost or made in {of(unlocked)}",
    )


def _synchronized(ran: Sequence[Ran]) -> Measured:
    midway, undone, opposite = ran
    poisoned, orders = midway.broken("invariants_kept")
    kept = undone.held("invariants_kept", "no_deadlock") and opposite.held("invariants_kept", "no_deadlock")
    return Measured(
        "refined" if poisoned == orders and kept else "refuted",
        "the value cannot be reached without its lock, and that alone undoes nothing: what S1.7 does still loses the "
        f"money, but poisons the value in {of((poisoned, orders))}, so that whoever comes next is told; with the debit "
        "undone, and with a value per account and `acquire_locked`, nothing is lost and nobody waits for ever",
    )


CLAIMS = (
    Claim(
        "S1.5",
        "after an exception under a bare `acquire` nobody releases the lock, and everybody waits for ever",
        (
            _BARE.replace("steps=1", "steps=2"),
            _BARE,
            _WITH,
        ),
        _bare,
        ("experiment=bank_bare_lock",),
        lambda ran: f"exit status {ran[0].status}: {ran[0].verdict['error']['kind']}",
    ),
    Claim(
        "S1.6",
        "`with lock:` releases on the way out of an exception",
        (_WITH,),
        _releases,
    ),
    Claim(
        "S1.7",
        "releasing is not undoing: with an unknown destination the lock is free and the money gone",
        (
            _WITH,
            f"{_WITH} workload.refused=undone",
            f"{_WITH} workload.refused=before",
        ),
        _is_not_undoing,
    ),
    Claim(
        "S1.9",
        "beyond: two locks acquired in opposite orders wait for each other",
        tuple(
            f"{_OPPOSITE} workload.transfer={way}"
            for way in ("lock_per_account", "ordered_locks", "acquire_locked", "unlocked")
        ),
        _opposite,
        ("experiment=bank_opposite_orders",),
        lambda ran: f"exit status {ran[0].status}",
    ),
    Claim(
        "S2",
        "with value and lock in one object the value cannot be used without the lock",
        (
            _SYNCHRONIZED,
            f"{_SYNCHRONIZED} workload.refused=undone",
            f"{_OPPOSITE} workload.transfer=acquire_locked",
        ),
        _synchronized,
    ),
)

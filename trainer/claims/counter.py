"""S1.1 to S1.4 and what is beyond them: a counter that two threads raise."""

from __future__ import annotations

from collections.abc import Sequence

from trainer.claims.claim import Claim, Measured, Ran, of

_ORDERS = "schedule=search train.steps=1"
# As other threads can see a kernel that is not atomic.
_IN_PIECES = "schedule.granularity=memory schedule.chunks=1"
_TWO = "schedule=search train.steps=2"
_IN_PLACE = f"experiment=counter_in_place {_ORDERS}"


def _loses(ran: Sequence[Ran]) -> Measured:
    pieces, whole = (each.broken("no_lost_updates") for each in ran)
    return Measured(
        "reproduced" if pieces[0] and not whole[0] else "refuted",
        f"with the kernel in pieces, as other threads can see it, {of(pieces)} lose an increment; with the kernel "
        f"whole {of(whole)}",
    )


def _kernel(ran: Sequence[Ran]) -> Measured:
    in_place, anew = (each.broken("no_lost_updates") for each in ran)
    return Measured(
        "refined" if anew[0] and not in_place[0] else "refuted",
        f"it does for `t = t + 1`: {of(anew)} lose an increment. `+=` binds the name to the tensor that it was bound "
        f"to: between its instructions nothing is lost ({of(in_place)}), only inside its kernel",
    )


def _exact(ran: Sequence[Ran]) -> Measured:
    (locked,) = (each.broken("no_lost_updates") for each in ran)
    return Measured("reproduced" if not locked[0] else "refuted", f"{of(locked)} lose an increment")


def _told(ran: Sequence[Ran]) -> str:
    """What was kept, and what it cost."""
    (found,) = ran
    kept, made = found.metric("updates_kept"), found.metric("updates_expected")
    told = f"{kept:,} of {made:,} kept in {found.metric('seconds'):.2f} s"
    ratio, late = found.metric("ratio_to_unsafe"), found.metric("count_late_max")
    told += "" if ratio is None else f", {ratio:.2f} times the loop with nothing held, in the same run"
    return told + (f"; seen late by up to {late:,}" if late else "")


CLAIMS = (
    Claim(
        "S1.1",
        "two threads x 1,000,000 times `total += 1` on an int32 scalar tensor, no lock: 1,999,695",
        (f"{_IN_PLACE} {_IN_PIECES}", _IN_PLACE),
        _loses,
        ("experiment=counter_in_place",),
        _told,
    ),
    Claim(
        "S1.2",
        "the bytecode of `total += i` shows where threads can interleave",
        (_IN_PLACE, f"experiment=counter_rebind {_ORDERS}"),
        _kernel,
        ("experiment=counter_rebind",),
        _told,
    ),
    Claim(
        "S1.3",
        "one lock round each increment: exact (36.97 s)",
        (f"experiment=counter_locked_each {_ORDERS} {_IN_PIECES}",),
        _exact,
        ("experiment=counter_locked_each",),
        _told,
    ),
    Claim(
        "S1.4",
        "one lock round the whole loop: exact (8.61 s)",
        (f"experiment=counter_locked_whole {_TWO} {_IN_PIECES}",),
        _exact,
        ("experiment=counter_locked_whole",),
        _told,
    ),
)

BEYOND = Claim(
    "S1.8",
    "beyond: each thread counts for itself and adds what it has under the lock: exact, seen late",
    (f"experiment=counter_private {_TWO} workload.private_increments=2 {_IN_PIECES}",),
    _exact,
    ("experiment=counter_private",),
    _told,
)

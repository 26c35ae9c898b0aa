"""The table of update modes: what each reads under, writes from and writes under, and what it therefore claims.

Data only: `show modes`, the configuration's messages and the verdict are made from it, and the audit holds every row
to what runs really do. The code of the modes stands beside this file.
"""

from __future__ import annotations

from dataclasses import dataclass

# Guarantees that an update mode can claim, in the order of the table's columns.
COLUMNS = ("no_lost_updates", "no_torn_reads", "atomic_updates", "fresh_gradients", "joint_gradient")


@dataclass(frozen=True)
class Mechanism:
    """One row: an update mode's mechanism and claims.

    `claims` names the guarantees that hold in every order; `not_applicable` those that make no sense for the mode;
    `given_up` those that the mode openly trades for speed, so that breaking them is no anomaly. What is in none of
    them, the mode is known to break in some order (or, under mirrored, in its only order).
    """

    name: str
    strategies: tuple[str, ...]
    read_under: str
    base: str
    write_under: str
    claims: frozenset[str]
    not_applicable: frozenset[str]
    given_up: frozenset[str]
    summary: str
    not_elsewhere: str = ""
    remedy: str = ""


def _mode(
    name: str,
    strategies: str,
    read_under: str,
    base: str,
    write_under: str,
    claims: str,
    summary: str,
    *,
    not_applicable: str = "joint_gradient",
    given_up: str = "fresh_gradients",
    not_elsewhere: str = "",
    remedy: str = "",
) -> Mechanism:
    return Mechanism(
        name,
        tuple(strategies.split()),
        read_under,
        base,
        write_under,
        frozenset(claims.split()),
        frozenset(not_applicable.split()),
        frozenset(given_up.split()),
        summary,
        not_elsewhere,
        remedy,
    )


_NO_SHARED_COPY = "under mirrored every replica writes its own copy, so there is no shared one to race on."
_NO_OWN_COPY = "under threads all replicas share one copy, so none can drift away."
_NO_FIRST_OF_ALL = "there is one copy under threads, and a first replica of each worker under multi_worker."

MODES: dict[str, Mechanism] = {
    mode.name: mode
    for mode in (
        _mode(
            "all_reduce",
            "threads mirrored ddp multi_worker",
            "barrier",
            "current",
            "barrier",
            "no_lost_updates no_torn_reads atomic_updates fresh_gradients joint_gradient replicas_identical same_bits",
            "Replicas average their gradients and apply the mean once, together.",
            not_applicable="",
            given_up="",
        ),
        _mode(
            "local_steps",
            "ddp",
            "barrier in each process",
            "current in each process",
            "the same; every so many steps the mean of all copies",
            "no_lost_updates no_torn_reads atomic_updates replicas_identical same_bits",
            "Each process steps by itself; every update_mode.average_every steps the copies are averaged.",
            not_applicable="fresh_gradients joint_gradient",
            given_up="",
            not_elsewhere="it averages the copies of processes.",
            remedy="update_mode=all_reduce reduces gradients in every step",
        ),
        _mode(
            "serialized",
            "threads",
            "one lock round everything",
            "current",
            "the same lock",
            "no_lost_updates no_torn_reads atomic_updates fresh_gradients",
            "One replica at a time, from reading to writing: nothing runs side by side.",
            given_up="",
            not_elsewhere=_NO_SHARED_COPY,
        ),
        _mode(
            "locked",
            "threads",
            "lock",
            "current",
            "lock",
            "no_lost_updates no_torn_reads atomic_updates",
            "Copy under the lock; update the current values under the same lock.",
            not_elsewhere=_NO_SHARED_COPY,
        ),
        _mode(
            "reader_writer",
            "threads",
            "shared lock",
            "current",
            "exclusive lock",
            "no_lost_updates no_torn_reads atomic_updates",
            "As locked, but replicas copy side by side.",
            not_elsewhere=_NO_SHARED_COPY,
        ),
        _mode(
            "optimistic",
            "threads",
            "nothing; version checked at commit",
            "current",
            "lock",
            "no_lost_updates no_torn_reads atomic_updates fresh_gradients",
            "Copy without a lock; commit only if nothing was written since, else compute the gradient again.",
            given_up="",
            not_elsewhere=_NO_SHARED_COPY,
        ),
        _mode(
            "per_variable_lock",
            "threads",
            "a lock per variable",
            "current",
            "a lock per variable",
            "no_lost_updates",
            "Each variable and its slots have a lock of their own: nothing is lost, but they do not move together.",
            not_elsewhere=_NO_SHARED_COPY,
            remedy="update_mode=locked holds one lock over all variables",
        ),
        _mode(
            "lock_free",
            "threads",
            "nothing",
            "current, inside one kernel",
            "nothing",
            "",
            "Hogwild: add to the current values in place, without a lock.",
            not_elsewhere=_NO_SHARED_COPY,
            remedy="update_mode=locked keeps every update",
        ),
        _mode(
            "slots_unlocked",
            "threads",
            "lock",
            "weights current, slots snapshot",
            "lock on the weights only",
            "",
            "Weights are updated under a lock, the optimizer's slots beside it.",
            not_elsewhere=_NO_SHARED_COPY,
            remedy="update_mode=locked updates the slots under the same lock",
        ),
        _mode(
            "write_locked",
            "threads",
            "nothing",
            "snapshot",
            "lock",
            "atomic_updates",
            "Copy without the lock; write copy plus delta under it. Looks safe, loses updates.",
            not_elsewhere=_NO_SHARED_COPY,
            remedy="update_mode=locked also holds the lock while it reads what the write is based on",
        ),
        _mode(
            "overwrite",
            "threads",
            "nothing",
            "snapshot",
            "nothing",
            "",
            "Copy, then write copy plus delta, without a lock.",
            not_elsewhere=_NO_SHARED_COPY,
            remedy="update_mode=locked updates the current values under a lock",
        ),
        _mode(
            "unreduced",
            "mirrored multi_worker",
            "own copy",
            "own copy",
            "nothing",
            "no_torn_reads atomic_updates fresh_gradients same_bits",
            "Each replica applies its own gradient to its own copy (aggregation NONE): copies drift apart.",
            not_applicable="",
            given_up="",
            not_elsewhere=_NO_OWN_COPY,
            remedy="update_mode=all_reduce reduces the gradients before they are applied",
        ),
        _mode(
            "first_replica",
            "mirrored",
            "own copy",
            "own copy",
            "ONLY_FIRST_REPLICA",
            "no_torn_reads atomic_updates fresh_gradients replicas_identical same_bits",
            "Only replica 0's update is applied (aggregation ONLY_FIRST_REPLICA); the others' are dropped.",
            not_applicable="",
            given_up="",
            not_elsewhere=_NO_FIRST_OF_ALL,
            remedy="update_mode=all_reduce reduces the gradients before they are applied",
        ),
        _mode(
            "reassigned_sum",
            "mirrored multi_worker",
            "own copy",
            "own copy",
            "assign(v + delta) under SUM",
            "no_torn_reads atomic_updates fresh_gradients replicas_identical same_bits",
            "Each replica assigns its own new value and the copies are given their sum: every value is multiplied.",
            not_applicable="",
            given_up="",
            not_elsewhere=_NO_OWN_COPY,
            remedy="update_mode=all_reduce reduces the gradients, not the values",
        ),
        _mode(
            "unscaled_sum",
            "mirrored multi_worker threads",
            "barrier",
            "current",
            "barrier, sum of mean losses",
            "no_lost_updates no_torn_reads atomic_updates fresh_gradients replicas_identical same_bits",
            "As all_reduce, but mean losses are summed over replicas: the step is num_replicas times too large.",
            not_applicable="",
            given_up="",
            remedy="update_mode=all_reduce divides the sum by the number of replicas",
        ),
        _mode(
            "custom",
            "threads",
            "?",
            "?",
            "?",
            "",
            "Yours, from update_mode._target_: it claims nothing, and is held to what require= names.",
            not_elsewhere="a mode of your own is written over the vector that threads share.",
            remedy="compare it with update_mode=locked",
        ),
    )
}

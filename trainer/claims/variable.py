"""S4: is a tf.Variable thread-safe?"""

from __future__ import annotations

from collections.abc import Sequence

from trainer.claims.claim import Claim, Measured, Ran, of

_ORDERS = "schedule=search train.steps=1"


def _outcomes(ran: Ran) -> tuple[int, int]:
    return int(ran.verdict["outcomes_distinct"]), int(ran.metric("orders"))


def _unlocked(ran: Sequence[Ran]) -> Measured:
    independent, dependent = ran
    one, several = _outcomes(independent), _outcomes(dependent)
    off = dependent.broken("invariants_kept")
    held = independent.held("no_lost_updates") and dependent.held("no_lost_updates")
    return Measured(
        "refuted" if held and one[0] == 1 and several[0] > 1 else "refined",
        f"`assign_sub` loses nothing, and the gradient of sum(v x id) does not depend on v: {_many(one)}. With sum(v "
        f"x v) / 2, whose gradient does: {_many(several)}, {of(off)} not that of one thread after the other",
    )


def _many(outcomes: tuple[int, int]) -> str:
    distinct, orders = outcomes
    return f"{distinct:,} outcome{'' if distinct == 1 else 's'} of {orders:,} orders"


def _locked(ran: Sequence[Ran]) -> Measured:
    (serialized,) = ran
    outcomes = _outcomes(serialized)
    predictable = outcomes[0] == 1 and serialized.held("invariants_kept", "fresh_gradients")
    return Measured(
        "reproduced" if predictable else "refuted", f"also where the gradient depends on v: {_many(outcomes)}"
    )


def _mirrored(ran: Sequence[Ran]) -> Measured:
    mean, summed, unreduced = ran
    dropped, divergence = unreduced.anomaly("dropped_update"), unreduced.anomaly("divergence")
    right = mean.held("no_lost_updates", "joint_gradient", "replicas_identical")
    wrong = not summed.held("joint_gradient") and dropped[0] > 0
    return Measured(
        "refined" if right and wrong else "reproduced" if right else "refuted",
        "so it is where gradients are reduced to their mean. Summed, as an optimizer sums them, the step is N times "
        f"too large; not reduced, {of(dropped, 'increments')} are missing in some copy and {of(divergence, 'copies')} "
        "differ from the first",
    )


def _torn(ran: Sequence[Ran]) -> Measured:
    torch, tensorflow = (each.broken("no_torn_reads") for each in ran)
    return Measured(
        "refined" if torch[0] and not tensorflow[0] else "reproduced",
        f"of a torch tensor, yes: with its kernel in two pieces, {of(torch)} show half an update. A tf.Variable's "
        f"kernels lock it: {of(tensorflow)}",
    )


def _torn_freely(ran: Sequence[Ran]) -> str:
    torch, tensorflow = (each.guarantee("no_torn_reads")["evidence"] for each in ran)
    return f"torch: {torch.partition(';')[0]}; tf.Variable: {tensorflow.partition(';')[0]}"


CLAIMS = (
    Claim(
        "S4.1",
        "five threads take the gradient of sum(v x id) and `assign_sub` it without a lock: unpredictable",
        tuple(
            f"experiment=variable_{gradient} {_ORDERS} num_replicas=3"
            for gradient in ("gradient", "dependent_gradient")
        ),
        _unlocked,
        ("experiment=variable_assign",),
        lambda ran: (
            "`v.assign(v + 1)` in its place: "
            f"{ran[0].metric('updates_kept'):,} of {ran[0].metric('updates_expected'):,} kept"
        ),
    ),
    Claim(
        "S4.2",
        "a lock round read, gradient and update makes it predictable",
        (f"experiment=variable_serialized_gradient {_ORDERS} num_replicas=3",),
        _locked,
    ),
    Claim(
        "S4.3",
        "MirroredStrategy needs no lock of ours",
        tuple(f"experiment=variable_{mode}" for mode in ("all_reduce", "unscaled_sum", "unreduced")),
        _mirrored,
    ),
    Claim(
        "S4.4",
        "a reader may see a half-written tensor",
        (
            f"experiment=counter_torn_reads {_ORDERS} schedule.granularity=memory workload.elements=2",
            f"experiment=variable_whole_reads {_ORDERS} workload.elements=2",
        ),
        _torn,
        ("experiment=counter_torn_reads", "experiment=variable_whole_reads"),
        _torn_freely,
    ),
)

"""Update modes of mirrored replicas: what is done between a contribution and a replica's copy of the variables.

Every replica has its own copy of the flat vector. A mode is two choices: whether contributions are reduced before the
optimizer's rule meets them, and how TensorFlow aggregates the final assignment to the copies. No framework is imported
here; the strategy carries the choices out.
"""

from __future__ import annotations

from dataclasses import dataclass

# Strategies that give every replica a copy of its own.
MIRRORING = ("mirrored", "multi_worker")


@dataclass(frozen=True)
class Assignment:
    reduced: bool = False  # all-reduce the contributions first
    averaged: bool = True  # divide what was reduced by the number of replicas
    reassigned: bool = False  # assign old value + delta, where otherwise the delta is added
    aggregation: str = "NONE"  # of the variable's assignment: a member of `tf.VariableAggregation`


ASSIGNMENTS: dict[str, Assignment] = {
    # Safe: every copy is given the same delta, made from the mean of all gradients.
    "all_reduce": Assignment(reduced=True),
    # Unsafe: the sum of mean losses is num_replicas times too large.
    "unscaled_sum": Assignment(reduced=True, averaged=False),
    # Unsafe: every copy is given its own replica's delta. NONE is Keras' default for layer weights.
    "unreduced": Assignment(),
    # Unsafe: every copy is given replica 0's delta; the other replicas worked for nothing.
    "first_replica": Assignment(aggregation="ONLY_FIRST_REPLICA"),
    # Unsafe: the sum runs over the new values, so the old value is counted once for each replica.
    "reassigned_sum": Assignment(reassigned=True, aggregation="SUM"),
}

"""The table of state holders: who keeps each kind of replica state, and what may be relied on. Data only.

`state.KEY` takes `safe` (the first that the run can have), `naive` (what one gets without thinking of replicas) or a
mechanism's name. The code of the holders stands in this folder, safe and unsafe side by side.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Holder:
    """One mechanism.

    Attributes:
        guarantee: what it is there to keep.
        safe: `always`; `replica`, only where each replica turns its mode on by itself; or `never`.
        strategies: those that can host it; `not_elsewhere` says why others cannot.
    """

    name: str
    guarantee: str
    safe: str
    summary: str
    strategies: tuple[str, ...] = ("threads", "mirrored", "multi_worker")
    not_elsewhere: str = ""
    remedy: str = ""


def _table(guarantee: str, remedy: str, *holders: tuple[str, str, str, str, str]) -> dict[str, Holder]:
    """Rows of name, safe, strategies, summary and why not elsewhere; the remedy is for those that are not safe."""
    return {
        name: Holder(
            name,
            guarantee,
            safe,
            summary,
            tuple(strategies.split()),
            not_elsewhere,
            "" if safe == "always" else remedy,
        )
        for name, safe, strategies, summary, not_elsewhere in holders
    }


# Several processes of PyTorch take what cannot go wrong in one.
_ALL, _BOTH, _THREADS = "threads mirrored ddp multi_worker", "threads mirrored multi_worker", "threads"

# Key of `state` -> mechanisms by name, safest first.
HOLDERS: dict[str, dict[str, Holder]] = {
    "precision": _table(
        "precision_as_asked",
        "state.precision=explicit passes the compute dtype with every call; inherited hands it to replicas",
        ("explicit", "always", _ALL, "The compute dtype is an argument of every call: there is no mode.", ""),
        ("inherited", "always", _ALL, "A context variable; each replica runs in a copy of its starter's context.", ""),
        ("thread_local", "replica", _BOTH, "Thread-local, as Keras' policy and autocast: new threads have none.", ""),
        ("locked_global", "never", _BOTH, "Process-wide, get and set under a lock: isolated, but not restored.", ""),
        ("process_global", "never", _BOTH, "Process-wide: a scope saves it, sets it and puts it back at its end.", ""),
    ),
    "first_call": _table(
        "initialized_once",
        "state.first_call=before_start lets the main thread make the first call",
        ("before_start", "always", _ALL, "The main thread makes the first call before there are replicas.", ""),
        (
            "double_checked",
            "always",
            _THREADS,
            "Looked at again under a lock that is held while the first call runs.",
            "a lock held across a cross-replica call hangs MirroredStrategy, which runs replicas one at a time.",
        ),
        ("instance_set", "never", _BOTH, "A set of the objects that were called before, looked at, then added to.", ""),
        ("flag", "never", _BOTH, "A flag, looked at before the first call and set after it.", ""),
    ),
    "loss_scale": _table(
        "loss_scale_kept",
        "state.loss_scale=transactional decides in the update's own transaction",
        ("transactional", "always", _ALL, "Read and written with the variables, in the same update.", ""),
        ("shared", "never", _BOTH, "Each replica decides by itself, from the state it read, under nothing.", ""),
    ),
    "gradients": _table(
        "gradients_unmixed",
        "state.gradients=per_replica gives every replica a buffer of its own",
        ("per_replica", "always", _ALL, "Every replica's gradients are its own tensors.", ""),
        (
            "shared",
            "never",
            _THREADS,
            "One .grad for all threads: cleared, added to and read by each.",
            "TensorFlow's tape returns gradients, so there is no .grad to share.",
        ),
    ),
    "random_numbers": _table(
        "rng_independent",
        "state.random_numbers=derived makes them a function of seed, step and sample",
        ("derived", "always", _ALL, "A hash of (seed, step, sample's index in the joint batch): no state.", ""),
        ("shared", "never", _BOTH, "One generator: torch's process-wide one; under mirrored a seed variable.", ""),
    ),
    "batch_statistics": _table(
        "batch_statistics_kept",
        "state.batch_statistics=transactional writes them in the same update as the weights",
        ("transactional", "always", _ALL, "Written with the weights, in the same update.", ""),
        ("reduced", "always", _ALL, "Averaged over replicas, however gradients are put together.", ""),
        ("shared", "never", _BOTH, "Each replica writes back what it read, changed; mirrored: to its own copy.", ""),
    ),
    "cursor": _table(
        "samples_once",
        "state.cursor=sharded looks samples up by step and replica",
        ("sharded", "always", _ALL, "Samples are looked up by (step, replica): nothing moves.", ""),
        (
            "shared_iterator",
            "never",
            _BOTH,
            "One iterator for all; under mirrored each copy of it moves by itself.",
            "",
        ),
    ),
    "compile_ids": _table(
        "own_compiled_step",
        "state.compile_ids=content names a step by what it computes",
        ("content", "always", _BOTH, "A hash of all that a step computes: the same wherever the step is.", ""),
        ("uuid", "always", _BOTH, "Drawn for each step: no other process has it, so none finds it again.", ""),
        ("random_offset", "never", _BOTH, "A counter that starts anywhere, again after a fork: collides rarely.", ""),
        ("counter", "never", _BOTH, "A counter of the process, which fork copies.", ""),
    ),
}

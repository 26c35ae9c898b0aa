"""The guarantees a verdict speaks of, and which of them a run can check. Standard library only."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer.config import Custom, Search, Seeded
from trainer.updates.mechanisms import MODES
from trainer.updates.mirrored import MIRRORING
from trainer.workloads.small import small

if TYPE_CHECKING:
    from trainer.config import Config

# Name -> what it says, in the order in which verdicts list them.
GUARANTEES: dict[str, str] = {
    "no_lost_updates": "every replica's every update is in every copy of every shared variable at the end, once",
    "no_torn_reads": "no committed gradient was computed from a mix of versions",
    "atomic_updates": "all variables see the updates in one order",
    "fresh_gradients": "nothing else was committed between a gradient's snapshot and its write",
    "finite_values": "every loss, and every shared variable at the end, is a finite number",
    "joint_gradient": "what was applied is the gradient of the joint batch at the weights it was computed from",
    "gradients_unmixed": "a gradient computed again from the same weights and batch has the same bits",
    "replicas_identical": "all copies of the shared variables are bitwise equal at the end",
    "same_bits": "free runs end in the same final_parameters_sha256",
    "precision_as_asked": "every replica computed in the precision it was asked for",
    "initialized_once": "what is to happen at the first call happens once, whoever comes first",
    "settings_as_asked": "no replica's thread ran under framework settings that nobody asked for",
    "loss_scale_kept": "no decision of the loss scale was lost",
    "batch_statistics_kept": "no replica's batch statistics were lost",
    "rng_independent": "random numbers depend neither on timing nor on the number of replicas",
    "samples_once": "every sample is seen exactly once an epoch",
    "own_compiled_step": "every replica ran the step that was compiled for it",
    "invariants_kept": "the workload's own invariants hold",
    "no_deadlock": "no replica waits for ever",
}

# Guarantees that stand or fall with the update mode, so that another mode is the remedy.
OF_THE_MODE = ("no_lost_updates", "no_torn_reads", "atomic_updates", "joint_gradient", "replicas_identical")


# Guarantees of the state holders.
OF_THE_HOLDERS = (
    "gradients_unmixed",
    "precision_as_asked",
    "initialized_once",
    "settings_as_asked",
    "loss_scale_kept",
    "batch_statistics_kept",
    "rng_independent",
    "samples_once",
    "own_compiled_step",
)


def checkable(config: Config) -> tuple[str, ...]:
    """The guarantees that a run of this config can check."""
    if config.audit.name == "none":
        return ()
    if (own := small(config)) is not None:
        more = ("same_bits", "no_deadlock") if config.controlled else ()
        return (*own.guarantees, *(name for name in more if name not in own.guarantees))
    names = ["no_lost_updates", "no_torn_reads", "atomic_updates", "fresh_gradients", "finite_values"]
    if has_joint_gradient(config):
        names.append("joint_gradient")
    if has_copies(config):
        names.append("replicas_identical")
    if config.audit.repeat > 1 or isinstance(config.schedule, Search | Seeded):
        names.append("same_bits")
    if config.controlled:
        names.append("no_deadlock")
    if isinstance(config.workload, Custom):
        return tuple(names)  # a loop of the user's own holds the other state itself
    return (*names, *(name for name in OF_THE_HOLDERS if name not in names))


# What makes a run check more, for the messages of the configuration.
HINTS = {
    "joint_gradient": "It needs a mode that joins gradients, and a model whose replicas normalize alike: "
    "update_mode=all_reduce, model.normalization=group.",
    "replicas_identical": "It needs copies to compare: strategy=mirrored, multi_worker or ddp.",
    "same_bits": "It needs runs to compare: audit.repeat=2, or schedule=search.",
    "no_deadlock": "It needs to know who waits for whom: schedule=search.",
}


def has_copies(config: Config) -> bool:
    """Whether the shared variables have several copies: one for each mirrored replica, else for each process."""
    return config.strategy.name in MIRRORING or config.num_processes > 1


def has_joint_gradient(config: Config) -> bool:
    """Whether the joint batch has one gradient that replicas could agree on.

    Not with one lock or none (every replica's gradient is applied by itself), not when each of several replicas
    normalizes its own batch, and not when they are normalized together with the batch of one that does not train.
    """
    if "joint_gradient" in MODES[config.update_mode.name].not_applicable:
        return False
    if config.train.evaluators and synchronized(config):
        return False
    return config.replicas_in_all == 1 or getattr(config.model, "normalization", "none") != "batch"


def synchronized(config: Config) -> bool:
    """Whether the model's batch statistics are the joint batch's."""
    return getattr(config.model, "normalization", "none") == "sync_batch"

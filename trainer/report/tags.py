"""TensorBoard's tags: what each number is, and which of them are columns of the HParams table.

Every tag of a run starts with `train/`, `updates/`, `gradients/`, `precision/`, `replicas/` or `speed/`, and ends with
`/replica_i` where it is one replica's; those of a sweep start with `at_a_glance/`, which TensorBoard shows first. Data
only, but for `hyperparameters`.
"""

from __future__ import annotations

from trainer import holders
from trainer.config import OPTIONS, Config
from trainer.report.events import Hyperparameter, Metric
from trainer.workloads.small import heeds

PROFILED = "Seconds of a traced micro-step's wall time, mean over the replicas."
# By the tag without its last part where that is a replica or a kind of anomaly.
DESCRIPTIONS = {
    "at_a_glance": "Which run of the sweep was hurt, where and by how much: a row a run, and what was measured of each "
    "guarantee.",
    "train/loss": "Mean loss over the batch, before the update; without a replica's number the mean over replicas.",
    "train/accuracy": "Share of the held-out samples that are classified rightly.",
    "train/held_out_loss": "Mean loss over the held-out samples.",
    "train/random_numbers_off": "Steps whose first random numbers were not those that were the replica's to draw.",
    "train/random_numbers_repeated": "Steps whose first random numbers another step had drawn before.",
    "train/samples_missed": "Samples that no replica saw in an epoch.",
    "train/samples_repeated": "Samples that were seen again in the same epoch.",
    "replicas/verdict_level": "The verdict as a number: 0 upheld, 1 inconclusive, 2 anomaly, 3 violated, 4 broken.",
    "replicas/anomalies": "How often an anomaly of this kind was seen in the whole run.",
    "replicas/settings_off": "Framework settings under which a replica ran and for which nobody had asked.",
    "updates/staleness": "Updates that landed between a replica's snapshot and its write, mean since the last point; "
    "without a replica's number over all replicas.",
    "updates/staleness_histogram": "How many updates, of the steps since the previous histogram, had which staleness; "
    "without a replica's number of all replicas.",
    "updates/staleness_mean": "Mean staleness over all updates of all replicas.",
    "updates/staleness_max": "Largest staleness of any update.",
    "updates/torn_reads": "Snapshots so far that mixed versions, all replicas together.",
    "updates/expected": "Contributions made so far: replicas x steps.",
    "updates/kept": "Contributions that the canaries of every variable in every copy hold.",
    "updates/kept_share": "Contributions kept, as a share of those made.",
    "updates/skipped": "Updates so far that were skipped because a gradient was not finite; one that all replicas make "
    "together counts once.",
    "updates/kept_by_variable": "Of each replica's updates, how many every variable holds at the end, by the canaries "
    "at its two ends, in all copies.",
    "updates/kept_by_element": "The elements whose final value is not the initial value plus all that was added, "
    "beyond rounding: where in a tensor updates were lost.",
    "updates/statistics_lost": "Replicas' changes of batch statistics that some variable or copy does not hold.",
    "gradients/cosine_min": "Least cosine between two replicas' gradients at the same step.",
    "gradients/cosines": "Cosine between every two replicas' gradients, at some of the steps whose gradients were "
    "kept whole.",
    "gradients/norm": "L2 norm of the replica's gradient.",
    "gradients/norm_histogram": "L2 norms of all gradients that were kept whole during the run; without a replica's "
    "number of all replicas.",
    "gradients/error": "L2 distance of what was applied from the joint batch's gradient, relative to the latter.",
    "gradients/error_max": "Largest of these distances in the run.",
    "gradients/mixed": "Gradients so far that were not the replica's own, all replicas together: read back from a "
    ".grad that replicas share; where they share none, at the end, those that had other bits when computed again.",
    "precision/asked_bits": "Bits of the dtype that the replica was asked to compute in: 32 or 16; in between where "
    "steps since the previous point differed.",
    "precision/computed_bits": "Bits of the dtype read off the replica's activations: 32 or 16; in between where steps "
    "since the previous point differed.",
    "precision/gradient_bits": "Bits of the dtype read off the gradient of the replica's last kernel: 32 or 16; in "
    "between where steps since the previous point differed.",
    "precision/mode_at_entry": "Bits of the precision mode that the replica was in before its step, 0 where none was "
    "on; in between where steps since the previous point differed.",
    "precision/mode_at_exit": "Bits of the precision mode that the replica was in after its step, 0 where none was on; "
    "in between where steps since the previous point differed.",
    "precision/heatmap": "The dtype that every replica computed in at every step, and which steps were off.",
    "precision/replicas_off": "Replicas of which, since the previous point, some activations or gradients were "
    "computed in another precision than was asked for.",
    "precision/steps_off": "Steps in which the replica computed in another precision than it was asked for.",
    "precision/first_calls_repeated": "First calls of the step that were made after the first.",
    "precision/loss_scale": "What the replica multiplied its loss by at this step.",
    "precision/overflows": "Steps so far in which a replica's gradients overflowed, all replicas together.",
    "precision/scale_decisions_lost": "Replicas' decisions about the loss scale that some copy does not hold.",
    "replicas/divergence_before_average": "Largest absolute difference of any process's weights and statistics from "
    "the mean of all processes', just before copies were averaged.",
    "replicas/divergence_before_average_relative": "L2 norm of a process's differences from that mean, the largest of "
    "any process, relative to that of what the mean had moved since the last average.",
    "replicas/divergence": "Largest absolute difference between copy 0's and another copy's values at this step: 0 "
    "where all replicas hold the same.",
    "replicas/divergence_max": "Largest absolute difference between copy 0's and another copy's values at the end.",
    "speed/micro_steps_per_second": "Batches of all replicas per second since the previous point.",
    "speed/micro_steps_per_second_mean": "Batches of all replicas per second over the whole run.",
    "speed/compute_seconds": "Forward and backward pass, and the optimizer's rule where no lock is held. " + PROFILED,
    "speed/graph_call_seconds": "Calls of the graph: data, compute, reduction and update of all replicas, which nobody "
    "outside can tell apart; a call's time is shared out among its steps. " + PROFILED,
    "speed/lock_wait_seconds": "Waiting for a lock. " + PROFILED,
    "speed/critical_section_seconds": "Under a lock, whatever is done there, without waiting. " + PROFILED,
    "speed/unlocked_access_seconds": "Reading and writing shared variables under no lock; with all_reduce that is the "
    "snapshot, and between the barriers the sum and the update. " + PROFILED,
    "speed/barrier_seconds": "Waiting for other replicas at a barrier. " + PROFILED,
    "speed/data_seconds": "Getting the batch from the cursor. " + PROFILED,
    "speed/logging_seconds": "Noting the step and reading rows off for the audit. " + PROFILED,
    "speed/evaluation_seconds": "Evaluating on the held-out samples while replicas wait. " + PROFILED,
    "speed/other_seconds": "What the other phases leave of the step: the interpreter, and whatever nobody looks at. "
    + PROFILED,
}

# What the holders of replica state lost, in the whole run: tag -> guarantee, and the kinds of anomalies that count.
# 0 where the guarantee was checked and none was seen; no point where it was not checked or does not apply.
LOST: dict[str, tuple[str, tuple[str, ...]]] = {
    "updates/statistics_lost": ("batch_statistics_kept", ("lost_statistics",)),
    "train/samples_repeated": ("samples_once", ("repeated_samples",)),
    "train/samples_missed": ("samples_once", ("missed_samples",)),
    "train/random_numbers_repeated": ("rng_independent", ("repeated_random_numbers",)),
    "train/random_numbers_off": ("rng_independent", ("underived_random_numbers", "reordered_random_numbers")),
    "gradients/mixed": ("gradients_unmixed", ("mixed_gradient",)),
    "precision/first_calls_repeated": ("initialized_once", ("repeated_first_call",)),
    "precision/scale_decisions_lost": ("loss_scale_kept", ("lost_scale_decision",)),
    "replicas/settings_off": ("settings_as_asked", ("setting_off",)),
}

# Columns of the HParams table. Every run has to name the same ones: see `EventFile.session_started`.
HYPERPARAMETERS = (
    Hyperparameter("strategy", str, leading=True, values=tuple(OPTIONS["strategy"])),
    Hyperparameter("update_mode", str, leading=True, values=tuple(OPTIONS["update_mode"])),
    Hyperparameter("num_replicas", int, leading=True),
    Hyperparameter("precision", str, leading=True, values=tuple(OPTIONS["precision"])),
    Hyperparameter("state", str, leading=True),
    Hyperparameter("model", str),
    Hyperparameter("normalization", str),
    Hyperparameter("data", str),
    Hyperparameter("optimizer", str),
    Hyperparameter("learning_rate", float),
    Hyperparameter("audit", str),
    Hyperparameter("batch_size", int),
    Hyperparameter("steps", int),
    Hyperparameter("seed", int),
)
METRICS = tuple(
    Metric(tag, title, DESCRIPTIONS[tag])
    for tag, title in (
        ("replicas/verdict_level", "verdict, 0 upheld to 4 broken"),
        ("updates/kept_share", "updates kept, share"),
        ("updates/torn_reads", "torn reads"),
        ("updates/staleness_max", "staleness max"),
        ("replicas/divergence_max", "copies apart"),
        ("train/loss", "loss"),
        ("train/accuracy", "accuracy"),
        ("speed/micro_steps_per_second_mean", "micro-steps/s"),
    )
)


def hyperparameters(config: Config) -> dict[str, str | float]:
    """This run's values for the HParams table; a key that the run has no value for is left out."""
    groups = ("strategy", "update_mode", "model", "data", "optimizer", "precision", "audit")
    values = {
        **{group: getattr(config, group).name if heeds(config, group) else None for group in groups},
        "normalization": getattr(config.model, "normalization", None),
        "learning_rate": getattr(config.optimizer, "learning_rate", None) if heeds(config, "optimizer") else None,
        "state": _state(config),
        "num_replicas": config.replicas_in_all,
        **{key: getattr(config.train, key) for key in ("batch_size", "steps", "seed")},
    }
    return {each.name: values[each.name] for each in HYPERPARAMETERS if values[each.name] is not None}


def _state(config: Config) -> str | None:
    """`safe`, `naive`, or each mechanism that is not the safest; nothing where a loop holds its state itself."""
    if set(vars(config.state).values()) == {"naive"}:
        return "naive"
    held = holders.state(config)
    others = [f"{key}={mechanism}" for key, mechanism in held.items() if mechanism != holders.safe(key)]
    return " ".join(others) or "safe" if held else None

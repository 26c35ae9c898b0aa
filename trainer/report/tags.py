"""TensorBoard's tags: what each number is, and which of them are columns of the HParams table.

Every tag starts with `train/`, `updates/`, `gradients/`, `precision/`, `replicas/` or `speed/`, and ends with
`/replica_i` where it is one replica's. Data only, but for `hyperparameters`.
"""

from __future__ import annotations

from trainer.config import Config
from trainer.report.events import Hyperparameter, Metric

DESCRIPTIONS = {
    "train/loss": "Mean loss over the batch, before the update; without a replica's number the mean over replicas.",
    "train/accuracy": "Share of the held-out samples that are classified rightly.",
    "train/held_out_loss": "Mean loss over the held-out samples.",
    "replicas/verdict_level": "The verdict as a number: 0 upheld, 1 inconclusive, 2 anomaly, 3 violated, 4 broken.",
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
    "gradients/cosine_min": "Least cosine between two replicas' gradients at the same step.",
    "gradients/norm": "L2 norm of the replica's gradient.",
    "gradients/norm_histogram": "L2 norms of all gradients that were kept whole during the run; without a replica's "
    "number of all replicas.",
    "gradients/error": "L2 distance of what was applied from the joint batch's gradient, relative to the latter.",
    "gradients/error_max": "Largest of these distances in the run.",
    "precision/computed_bits": "Bits of the dtype read off the replica's activations: 32 or 16; in between where steps "
    "since the previous point differed.",
    "precision/steps_off": "Steps in which the replica computed in another precision than it was asked for.",
    "replicas/divergence_max": "Largest absolute difference between copy 0's and another copy's values at the end.",
    "speed/micro_steps_per_second": "Batches of all replicas per second since the previous point.",
    "speed/micro_steps_per_second_mean": "Batches of all replicas per second over the whole run.",
}

# Columns of the HParams table. Every run has to name the same ones: see `EventFile.session_started`.
HYPERPARAMETERS = (
    Hyperparameter("strategy", str, leading=True),
    Hyperparameter("update_mode", str, leading=True),
    Hyperparameter("num_replicas", int, leading=True),
    Hyperparameter("model", str, leading=True),
    Hyperparameter("precision", str, leading=True),
    Hyperparameter("normalization", str),
    Hyperparameter("data", str),
    Hyperparameter("optimizer", str),
    Hyperparameter("learning_rate", float),
    Hyperparameter("state", str),
    Hyperparameter("audit", str),
    Hyperparameter("batch_size", int),
    Hyperparameter("steps", int),
    Hyperparameter("seed", int),
)
METRICS = tuple(
    Metric(tag, title, DESCRIPTIONS[tag])
    for tag, title in (
        ("replicas/verdict_level", "verdict (0 upheld to 4 broken)"),
        ("updates/kept_share", "updates kept"),
        ("updates/staleness_max", "staleness max"),
        ("train/loss", "loss"),
        ("train/accuracy", "accuracy"),
        ("updates/torn_reads", "torn reads"),
        ("replicas/divergence_max", "divergence max"),
        ("speed/micro_steps_per_second_mean", "micro-steps/s"),
    )
)


def hyperparameters(config: Config) -> dict[str, str | float]:
    """This run's values for the HParams table; a key that the run has no value for is left out."""
    groups = ("strategy", "update_mode", "model", "data", "optimizer", "precision", "audit")
    unsafe = [f"{key}={holder}" for key, holder in vars(config.state).items() if holder != "safe"]
    values = {
        **{group: getattr(config, group).name for group in groups},
        "normalization": getattr(config.model, "normalization", None),
        "learning_rate": getattr(config.optimizer, "learning_rate", None),
        "state": " ".join(unsafe) or "safe",
        "num_replicas": config.num_replicas,
        **{key: getattr(config.train, key) for key in ("batch_size", "steps", "seed")},
    }
    return {each.name: values[each.name] for each in HYPERPARAMETERS if values[each.name] is not None}

"""TensorBoard's Custom Scalars page: which charts there are, so that safe and unsafe runs stand in one.

Each chart draws every run that is ticked, a colour a run; a tag is a regular expression, matched from its beginning.
TensorBoard puts the pages of all runs together and leaves out what it has already. It loses charts that a category has
in a later run only: a category is named with all its charts, or not at all where a run has nothing to show in it.
"""

from __future__ import annotations

from trainer.config import Config
from trainer.report.events import Category, Chart
from trainer.workloads.small import small

HURT = Category(
    "Which run was hurt, and by how much",
    (
        Chart("updates kept, share of those made (1: all)", (r"updates/kept_share$",)),
        Chart("loss of safe and unsafe runs, mean over replicas", (r"train/loss$",)),
        Chart("staleness, mean over replicas", (r"updates/staleness$",)),
        Chart("replicas' copies apart, largest difference", (r"replicas/divergence$",)),
        Chart("replicas off the precision they were asked for", (r"precision/replicas_off$",)),
        Chart("torn reads so far", (r"updates/torn_reads$",)),
    ),
)
TOGETHER = Category(
    "All replicas together",
    (
        Chart("accuracy on held-out samples", (r"train/accuracy$",)),
        Chart("throughput, micro-steps/s", (r"speed/micro_steps_per_second$",)),
        Chart("updates kept, count", (r"updates/kept$",)),
        Chart("least cosine between replicas' gradients", (r"gradients/cosine_min$",)),
        Chart("largest error against the joint gradient", (r"gradients/error_max$",)),
        Chart("gradients mixed so far", (r"gradients/mixed$",)),
    ),
)
EACH = Category(
    "Replica by replica",
    (
        Chart("loss", (r"train/loss/replica_\d+$",)),
        Chart("staleness", (r"updates/staleness/replica_\d+$",)),
        Chart("gradient norm", (r"gradients/norm/replica_\d+$",)),
        Chart("gradient error against the joint batch", (r"gradients/error/replica_\d+$",)),
        Chart("bits computed in", (r"precision/computed_bits/replica_\d+$",)),
        Chart("bits of gradients", (r"precision/gradient_bits/replica_\d+$",)),
    ),
)
SCALED = Category(
    "Loss scale of float16",
    (
        Chart("loss scale, replica by replica", (r"precision/loss_scale/replica_\d+$",)),
        Chart("overflows so far", (r"precision/overflows$",)),
    ),
)
TRACED = Category(
    "Where a step's time goes, in the steps that were traced",
    (
        Chart("computing, or in the graph call, seconds", (r"speed/(compute|graph_call)_seconds$",)),
        Chart("waiting for a lock, seconds", (r"speed/lock_wait_seconds$",)),
        Chart("in the critical section, seconds", (r"speed/critical_section_seconds$",)),
        Chart("at shared variables under no lock, seconds", (r"speed/unlocked_access_seconds$",)),
        Chart("waiting at a barrier, seconds", (r"speed/barrier_seconds$",)),
        Chart("data, seconds", (r"speed/data_seconds$",)),
        Chart("logging and evaluation, seconds", (r"speed/(logging|evaluation)_seconds$",)),
        Chart("other, seconds", (r"speed/other_seconds$",)),
    ),
)
# Those that every training run has come first: what only a later run names, TensorBoard puts at the end.
CATEGORIES = (HURT, TOGETHER, EACH, SCALED, TRACED)


def categories(config: Config) -> tuple[Category, ...]:
    """The categories that a run has something to show in; none for a workload that trains nothing."""
    if small(config) is not None:
        return ()
    scaled = config.precision.name == "mixed_float16"
    traced = config.audit.trace_steps > 0 and not config.controlled
    return (HURT, TOGETHER, EACH, *([SCALED] if scaled else []), *([TRACED] if traced else []))

"""TensorBoard's Custom Scalars page: which charts there are, so that safe and unsafe runs stand in one. Data only.

Each chart draws every run that is ticked, a colour a run; a tag is a regular expression, matched from its beginning.
Every run names the same charts: TensorBoard puts the pages of all runs together, and leaves out what it has already.
"""

from __future__ import annotations

from trainer.report.events import Category, Chart

CATEGORIES = (
    Category(
        "Safe and unsafe runs",
        (
            Chart("updates kept and expected", (r"updates/kept$", r"updates/expected$")),
            Chart("updates kept, share of expected", (r"updates/kept_share$",)),
            Chart("staleness, mean over replicas", (r"updates/staleness$",)),
            Chart("torn reads so far", (r"updates/torn_reads$",)),
            Chart("loss, mean over replicas", (r"train/loss$",)),
            Chart("accuracy on held-out samples", (r"train/accuracy$",)),
            Chart("gradients mixed so far", (r"gradients/mixed$",)),
            Chart("least cosine between replicas' gradients", (r"gradients/cosine_min$",)),
            Chart("throughput, micro-steps/s", (r"speed/micro_steps_per_second$",)),
        ),
    ),
    Category(
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
    ),
    Category(
        "Replica by replica",
        (
            Chart("loss", (r"train/loss/replica_\d+$",)),
            Chart("staleness", (r"updates/staleness/replica_\d+$",)),
            Chart("gradient norm", (r"gradients/norm/replica_\d+$",)),
            Chart("gradient error against the joint batch", (r"gradients/error/replica_\d+$",)),
            Chart("bits computed in", (r"precision/computed_bits/replica_\d+$",)),
            Chart("bits of gradients", (r"precision/gradient_bits/replica_\d+$",)),
            Chart("loss scale", (r"precision/loss_scale/replica_\d+$",)),
        ),
    ),
)

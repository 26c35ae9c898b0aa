"""Which mechanism holds each kind of replica state in a run, and what the run may claim. Standard library only."""

from __future__ import annotations

from trainer.config import Config, Custom
from trainer.state.loss_scale import NEVER
from trainer.state.mechanisms import HOLDERS, Holder
from trainer.updates.mechanisms import MODES
from trainer.updates.mirrored import ASSIGNMENTS, MIRRORING
from trainer.workloads.small import heeds, small

# What one gets without thinking of replicas. A precision mode that main turns on is thread-local in the frameworks
# themselves; one that each replica turns on, round its own forward pass, is a module's variable in the libraries.
NAIVE = {
    "first_call": "flag",
    "loss_scale": "shared",
    "gradients": "shared",
    "random_numbers": "shared",
    "batch_statistics": "shared",
    "cursor": "shared_iterator",
    "compile_ids": "counter",
}


def mechanism(config: Config, key: str) -> str:
    """The mechanism that holds one kind of replica state: `safe` and `naive` resolved to a name for this run."""
    asked: str = getattr(config.state, key)
    if asked == "naive":
        naive = NAIVE.get(key) or ("thread_local" if enabled_in(config) == "main" else "process_global")
        return safe(key) if refusal(config, key, naive) else naive
    return safe(key) if asked == "safe" else asked


def enabled_in(config: Config) -> str:
    """Who turns the precision mode on, main or each replica: a small workload's programs say so themselves."""
    found: str = getattr(config.workload, "enabled_in", config.precision.enabled_in)
    return found


def safe(key: str) -> str:
    return next(iter(HOLDERS[key]))


def holder(config: Config, key: str) -> Holder:
    return HOLDERS[key][mechanism(config, key)]


def state(config: Config) -> dict[str, str]:
    """The mechanism of every key that the workload heeds; nothing for a loop of the user's, which holds its own."""
    if isinstance(config.workload, Custom):
        return {}
    return {key: mechanism(config, key) for key in HOLDERS if heeds(config, f"state.{key}")}


def refusal(config: Config, key: str, name: str) -> str:
    """Why a run cannot have a mechanism, and what to do; nothing when it can."""
    strategy, mode = config.strategy.name, config.update_mode.name
    wanted = HOLDERS[key][name]
    own = small(config)
    if own is not None and f"state.{key}={name}" in own.shows:
        return ""
    if key == "compile_ids" and not heeds(config, "state.compile_ids"):
        engine = config.train.engine
        return f"needs train.engine=inductor or native: train.engine={engine} keeps no step that it has captured."
    if strategy not in wanted.strategies:
        fits = [other.name for other in HOLDERS[key].values() if strategy in other.strategies]
        why = wanted.not_elsewhere or f"strategy={strategy} takes what cannot go wrong in one process."
        return f"needs strategy={' or '.join(wanted.strategies)}: {why} Try {', '.join(fits)}."
    if key == "loss_scale" and name != "transactional" and config.precision.name != "mixed_float16":
        return f"needs precision=mixed_float16: precision={config.precision.name} has no loss scale."
    if key == "batch_statistics":
        return _statistics_refusal(strategy, mode, name)
    if key == "loss_scale" and name == "shared" and strategy in MIRRORING and not _own_write(mode):
        return f"does not go with update_mode={mode}, which gives every copy the same value."
    return ""


def _statistics_refusal(strategy: str, mode: str, name: str) -> str:
    joined = [name for name, each in MODES.items() if "barrier" in each.read_under and strategy in each.strategies]
    if name == "reduced" and strategy == "threads" and mode not in joined:
        return f"needs update_mode={' or '.join(joined)}: update_mode={mode} never brings the replicas together."
    if name == "reduced" and strategy in MIRRORING and ASSIGNMENTS[mode].reassigned:
        return f"does not go with update_mode={mode}, which sums whatever the replicas assign."
    if name == "shared" and strategy in MIRRORING and not _own_write(mode):
        return f"does not go with update_mode={mode}, which gives every copy the same value."
    return ""


def _own_write(mode: str) -> bool:
    """Whether each mirrored copy is written by its own replica alone."""
    return ASSIGNMENTS[mode].aggregation == "NONE"


def claims(config: Config) -> frozenset[str]:
    """The guarantees that the state holders put forward."""
    if isinstance(config.workload, Custom):
        return frozenset()
    held = {holder(config, key).guarantee for key in HOLDERS if heeds(config, f"state.{key}")}
    found = {"settings_as_asked", *held} - at_risk(config)
    # What is written with the weights is kept as they are.
    if "no_lost_updates" not in MODES[config.update_mode.name].claims:
        if mechanism(config, "batch_statistics") == "transactional":
            found.discard("batch_statistics_kept")
        if mechanism(config, "loss_scale") == "transactional":
            found.discard("loss_scale_kept")
    return frozenset(found)


def at_risk(config: Config) -> frozenset[str]:
    """The guarantees that unsafe state holders do not keep."""
    if isinstance(config.workload, Custom):
        return frozenset()
    keys = [key for key in HOLDERS if heeds(config, f"state.{key}")]
    unsafe = {key: held for key in keys if not keeps(config, held := holder(config, key))}
    found = {held.guarantee for held in unsafe.values()}
    if "first_call" in unsafe and config.strategy.name in MIRRORING and captures(config) and not config.controlled:
        found.add("precision_as_asked")  # a graph keeps the full precision that the first call was traced in
    return frozenset(found)


def keeps(config: Config, held: Holder) -> bool:
    """Whether a mechanism keeps what it is there for."""
    return held.safe == "always" or (held.safe == "replica" and enabled_in(config) == "replica")


def apart(config: Config) -> frozenset[str]:
    """The kinds of shared variables that are written outside of the update mode's transaction."""
    kinds = set()
    if mechanism(config, "batch_statistics") == "shared":
        kinds.add("statistic")
    if mechanism(config, "loss_scale") == "shared":
        kinds.add("loss_scale")
    return frozenset(kinds)


def growth_steps(config: Config) -> int:
    """Of the loss scale; `NEVER` where there is none and updates are skipped all the same, 0 where they are not."""
    found: int = getattr(config.precision, "growth_steps", 0)
    return found or (NEVER if config.train.on_nonfinite == "skip" else 0)


def asked_dtypes(config: Config) -> list[str]:
    """The compute dtype that each replica is asked for: the precision's, and float32 where it evaluates."""
    training = ["float32" if config.precision.name == "float32" else config.precision.name.removeprefix("mixed_")]
    trainers = config.replicas_in_all - config.train.evaluators
    return training * trainers + ["float32"] * config.train.evaluators


def captures(config: Config) -> bool:
    """Whether steps are captured.

    By themselves not under `threads` with a precision or gradient holder that is not safe: the main thread captures, so
    a leak could not reach the layers. Under `mirrored` every replica is traced in its own thread, and a leak is frozen.
    """
    if config.train.capture != "auto" or config.strategy.name in MIRRORING:
        return config.train.capture != "never"
    return all(holder(config, key).safe == "always" for key in ("precision", "gradients"))

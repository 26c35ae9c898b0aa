"""What `workload=counter` can be asked for, and what it then claims. Standard library only."""

from __future__ import annotations

from collections.abc import Iterable

from trainer.config import Config, ConfigError, Counter, Search, Seeded, nearest
from trainer.updates.mechanisms import MODES
from trainer.workloads.counter.ways import (
    AUTO,
    GRADIENT,
    JOINT,
    READ_BEFORE,
    TENSORFLOW,
    TORCH,
    UNDER_MIRRORED,
    UNDER_THREADS,
    WAYS,
    WITH_SECTIONS,
    Way,
    num_writers,
    taken,
    variable_of,
    way_of,
)

COUNTS = ("up", "down")
# A dependent step halves the variable; after more halvings than this a float64 is zero, whatever was lost.
MOST_HALVINGS = 1000
# Why a way cannot be had on this kind of variable.
NOT_THERE = {
    TORCH: "it is for a tf.Variable.",
    TENSORFLOW: "it is for a tensor; `+=` on a tf.Variable makes a tensor, and leaves the variable as it was.",
}


def check(config: Config) -> None:
    """Hold the workload's keys to their ranges, and to one another.

    Raises:
        ConfigError: the first rule that is broken.
    """
    own: Counter = config.workload
    _one_of("workload.variable", own.variable, (AUTO, TORCH, TENSORFLOW))
    _one_of("workload.operation", own.operation, (AUTO, *WAYS))
    _one_of("workload.counts", own.counts, COUNTS)
    for key, least in (("elements", 0), ("section_increments", 0), ("private_increments", 1), ("readers", 0)):
        value = getattr(own, key)
        if value < least:
            raise ConfigError(f"workload.{key} must be at least {least}; got {value}.")
    _check_variable(config)
    if config.strategy.name not in MODES[config.update_mode.name].strategies:
        return  # which is told for every workload alike
    _check_mode(config)
    _check_replicas(config)
    way = way_of(config)
    _check_sections(config, way)
    _check_halvings(config, way)
    if config.audit.repeat > 1 and not config.controlled:
        raise ConfigError(
            f"audit.repeat={config.audit.repeat} needs schedule=replay: free runs of workload=counter differ. Leave it "
            "out."
        )
    if config.controlled and config.schedule.granularity == "memory" and variable_of(config) == TENSORFLOW:
        raise ConfigError(
            "schedule.granularity=memory does not go with workload.variable=tensorflow: a kernel that changes a "
            "tf.Variable holds the variable's own lock, and nothing comes in between. Leave it out."
        )


def _one_of(key: str, value: str, known: Iterable[str]) -> None:
    known = list(known)
    if value not in known:
        raise ConfigError(f"{key} must be one of {', '.join(known)}; got '{value}'.{nearest(value, known)}")


def _check_variable(config: Config) -> None:
    own, variable = config.workload, variable_of(config)
    if config.strategy.name == "mirrored" and variable == TORCH:
        raise ConfigError(
            "workload.variable=torch needs strategy=threads: under mirrored every variable is TensorFlow's."
        )
    if own.operation != AUTO and WAYS[own.operation].variable != variable:
        fits = ", ".join(way.name for way in WAYS.values() if way.variable == variable)
        raise ConfigError(
            f"workload.operation={own.operation} does not go with workload.variable={variable}: "
            f"{NOT_THERE[variable]} It takes {fits}."
        )


def _check_mode(config: Config) -> None:
    """Hold the update mode to a way to write an increment that leaves it what it is."""
    mode, strategy = config.update_mode.name, config.strategy.name
    table: Iterable[str] = UNDER_MIRRORED if strategy == "mirrored" else UNDER_THREADS
    if mode not in table:
        raise ConfigError(
            f"update_mode={mode} does not go with workload=counter: a count has no optimizer slots. "
            f"strategy={strategy} takes {', '.join(table)}."
        )
    operation, fits = config.workload.operation, taken(mode, strategy, variable_of(config))
    if operation == AUTO or operation in fits:
        return
    if strategy == "mirrored":
        why = "replicas change their copies in another way then."
    elif WAYS[operation].base == READ_BEFORE:
        why = (
            f"that mode {UNDER_THREADS[mode][1]}, and this reads first. With nothing held it is update_mode=overwrite."
        )
    else:
        why = f"that mode {UNDER_THREADS[mode][1]}, and this is one kernel."
    raise ConfigError(
        f"workload.operation={operation} does not go with update_mode={mode}: {why} It takes {', '.join(fits)}."
    )


def _check_replicas(config: Config) -> None:
    own, mode = config.workload, config.update_mode.name
    threads = config.strategy.name == "threads"
    if own.counts == "down":
        if not threads:
            raise ConfigError("workload.counts=down needs strategy=threads: nobody can wait inside MirroredStrategy.")
        if own.readers:
            raise ConfigError(
                f"workload.readers={own.readers} does not go with workload.counts=down, of which the last replica "
                "waits. Leave one of them out."
            )
        if way_of(config).base == GRADIENT:
            raise ConfigError(
                f"workload.operation={own.operation} does not go with workload.counts=down: it is no count."
            )
        if config.num_replicas < 3:
            raise ConfigError(
                "workload.counts=down needs num_replicas of at least 3, two that count and one that waits; got "
                f"{config.num_replicas}."
            )
    if not own.readers:
        return
    if not threads or mode in JOINT:
        raise ConfigError(
            f"workload.readers={own.readers} needs strategy=threads and an update_mode in which nobody waits for all "
            "replicas, as lock_free or locked."
        )
    if own.readers >= config.num_replicas:
        raise ConfigError(f"workload.readers must be from 0 to num_replicas - 1; got {own.readers}.")


def _check_sections(config: Config, way: Way) -> None:
    own, mode = config.workload, config.update_mode.name
    sections, private = own.section_increments, own.private_increments
    counts = config.strategy.name == "threads" and way.base != GRADIENT and own.counts == "up"
    if sections != 1 and (mode not in WITH_SECTIONS or not counts or private > 1):
        raise ConfigError(
            f"workload.section_increments={sections} needs increments that are counted up one by one under a lock: "
            f"strategy=threads and update_mode={','.join(WITH_SECTIONS)}."
        )
    if private > 1 and (mode in JOINT or not counts):
        raise ConfigError(
            f"workload.private_increments={private} needs increments that are counted up and that a replica merges by "
            f"itself: strategy=threads and an update_mode other than {' and '.join(JOINT)}."
        )


def _check_halvings(config: Config, way: Way) -> None:
    halvings = num_writers(config) * config.train.steps
    if way.name == "dependent_gradient_step" and halvings > MOST_HALVINGS:
        raise ConfigError(
            f"train.steps={config.train.steps} x {num_writers(config)} replicas is {halvings} updates, and each of "
            f"workload.operation=dependent_gradient_step halves the variable: at most {MOST_HALVINGS:,} can be told "
            "apart."
        )


def claims(config: Config) -> frozenset[str]:
    """The guarantees that hold in every order of a run like this one."""
    mode, way, own = MODES[config.update_mode.name], way_of(config), config.workload
    names = set(mode.claims & {"no_lost_updates", "no_torn_reads", "fresh_gradients", "same_bits"})
    if way.variable == TENSORFLOW and config.strategy.name == "threads":
        # A kernel that changes a tf.Variable holds the variable's lock, and one that reads it keeps what it has read:
        # AssignUpdateVariableOp and ReadVariableOp in tensorflow/core/kernels/resource_variable_ops.cc.
        names |= {"no_torn_reads"} | ({"no_lost_updates"} if mode.name == "lock_free" else set())
    if way.name == "rebind" or mode.name == "per_variable_lock":
        # A tensor that a name is bound to anew is never changed; one variable has one lock, which readers take, too.
        names |= {"no_torn_reads"}
    if own.elements < 2:
        names -= {"no_torn_reads"}
    keeps = "no_lost_updates" in names
    fresh = "fresh_gradients" in names
    depends = way.name == "dependent_gradient_step"
    if config.strategy.name == "mirrored":
        names |= mode.claims & {"replicas_identical"}
    elif keeps and (fresh or not depends):
        names |= {"same_bits"}
    names |= _of_gradients(config, way, serial=keeps and (fresh or not depends))
    if keeps if own.counts == "down" else config.controlled:
        names |= {"no_deadlock"}  # who waits for a count waits for ever where one is lost
    return frozenset(names - _not_looked_at(config, way))


def _of_gradients(config: Config, way: Way, *, serial: bool) -> set[str]:
    if way.base != GRADIENT:
        return set()
    mode = MODES[config.update_mode.name]
    if mode.name in JOINT:
        return set(mode.claims & {"joint_gradient"})
    return {"invariants_kept"} if serial else set()


def _not_looked_at(config: Config, way: Way) -> set[str]:
    """What this run cannot tell: whether a gradient was fresh without a history, the same bits with one order."""
    names = set()
    if way.base != GRADIENT or not config.controlled:
        names.add("fresh_gradients")
    if not isinstance(config.schedule, Search | Seeded):
        names.add("same_bits")
    return names

"""The rules that bind the configuration's keys together. Standard library only; no framework is loaded to break one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import is_dataclass

from trainer.audit.guarantees import GUARANTEES, HINTS, checkable
from trainer.bring import check
from trainer.checkpoint import resume
from trainer.config import (
    OPTIONS,
    Cnn,
    Config,
    ConfigError,
    Custom,
    LocalSteps,
    MixedFloat16,
    Npz,
    Processes,
    Replay,
    Search,
    Seeded,
    Synthetic,
    Transformer,
    nearest,
)
from trainer.faults import BadFault
from trainer.faults import parse as parse_fault
from trainer.holders import captures, refusal
from trainer.samples import Samples, samples
from trainer.schedule.replay import cut, hash_of
from trainer.schedule.tokens import BadToken, parse
from trainer.state.mechanisms import HOLDERS
from trainer.updates.mechanisms import MODES
from trainer.updates.mirrored import MIRRORING
from trainer.workloads.small import EVERYBODYS, MAX_REPLICAS, SmallWorkload, heeds, small
from trainer.workloads.small import check as check_small

MAX_PROCESSES = 64
LONGEST_SECONDS = 1e8  # three years; a system's calls take not much more
NORMALIZATIONS = ("none", "batch", "sync_batch", "group")
PRESETS = ("safe", "naive")
ENABLED_IN = ("main", "replica")
ENABLED_BY = ("scope", "enable")
CAPTURE = ("auto", "always", "never")
ON_NONFINITE = ("continue", "skip", "stop")
ENGINES = ("torchscript", "inductor", "native")
GRANULARITIES = ("variable", "memory")
SAMPLERS = ("both", "random_walk", "priorities")
FAIL_ON = ("violated", "anomaly", "inconclusive", "never")


def validate(config: Config) -> None:
    """Hold a config to every rule that types alone cannot express.

    Raises:
        ConfigError: the first rule that is broken, in one line.
    """
    _validate_ranges(config)
    _validate_choices(config)
    _validate_small(config)
    _validate_brought(config)
    _validate_mode(config)
    _validate_processes(config)
    _validate_state(config)
    _validate_engine(config)
    _validate_evaluators(config)
    _validate_nonfinite(config)
    _validate_faults(config)
    _validate_model(config)
    _validate_data(config)
    _validate_schedule(config)
    _validate_trace(config)
    _validate_required(config)
    _validate_checkpoints(config)


def _at_least(key: str, value: float, least: float, advice: str = "") -> None:
    if not value >= least:
        raise ConfigError(f"{key} must be at least {least:g}; got {value:g}.{advice}")


def _share(key: str, value: float, *, zero: bool) -> None:
    if not (0 <= value < 1 if zero else 0 < value < 1):
        fits = "from 0 up to but without 1" if zero else "above 0 and below 1"
        raise ConfigError(f"{key} must be {fits}; got {value:g}.")


def _one_of(key: str, value: str, known: Iterable[str]) -> None:
    known = list(known)
    if value not in known:
        raise ConfigError(f"{key} must be one of {', '.join(known)}; got '{value}'.{nearest(value, known)}")


def _validate_ranges(config: Config) -> None:
    train, audit = config.train, config.audit
    own = small(config)
    most = MAX_REPLICAS if own is None else own.max_replicas
    if not 1 <= config.num_replicas <= most:
        raise ConfigError(f"num_replicas must be between 1 and {most}; got {config.num_replicas}.")
    if not 1 <= config.num_processes <= MAX_PROCESSES:
        raise ConfigError(f"strategy.num_processes must be between 1 and {MAX_PROCESSES}; got {config.num_processes}.")
    for key in ("steps", "batch_size", "log_every"):
        _at_least(f"train.{key}", getattr(train, key), 1)
    for key in ("evaluate_every", "threads_per_replica"):
        _at_least(f"train.{key}", getattr(train, key), 0)
    if not 0 <= train.timeout_seconds <= LONGEST_SECONDS:
        raise ConfigError(
            f"train.timeout_seconds must be between 0 and {LONGEST_SECONDS:g}; got {train.timeout_seconds:g}."
        )
    if not 0 < config.watchdog.seconds <= LONGEST_SECONDS:
        raise ConfigError(
            f"watchdog.seconds must be above 0 and at most {LONGEST_SECONDS:g}; got {config.watchdog.seconds:g}."
        )
    if not 0 <= train.seed < 2**31:
        raise ConfigError(f"train.seed must be between 0 and 2147483647; got {train.seed}.")
    if train.steps >= 2**24:
        # Canaries count in float32, which is exact up to 2**24 only.
        raise ConfigError(f"train.steps must be below 16777216, where canaries stop counting; got {train.steps}.")
    _at_least("audit.reference_every", audit.reference_every, 1)
    _at_least("audit.digest_every", audit.digest_every, 1)
    _at_least("audit.reference_mebibytes", audit.reference_mebibytes, 1)
    _at_least("audit.trace_steps", audit.trace_steps, 0)
    _at_least("checkpoint.every", config.checkpoint.every, 0)
    _at_least("checkpoint.keep", config.checkpoint.keep, 1)
    if not 1 <= audit.repeat <= 100:
        raise ConfigError(f"audit.repeat must be between 1 and 100; got {audit.repeat}.")
    if isinstance(config.update_mode, LocalSteps):
        _at_least("update_mode.average_every", config.update_mode.average_every, 1)
    if isinstance(config.precision, MixedFloat16):
        _at_least("precision.growth_steps", config.precision.growth_steps, 1)
        mantissa, exponent = math.frexp(config.precision.initial_scale)
        if mantissa != 0.5 or not 1 <= exponent <= 127:
            # Any other would change the bits of gradients that are divided by it, off which their dtype is read.
            raise ConfigError(
                f"precision.initial_scale must be a power of two from 1 to 2**126; "
                f"got {config.precision.initial_scale:g}. Keras and PyTorch start from 32768 and 65536."
            )
    optimizer = config.optimizer
    if not 0 < optimizer.learning_rate < float("inf"):
        raise ConfigError(f"optimizer.learning_rate must be above 0 and finite; got {optimizer.learning_rate:g}.")
    for key in ("momentum", "beta_1", "beta_2"):
        if hasattr(optimizer, key):
            _share(f"optimizer.{key}", getattr(optimizer, key), zero=True)
    if hasattr(optimizer, "epsilon") and not optimizer.epsilon > 0:
        raise ConfigError(f"optimizer.epsilon must be above 0; got {optimizer.epsilon:g}.")


def _validate_choices(config: Config) -> None:
    _one_of("fail_on", config.fail_on, FAIL_ON)
    for group in OPTIONS:
        if group != "state":  # a preset; its keys follow
            _one_of(group, getattr(config, group).name, OPTIONS[group])
    for key, mechanisms in HOLDERS.items():
        _one_of(f"state.{key}", getattr(config.state, key), (*PRESETS, *mechanisms))
    _one_of("precision.enabled_in", config.precision.enabled_in, ENABLED_IN)
    _one_of("precision.enabled_by", config.precision.enabled_by, ENABLED_BY)
    _one_of("train.capture", config.train.capture, CAPTURE)
    _one_of("train.engine", config.train.engine, ENGINES)
    _one_of("train.on_nonfinite", config.train.on_nonfinite, ON_NONFINITE)


def _validate_small(config: Config) -> None:
    """Hold a small workload to what it needs, and other keys to being ones that it heeds."""
    own = small(config)
    if own is None:
        return
    if config.strategy.name not in own.strategies:
        raise ConfigError(f"workload={own.name} needs strategy={' or '.join(own.strategies)}: {own.not_elsewhere}")
    if config.num_replicas < 2:
        raise ConfigError(f"workload={own.name} needs num_replicas of at least 2; got {config.num_replicas}.")
    for given in _unheeded(config, own):
        raise ConfigError(f"{given} does not go with workload={own.name}, which does not heed it. Leave it out.")
    check_small(config)


def _unheeded(config: Config, own: SmallWorkload) -> Iterator[str]:
    """What differs from the defaults and makes no difference to a small workload, as KEY=VALUE."""
    heeded = {*EVERYBODYS, *own.uses}
    for group, default in vars(Config()).items():
        option = getattr(config, group)
        if isinstance(option, Custom):
            yield f"{group}._target_={option._target_}" if option._target_ else f"{group}=custom"
        elif group in heeded:
            continue
        elif not is_dataclass(option):
            if option != default:
                yield f"{group}={option}"
        elif getattr(option, "name", "") != getattr(default, "name", ""):
            yield f"{group}={getattr(option, 'name', '')}"
        else:
            keys = {f"{group}.{key}": value for key, value in vars(option).items() if value != vars(default)[key]}
            yield from (f"{key}={value}" for key, value in keys.items() if key not in heeded)


def _validate_brought(config: Config) -> None:
    """Hold what the user brings to being there and to going together; nothing is imported yet."""
    own_loop = isinstance(config.workload, Custom)
    for group in ("update_mode", "model", "data", "workload"):
        option = getattr(config, group)
        if not isinstance(option, Custom) or (group == "update_mode" and own_loop and not option._target_):
            continue
        if not option._target_:
            raise ConfigError(f"{group}=custom needs {group}._target_=MODULE.NAME, which says what to bring.")
        check(group, option)
    if not own_loop:
        return
    if config.strategy.name != "threads":
        raise ConfigError("workload=custom needs strategy=threads: it is a loop over threads of one process.")
    mode = config.update_mode
    if not isinstance(mode, Custom) or mode._target_:
        given = mode._target_ if isinstance(mode, Custom) else mode.name
        raise ConfigError(
            f"update_mode={given} does not go with workload=custom: a loop of your own does its own locking. "
            "Leave update_mode out."
        )


def _validate_mode(config: Config) -> None:
    mode, strategy = MODES[config.update_mode.name], config.strategy.name
    if strategy in mode.strategies:
        return
    fits = [name for name, other in MODES.items() if strategy in other.strategies and name != "custom"]
    mirrors = strategy == "multi_worker" and "mirrored" in mode.strategies
    why = "processes share no copy." if isinstance(config.strategy, Processes) and not mirrors else mode.not_elsewhere
    raise ConfigError(
        f"update_mode={mode.name} needs strategy={' or '.join(mode.strategies)}: {why} "
        f"strategy={strategy} takes {', '.join(fits)}."
    )


def _validate_processes(config: Config) -> None:
    """Hold a run of several processes to what reaches across them."""
    if not isinstance(config.strategy, Processes):
        return
    strategy = f"strategy={config.strategy.name}"
    if config.controlled:
        raise ConfigError(
            f"schedule={config.schedule.name} does not go with {strategy}: no schedule reaches into other processes. "
            "Try strategy=threads."
        )
    if config.train.evaluators:
        raise ConfigError(
            f"train.evaluators={config.train.evaluators} does not go with {strategy}, whose replicas all train. "
            "Leave it out."
        )
    if config.audit.trace_steps and config.strategy.name == "ddp":
        raise ConfigError(
            f"audit.trace_steps={config.audit.trace_steps} does not go with {strategy}, whose processes are not "
            + ("traced. Add audit.trace_steps=0." if config.audit.name == "full" else "traced. Try audit=counters.")
        )
    if isinstance(config.update_mode, LocalSteps) and isinstance(config.precision, MixedFloat16):
        raise ConfigError(
            "precision=mixed_float16 does not go with update_mode=local_steps: processes would have loss scales of "
            "their own, of which there is no mean. Try precision=mixed_bfloat16."
        )


def _validate_state(config: Config) -> None:
    """Hold every mechanism that is named to being one that this run can have; `safe` and `naive` always are."""
    for key in HOLDERS:
        name = getattr(config.state, key)
        if name in PRESETS:
            continue
        if isinstance(config.workload, Custom):
            raise ConfigError(
                f"state.{key}={name} does not go with workload=custom: a loop of your own holds its state itself. "
                f"Leave state.{key} out."
            )
        if why := refusal(config, key, name):
            raise ConfigError(f"state.{key}={name} {why}")


def _validate_engine(config: Config) -> None:
    if config.train.engine == "torchscript":
        return
    given = f"train.engine={config.train.engine}"
    if config.strategy.name != "threads" or isinstance(config.workload, Custom):
        raise ConfigError(f"{given} needs strategy=threads and workload=train: it runs PyTorch's captured steps.")
    if not captures(config):
        raise ConfigError(
            f"{given} needs captured steps, and this run takes them operator by operator. Try train.capture=always."
        )
    if config.train.engine == "native" and config.controlled:
        raise ConfigError(
            f"{given} needs schedule=free: a schedule comes between accesses that the compiled loop makes by itself. "
            "Try train.engine=inductor."
        )


def _validate_evaluators(config: Config) -> None:
    evaluators = config.train.evaluators
    if not 0 <= evaluators < config.num_replicas:
        raise ConfigError(f"train.evaluators must be from 0 to num_replicas - 1; got {evaluators}.")
    if evaluators and (config.update_mode.name != "all_reduce" or isinstance(config.workload, Custom)):
        raise ConfigError(
            f"train.evaluators={evaluators} needs update_mode=all_reduce, which leaves evaluating replicas out of the "
            f"mean; update_mode={config.update_mode.name} would step the optimizer for them."
        )


def _validate_nonfinite(config: Config) -> None:
    given = f"train.on_nonfinite={config.train.on_nonfinite}"
    if config.train.on_nonfinite != "continue" and isinstance(config.workload, Custom):
        raise ConfigError(f"{given} needs workload=train: a loop of your own applies its gradients itself.")


def _validate_faults(config: Config) -> None:
    """Hold every fault to being one, and to a replica and a step that there are."""
    if not config.faults:
        return
    if isinstance(config.workload, Custom):
        raise ConfigError("faults needs workload=train: a loop of your own takes its steps itself.")
    if config.controlled:
        raise ConfigError(f"faults needs schedule=free; got schedule={config.schedule.name}, which has its own orders.")
    for entry in config.faults:
        try:
            fault = parse_fault(entry)
        except BadFault as error:
            raise ConfigError(f"faults=[{entry}] {error}.") from None
        trainers = config.replicas_in_all - config.train.evaluators
        most = trainers if fault.kind == "corrupt" else config.replicas_in_all
        if not 0 <= fault.replica < most:
            whose = "replicas that train are" if fault.kind == "corrupt" else "replicas are"
            raise ConfigError(f"faults=[{entry}] must name a replica that there is: {whose} 0 to {most - 1}.")
        if not 0 <= fault.step < config.train.steps:
            raise ConfigError(
                f"faults=[{entry}] must name a step that there is: steps are 0 to {config.train.steps - 1}."
            )


def _validate_model(config: Config) -> None:
    model = config.model
    for key in ("hidden", "filters"):
        for units in getattr(model, key, ()):
            _at_least(f"model.{key}", units, 1)
    for key in ("patch", "width", "heads", "depth"):
        if hasattr(model, key):
            _at_least(f"model.{key}", getattr(model, key), 1)
    if hasattr(model, "dropout"):
        _share("model.dropout", model.dropout, zero=True)
    if isinstance(model, Transformer) and model.width % model.heads:
        raise ConfigError(f"model.heads must divide model.width={model.width}; got {model.heads}.")
    if not isinstance(model, Cnn):
        return
    if not model.filters:
        raise ConfigError("model.filters must name at least one convolution; got []. Try model.filters=[16,32].")
    _one_of("model.normalization", model.normalization, NORMALIZATIONS)
    if model.normalization == "sync_batch" and config.strategy.name not in MIRRORING:
        raise ConfigError(
            f"model.normalization=sync_batch needs strategy={' or '.join(MIRRORING)}: Keras has no synchronized "
            "BatchNormalization on PyTorch. Try model.normalization=group."
        )


def _validate_data(config: Config) -> None:
    if not heeds(config, "data"):
        return
    data = config.data
    if hasattr(data, "held_out"):
        _share("data.held_out", data.held_out, zero=False)
    if isinstance(data, Synthetic):
        _at_least("data.samples", data.samples, 2)
        _at_least("data.classes", data.classes, 2)
        _at_least("data.noise", data.noise, 0)
        if not data.shape or min(data.shape) < 1:
            raise ConfigError(f"data.shape must list sizes of at least 1; got {data.shape}.")
    if isinstance(data, Npz) and data.classes != 0:
        _at_least("data.classes", data.classes, 2, " 0 takes one more than the largest label.")
    try:
        known = samples(data)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if known:
        validate_samples(config, known)


def validate_samples(config: Config, known: Samples) -> None:
    """Hold a config to the data: as far as they can be told beforehand, or as they were loaded.

    Raises:
        ConfigError: the model cannot take their shape, or they do not fill a joint batch.
    """
    _validate_shape(config, known)
    _validate_joint_batch(config, known)


def _validate_shape(config: Config, known: Samples) -> None:
    """Hold an image model to images that it can cut up."""
    model, shape = config.model, known.shape
    gives = f"data={config.data.name} gives {list(shape)}"
    if isinstance(model, Cnn):
        smallest = 2 ** len(model.filters)
        if len(shape) != 3 or min(shape[:2]) < smallest:
            raise ConfigError(
                f"model=cnn with {len(model.filters)} poolings needs images of at least {smallest}x{smallest} as "
                f"[height, width, channels]; {gives}."
            )
    if isinstance(model, Transformer):
        if len(shape) != 3:
            raise ConfigError(f"model=transformer needs images as [height, width, channels]; {gives}.")
        side = math.gcd(*shape[:2])
        if side % model.patch:
            fits = [str(patch) for patch in range(1, side + 1) if side % patch == 0]
            raise ConfigError(
                f"model.patch must divide the images' height and width; got {model.patch}, and {gives}. "
                f"It can be {', '.join(fits)}."
            )


def _validate_joint_batch(config: Config, known: Samples) -> None:
    replicas, num_train = config.replicas_in_all, known.num_train
    joint = replicas * config.train.batch_size
    if joint > num_train:
        processes = f" x strategy.num_processes={config.num_processes}" if config.num_processes > 1 else ""
        raise ConfigError(
            f"train.batch_size={config.train.batch_size} x num_replicas={config.num_replicas}{processes} is a joint "
            f"batch of {joint} samples, but data={config.data.name} has {num_train} to train on. "
            + (
                f"Try train.batch_size={num_train // replicas} or less."
                if num_train >= replicas
                else "Try fewer replicas."
            )
        )


def _validate_schedule(config: Config) -> None:
    """Hold a schedule to its keys' ranges, and to a run that it can have under control."""
    if not config.controlled:
        return
    schedule = config.schedule
    name = schedule.name
    _one_of("schedule.granularity", schedule.granularity, GRANULARITIES)
    _at_least("schedule.chunks", schedule.chunks, 1)
    if isinstance(schedule, Search):
        _at_least("schedule.preemptions", schedule.preemptions, 0)
        _at_least("schedule.max_operations", schedule.max_operations, 1)
    if isinstance(schedule, Seeded):
        _one_of("schedule.sampler", schedule.sampler, SAMPLERS)
        _at_least("schedule.depth", schedule.depth, 1)
        _at_least("schedule.orders", schedule.orders, 1)
        if not 0 <= schedule.seed < 2**31:
            raise ConfigError(f"schedule.seed must be between 0 and 2147483647; got {schedule.seed}.")
    if config.audit.name == "none":
        raise ConfigError(f"schedule={name} needs audit=counters or full: audit=none looks at nothing.")
    if config.strategy.name == "mirrored" and config.train.capture == "always":
        raise ConfigError(
            f"schedule={name} does not go with train.capture=always under strategy=mirrored: replicas cannot take "
            "turns inside a graph. Leave train.capture out."
        )
    if config.strategy.name == "mirrored" and schedule.granularity == "memory":
        raise ConfigError(
            "schedule.granularity=memory needs strategy=threads: under mirrored no two replicas write one copy."
        )
    if config.audit.repeat > 1 and not isinstance(schedule, Replay):
        raise ConfigError(
            f"audit.repeat={config.audit.repeat} does not go with schedule={name}, which makes many runs already. "
            "Leave audit.repeat out."
        )
    if isinstance(schedule, Replay):
        _validate_token(config, schedule)


def _validate_token(config: Config, schedule: Replay) -> None:
    if not schedule.token:
        raise ConfigError("schedule=replay needs schedule.token=TOKEN, from the replay line of a verdict.")
    try:
        token = parse(schedule.token)
    except BadToken as error:
        raise ConfigError(f"schedule.token={schedule.token} {error}.") from None
    if token.num_replicas != config.num_replicas:
        raise ConfigError(
            f"schedule.token is of num_replicas={token.num_replicas}; got num_replicas={config.num_replicas}. "
            "Repeat the whole replay line."
        )
    if token.config != hash_of(config):
        granularity, chunks = cut(config)
        cuts = "" if granularity == "variable" else f" in {chunks} chunks"
        raise ConfigError(
            f"schedule.token is of another configuration ({token.config}; this is {hash_of(config)}, at "
            f"schedule.granularity={granularity}{cuts}). Repeat the whole replay line."
        )


def _validate_trace(config: Config) -> None:
    """Hold a number of steps that was asked for to a run that can be traced."""
    steps, audit = config.audit.trace_steps, config.audit.name
    if audit == "profile" and config.controlled:
        raise ConfigError(
            f"audit=profile does not go with schedule={config.schedule.name}: what it times is a free run. "
            "Try audit=counters."
        )
    if audit == "profile":
        _at_least("audit.trace_steps", steps, 1, " audit=counters traces none.")
    if steps in (0, OPTIONS["audit"][audit].trace_steps):
        return
    given = f"audit.trace_steps={steps}"
    if audit == "none":
        raise ConfigError(f"{given} needs audit=counters, profile or full: audit=none records nothing.")
    if config.controlled:
        raise ConfigError(
            f"{given} does not go with schedule={config.schedule.name}, whose trace.json shows every step. "
            "Leave it out."
        )


def _validate_required(config: Config) -> None:
    can = checkable(config)
    for name in config.require:
        _one_of("require", name, GUARANTEES)
        if name not in can:
            hint = "It needs audit=counters." if config.audit.name == "none" else HINTS.get(name, "")
            if small(config) is not None:
                hint = "Leave workload out to check the others."
            checks = ", ".join(can) or "nothing"
            raise ConfigError(f"require={name} cannot be checked by this run, which checks {checks}. {hint}".strip())


def _validate_checkpoints(config: Config) -> None:
    """Hold checkpoints to a run whose state is known whole, and `resume` to a checkpoint of the same run."""
    if not config.checkpoint.every and not config.resume:
        return
    given = f"resume={config.resume}" if config.resume else f"checkpoint.every={config.checkpoint.every}"
    if isinstance(config.workload, Custom):
        raise ConfigError(f"{given} does not go with workload=custom: a loop of your own keeps its place itself.")
    if isinstance(config.update_mode, Custom):
        raise ConfigError(
            f"{given} does not go with update_mode._target_={config.update_mode._target_}: what an update mode of your "
            "own keeps would not be in a checkpoint."
        )
    if config.controlled:
        raise ConfigError(f"{given} needs schedule=free: schedule={config.schedule.name} makes short runs, many times.")
    if config.audit.repeat > 1:
        raise ConfigError(
            f"{given} does not go with audit.repeat={config.audit.repeat}, which makes the whole run again. "
            "Leave audit.repeat out."
        )
    mode = config.update_mode
    if isinstance(mode, LocalSteps) and config.checkpoint.every % mode.average_every:
        raise ConfigError(
            f"checkpoint.every={config.checkpoint.every} must be a multiple of update_mode.average_every="
            f"{mode.average_every}: between averages processes have copies of their own. "
            f"Try checkpoint.every={-(-config.checkpoint.every // mode.average_every) * mode.average_every}."
        )
    if config.resume:
        resume.check(config)

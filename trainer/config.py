"""The schema of a run: every key with its default, unit and range. What binds keys together is in `trainer/rules.py`.

Standard library only, so that `--help` and a configuration error load no framework. Hydra fills these dataclasses
(`trainer/cli.py` registers them); past that point the rest of the program sees a `Config` and never a `DictConfig`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any

from trainer.schedule.recipes import RECIPES
from trainer.updates.mechanisms import MODES
from trainer.workloads.small import SMALL


class ConfigError(ValueError):
    """A user's mistake, told in one line: the key, what came, what fits, what to do."""


@dataclass
class Strategy:
    name: str = "threads"


@dataclass
class Processes:
    """Replicas in several processes, `num_replicas` in each."""

    name: str = "ddp"
    # Processes of the run, 1 to 64. Where a cluster's launcher has started them: as many as it has.
    num_processes: int = 2


@dataclass
class UpdateMode:
    name: str = "all_reduce"


@dataclass
class LocalSteps:
    """Each process steps by itself, and copies are averaged every so often."""

    name: str = "local_steps"
    # Steps between averages, at least 1; the last step always ends with one.
    average_every: int = 10


@dataclass
class Precision:
    """What the layers are asked to compute in; variables are float32 in all of them."""

    name: str = "float32"
    # Who turns the precision mode on: main, round the whole training, or each replica, round its own forward pass.
    enabled_in: str = "main"
    # How: scope (a with block, at whose end it is put back) or enable (for good: it stays until another is enabled).
    enabled_by: str = "scope"


@dataclass
class MixedFloat16:
    """Layers compute in float16, and the loss is scaled so that small gradients do not vanish."""

    name: str = "mixed_float16"
    enabled_in: str = "main"
    enabled_by: str = "scope"
    # What the loss is multiplied by at first: a power of two from 1 on. Halved after an overflow.
    initial_scale: float = 32768.0
    # Updates in a row without an overflow after which the scale is doubled; at least 1.
    growth_steps: int = 2000


@dataclass
class State:
    """Who holds each kind of replica state: `safe`, `naive`, or a mechanism's name (`python -m trainer show state`)."""

    precision: str = "safe"
    # Who notes that the step was called for the first time, which is done in float32.
    first_call: str = "safe"
    loss_scale: str = "safe"
    gradients: str = "safe"
    random_numbers: str = "safe"
    batch_statistics: str = "safe"
    cursor: str = "safe"
    # Who names a compiled step, so that it can be stored and found again.
    compile_ids: str = "safe"


@dataclass
class Custom:
    """A part that the user brings."""

    name: str = "custom"
    # MODULE.NAME of a function or class, found from the working directory. It chooses this option by itself.
    _target_: str = ""
    # Keyword arguments for what is brought, as in +model.arguments.width=64.
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass
class Linear:
    name: str = "linear"


@dataclass
class Mlp:
    name: str = "mlp"
    # Units of each hidden layer, input to output; each at least 1.
    hidden: list[int] = field(default_factory=lambda: [64])
    # Share dropped in training, from 0 up to but without 1. mlp: of each hidden layer's activations; transformer: of
    # the embedded patches, of attention weights and of what each branch adds.
    dropout: float = 0.0


@dataclass
class Cnn:
    name: str = "cnn"
    # Filters of each 3x3 convolution, each followed by a 2x2 max-pooling; each at least 1.
    filters: list[int] = field(default_factory=lambda: [16, 32])
    # none, batch (each replica's own batch), sync_batch (the joint batch; not under threads or ddp) or group.
    normalization: str = "batch"
    # Share of what the last layer reads that is dropped in training, from 0 up to but without 1.
    dropout: float = 0.1


@dataclass
class Transformer:
    name: str = "transformer"
    # Side of a patch in pixels; divides the image's height and width.
    patch: int = 2
    # Size of a patch's vector; at least 1.
    width: int = 32
    # Attention heads; divides model.width.
    heads: int = 4
    # Blocks of attention and MLP; at least 1.
    depth: int = 2
    dropout: float = 0.1


@dataclass
class Digits:
    """scikit-learn's bundled handwritten digits: 1,797 images of 8x8 pixels, 10 classes."""

    name: str = "digits"
    # Share of the samples kept out of training for `accuracy`, above 0 and below 1. Unused where a file has a test set.
    held_out: float = 0.2


@dataclass
class Synthetic:
    """Noisy class centres drawn from `train.seed`."""

    name: str = "synthetic"
    # Samples in all, training and held-out together; at least 2.
    samples: int = 2048
    # Shape of one sample: [features], or [height, width, channels] for an image model.
    shape: list[int] = field(default_factory=lambda: [8, 8, 1])
    # Number of classes, at least 2. npz takes 0 as well: one more than the largest label.
    classes: int = 10
    # Standard deviation of the noise round a class centre; the centres' own is 1.
    noise: float = 1.0
    held_out: float = 0.2


@dataclass
class Npz:
    """A user's arrays: x and y, or train_x and train_y with or without test_x and test_y."""

    name: str = "npz"
    # File of arrays, as numpy.savez writes it. mnist needs none: Keras downloads it, once.
    path: str = ""
    held_out: float = 0.2
    classes: int = 0


@dataclass
class Mnist:
    """MNIST's handwritten digits: 60,000 images of 28x28 pixels and 10,000 to test on, 10 classes."""

    name: str = "mnist"
    path: str = ""


@dataclass
class Sgd:
    name: str = "sgd"
    # Above 0.
    learning_rate: float = 0.1


@dataclass
class Momentum:
    name: str = "momentum"
    learning_rate: float = 0.03
    # From 0 up to but without 1.
    momentum: float = 0.9


@dataclass
class Adam:
    name: str = "adam"
    learning_rate: float = 0.003
    beta_1: float = 0.9
    beta_2: float = 0.999
    epsilon: float = 1e-7


@dataclass
class Schedule:
    """Who goes next. `free`: the operating system."""

    name: str = "free"


@dataclass
class Search:
    """Every order of a small case, or all with few preemptions; by a recipe's name, until one shows what it names."""

    name: str = "search"
    # How kernels on shared variables are announced: variable (one variable at a time) or memory (in chunks, and an
    # in-place kernel as reading and writing each).
    granularity: str = "variable"
    # Chunks of each variable at schedule.granularity=memory; at least 1.
    chunks: int = 2
    # Preemptions up to which orders are tried where there are too many for all; at least 0.
    preemptions: int = 2
    # Operations, over all runs, after which there are too many; at least 1.
    max_operations: int = 200000


@dataclass
class Seeded:
    """Orders drawn at random, each the same for the same seed."""

    name: str = "seeded"
    granularity: str = "variable"
    chunks: int = 2
    # random_walk (every interleaving equally likely), priorities (PCT) or both, in turn.
    sampler: str = "both"
    # Things that have to come in order for what priorities are to find; at least 1.
    depth: int = 3
    # Orders to draw; at least 1.
    orders: int = 200
    # From 0 to 2**31 - 1.
    seed: int = 0


@dataclass
class Replay:
    """One order, as a verdict's replay line has it."""

    name: str = "replay"
    granularity: str = "variable"
    chunks: int = 2
    # From the replay line of a verdict of the same configuration.
    token: str = ""


@dataclass
class Workload:
    """What the replicas do. `train`: train the model.

    The others show what the frameworks' own defaults do to replicas. `moving_statistics`: batch statistics of a Keras
    model in plain `fit`. `dropout_masks`: what stock Dropout draws. `functional_call`: one torch module, called by all
    threads with their own parameters. `process_settings`: dtype and generator that threads share. `autocast`: a mode
    of main's that threads do not see, and a cache that they share.
    """

    name: str = "train"


@dataclass
class Bank:
    """Replicas transfer money between accounts that they share, one transfer a step."""

    name: str = "bank"
    # How transfers are kept apart: unlocked, bare_lock (acquire and release), with_lock (the with statement),
    # synchronized (the accounts in one Synchronized), lock_per_account (the source's first), ordered_locks (one for
    # each account, in one order) or acquire_locked (a Synchronized for each account).
    transfer: str = "synchronized"
    # When a transfer that cannot be made is refused: before anything is changed, midway (the destination is looked up
    # after the debit) or undone (midway, and the debit is taken back).
    refused: str = "before"
    # What each account holds at first, as NAME:BALANCE; at least two accounts.
    accounts: list[str] = field(default_factory=lambda: ["x:25", "y:100", "z:200"])
    # Transfers as SOURCE:DESTINATION:AMOUNT, which replicas take in turn, over and over; none: drawn from train.seed.
    transfers: list[str] = field(default_factory=list)
    # Share of the transfers drawn that go to an account that does not exist, from 0 to 1.
    unknown: float = 0.05
    # Share of the transfers drawn that are of more than there is in all accounts, from 0 to 1.
    overdrafts: float = 0.05
    # Replicas, the last ones, that do not transfer but sum all accounts at each step; fewer than num_replicas.
    auditors: int = 0


@dataclass
class PrecisionMode:
    """A mixed-precision mode as Sonnet keeps it, in programs of a few lines; one round of one program is one step."""

    name: str = "precision"
    # scope (replica 0 leaves a scope in which others have enabled a mode), enable (each replica enables one, yields
    # and looks), inherit (main enables it, replicas look) or first_call (all make what is to be the first call).
    program: str = "enable"
    # float16, float32, bfloat16 or none. enable: replica i has the i-th, and from the start again; scope: the first is
    # the scope's, and the next other one what is enabled; inherit, first_call: the first.
    dtypes: list[str] = field(default_factory=lambda: ["float16", "float32", "bfloat16", "none"])

    @property
    def enabled_in(self) -> str:
        """Who turns the mode on, as `precision.enabled_in` says it of the training step."""
        return "main" if self.program == "inherit" else "replica"


@dataclass
class Counter:
    """Replicas count in one variable; train.steps is the increments that each of them makes."""

    name: str = "counter"
    # What is counted in: torch (an int32 tensor), tensorflow (a float64 tf.Variable; under threads this is what imports
    # TensorFlow) or auto, which is the strategy's.
    variable: str = "auto"
    # How an increment is written. torch: in_place (`t += 1`), add_, rebind (`t = t + 1`), read_add_write (clone, add,
    # copy_). tensorflow: assign_add, assign (`v.assign(v + 1)`), gradient_step (`assign_sub` of half the gradient of
    # sum(v * id)), dependent_gradient_step (of sum(v * v) / 2). auto: the first that the update mode takes.
    operation: str = "auto"
    # Elements of the variable, each of which counts all increments; from 0 on, and 0 is a scalar.
    elements: int = 0
    # Increments in one critical section, where the update mode has one; from 0 on, and 0 is one section round all.
    section_increments: int = 1
    # Increments that a replica makes in a variable of its own before it adds them to the shared one; at least 1.
    private_increments: int = 1
    # Replicas, the last ones, that do not count but read the variable at each step; fewer than num_replicas.
    readers: int = 0
    # up, or down: from all increments to zero, for which the last replica waits.
    counts: str = "up"


@dataclass
class CompileCache:
    """Replicas are processes, which compile `train.steps` steps of one name and different bodies through one cache."""

    name: str = "compile_cache"
    # Where siblings come from: fork (of a process that has compiled nothing), compile_then_fork or spawn.
    start: str = "fork"
    # Of each sibling's steps those, the last ones, that workload.start=compile_then_fork compiles after the fork only;
    # from 0 to train.steps.
    after_fork: int = 0
    # Times that siblings are started, with steps of their own; from 1 to 10,000.
    rounds: int = 1
    # Size of the space in which state.compile_ids=random_offset starts, in bits; from 0 to 64.
    offset_bits: int = 48
    # Folder of the cache, which then outlives the run; empty: one for each round, removed at the end.
    folder: str = ""


@dataclass
class Audit:
    # none (nothing is recorded but the loss), counters, profile (also where the time of the first 200 steps goes) or
    # full (also every element's sum, and the history in a file).
    name: str = "counters"
    # Steps between gradient references: cosines between replicas, error against the joint batch's gradient. At least 1.
    reference_every: int = 50
    # Memory that references may take before the rest is skipped (the verdict says how many), in MiB.
    reference_mebibytes: int = 256
    # Steps between comparisons of the processes' copies, by a digest of each; at least 1.
    digest_every: int = 50
    # Times the whole run is made, to compare the bits it ends in; from 1 to 100.
    repeat: int = 1
    # First steps of each replica that a free run traces, from 0 on: trace.json shows them, and the verdict and speed/*
    # say where their time went. 0 traces none. An order that a schedule has made is always shown in trace.json.
    trace_steps: int = 0


@dataclass
class Train:
    # Steps that every replica takes; at least 1.
    steps: int = 200
    # Samples per replica and step; at least 1. The last short batch of an epoch is dropped.
    batch_size: int = 32
    # Seed of initial weights, batch plan and random numbers; from 0 to 2**31 - 1.
    seed: int = 0
    # Steps between evaluations on the held-out samples; 0 evaluates at the end only.
    evaluate_every: int = 0
    # Steps between rows in TensorBoard; at least 1.
    log_every: int = 10
    # always (the step is recorded once and run without the interpreter), never (operator by operator) or auto: always,
    # but under threads never where an unsafe precision or gradient holder's leak would not reach the layers.
    capture: str = "auto"
    # What runs captured steps under threads: torchscript (the bits of the step run operator by operator), inductor
    # (compiled by the C++ compiler, ten seconds to a minute unless train.compile_cache has it; other bits) or native
    # (as inductor, and the replicas' loop round it, update mode and locks included, is compiled as well).
    engine: str = "torchscript"
    # Folder of compiled steps; empty: replica-trainer in $XDG_CACHE_HOME or ~/.cache.
    compile_cache: str = ""
    # Replicas, the last ones, that do not train but evaluate their batches in float32; fewer than num_replicas.
    evaluators: int = 0
    # Intra-op threads of each replica; 0 shares the machine's cores out evenly (at least one each).
    threads_per_replica: int = 0
    # What a gradient that is not finite does: continue (it is applied, as frameworks do), skip (its update is, by every
    # replica alike) or stop (the run is broken, and says whose gradient of which variable at which step).
    on_nonfinite: str = "continue"
    # Seconds after which the run is ended however it fares, at most 1e8; 0 never.
    timeout_seconds: float = 0.0

    @property
    def compiles(self) -> bool:
        """Whether captured steps are compiled to libraries, which are kept."""
        return self.engine in ("inductor", "native")


@dataclass
class Checkpoint:
    # Steps between checkpoints in the run's folder, from 0 on; one more after the last step. 0 makes none. All replicas
    # meet at each, also those of update modes in which none waits for another.
    every: int = 0
    # Checkpoints that are kept, the newest; at least 1. Of each process, where there are several: at least 4, so that
    # all have one of the same step.
    keep: int = 3


@dataclass
class Watchdog:
    # Seconds without a finished step after which the run is ended as deadlocked; above 0, at most 1e8. A process that
    # shows no sign of life for that long and ten seconds more is ended by the one that started it.
    seconds: float = 120.0


@dataclass
class Config:
    strategy: Any = field(default_factory=Strategy)
    update_mode: Any = field(default_factory=UpdateMode)
    # Replicas of each process, 1 to 64; with workload=precision under threads up to 1024.
    num_replicas: int = 2
    model: Any = field(default_factory=Mlp)
    data: Any = field(default_factory=Digits)
    optimizer: Any = field(default_factory=Sgd)
    precision: Any = field(default_factory=Precision)
    state: State = field(default_factory=State)
    schedule: Any = field(default_factory=Schedule)
    workload: Any = field(default_factory=Workload)
    audit: Audit = field(default_factory=Audit)
    train: Train = field(default_factory=Train)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    # Folder of a run to go on from, at the newest of its checkpoints that is whole. The command must be that run's but
    # for keys that change nothing about the steps taken; train.steps may grow.
    resume: str = ""
    watchdog: Watchdog = field(default_factory=Watchdog)
    # What is to go wrong, as KIND:REPLICA:STEP or KIND:REPLICA:STEP:VALUE. Kinds: raise, hang, kill, delay (by VALUE
    # seconds; 1 if none is given) and corrupt (VALUE, a number, inf or nan, is added to the gradient's first element;
    # nan if none is given).
    faults: list[str] = field(default_factory=list)
    # The mildest verdict that exits with status 1: violated, anomaly, inconclusive or never.
    fail_on: str = "violated"
    # Guarantees to be held to besides the ones that the update mode claims.
    require: list[str] = field(default_factory=list)

    @property
    def num_processes(self) -> int:
        """Processes that host the replicas."""
        return int(getattr(self.strategy, "num_processes", 1))

    @property
    def replicas_in_all(self) -> int:
        """Replicas of all processes: what the joint batch, canaries and records are made for."""
        return self.num_processes * self.num_replicas

    @property
    def controlled(self) -> bool:
        """Whether a schedule says who goes next, not the operating system."""
        return not isinstance(self.schedule, Schedule)


# The strategies whose replicas are all in one process, where a schedule can put them in order.
ONE_PROCESS = ("threads", "mirrored")
# The built-in options of every group. One table: Hydra's groups, `show` and the messages are made from it.
OPTIONS: dict[str, dict[str, Any]] = {
    "strategy": {
        "threads": Strategy(),
        "mirrored": Strategy("mirrored"),
        "ddp": Processes(),
        "multi_worker": Processes("multi_worker"),
    },
    "update_mode": {
        **{name: UpdateMode(name) for name in MODES},
        "local_steps": LocalSteps(),
        "custom": Custom(),
    },
    "precision": {
        "float32": Precision(),
        "mixed_bfloat16": Precision("mixed_bfloat16"),
        "mixed_float16": MixedFloat16(),
    },
    "model": {"linear": Linear(), "mlp": Mlp(), "cnn": Cnn(), "transformer": Transformer(), "custom": Custom()},
    "data": {"digits": Digits(), "synthetic": Synthetic(), "npz": Npz(), "mnist": Mnist(), "custom": Custom()},
    "optimizer": {"sgd": Sgd(), "momentum": Momentum(), "adam": Adam()},
    "schedule": {
        "free": Schedule(),
        "search": Search(),
        "seeded": Seeded(),
        "replay": Replay(),
        **{name: Search(name) for name in RECIPES},
    },
    "workload": {
        "train": Workload(),
        **{name: Workload(name) for name in SMALL},
        "bank": Bank(),
        "precision": PrecisionMode(),
        "counter": Counter(),
        "compile_cache": CompileCache(),
        "custom": Custom(),
    },
    "audit": {
        "none": Audit("none"),
        "counters": Audit(),
        "profile": Audit("profile", trace_steps=200),
        "full": Audit("full", trace_steps=20),
    },
    "state": {"safe": State(), "naive": State(*["naive"] * len(fields(State)))},
}


def nearest(word: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the known word nearest to `word`, or nothing when none is near."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""

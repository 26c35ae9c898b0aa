"""What `--help` prints: made from the schema, so that it cannot disagree with it. Standard library only."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable, Iterator

from trainer.config import OPTIONS, Config
from trainer.experiments import experiments
from trainer.keys import Key, keys
from trainer.state.mechanisms import HOLDERS

ABOUT = (
    "Trains one Keras model on N replicas, under PyTorch threads, in one process or several, or TensorFlow's "
    "MirroredStrategy, and tells what happened to the state that the replicas share."
)
COMMANDS = (
    ("python -m trainer", "The tour: five small runs, safe and unsafe, and one table."),
    ("python -m trainer KEY=VALUE ...", "One run."),
    (
        "python -m trainer -m KEY=A,B ...",
        "Every combination, each in a process of its own; one table, sweep.csv, sweep.png and report.html.",
    ),
    ("python -m trainer report FOLDER...", "The same files again, of runs and sweeps that are there; --junit FILE."),
    ("python -m trainer show WHAT", "A table: modes, state, guarantees, experiments or bytecode."),
    (
        "python -m trainer show WHAT --prove",
        "For modes and state: the same claims, each held to every order of a small case.",
    ),
)
# What is chosen by each group; its options follow.
GROUPS = {
    "strategy": "Who hosts the replicas",
    "update_mode": "How one replica's update is kept apart from the others' (show modes)",
    "precision": "The dtype that steps compute in",
    "model": "What is trained",
    "data": "What it is trained on",
    "optimizer": "The rule that makes an update of a gradient",
    "schedule": "Who goes next, the operating system or a given order, drawn or searched",
    "workload": "What the replicas do",
    "audit": "How closely the run is watched",
    "state": "Who holds what replicas share beside the weights (show state)",
}
HYDRA = (
    ("-m, --multirun", "A sweep."),
    ("--cfg job", "Show the configuration that the other arguments make, and run nothing."),
    ("--info", "Show where it comes from."),
    ("-sc install=bash", "Print what completes keys and options of the command trainer: see README.md."),
    ("hydra/launcher=joblib", "A sweep's runs at the same time; hydra.launcher.n_jobs=2 says how many."),
    ("hydra/launcher=submitit_slurm", "Each a job of a cluster; submitit_local and ray: docs/cluster.md."),
    ("hydra.run.dir=FOLDER", "Where one run goes."),
    ("hydra.sweep.dir=FOLDER", "Where a sweep goes."),
)
STATUS = (
    "Exit status: 0; 1 the verdict fails under fail_on; 2 bad configuration or input; 3 the run broke; 130 Ctrl-C; "
    "143 SIGTERM."
)

# As wide as the terminal, within what can be read; as a pipe, which has no width.
LEAST_COLUMNS, MOST_COLUMNS = 60, 120
INDENT, COMMAND_INDENT = 33, 39


def usage() -> str:
    """The whole text, in lines that fit the terminal, or `COLUMNS`."""
    columns = max(LEAST_COLUMNS, min(MOST_COLUMNS, shutil.get_terminal_size((MOST_COLUMNS, 24)).columns))
    parts = (
        textwrap.wrap(ABOUT, columns),
        _rows(COMMANDS, columns, COMMAND_INDENT),
        ["Groups, GROUP=OPTION (* is the default)", *_groups(columns)],
        ["Keys, KEY=VALUE (with their defaults)", *_rows(_keys(), columns)],
        ["Hydra's own (more: --hydra-help)", *_rows(HYDRA, columns)],
        textwrap.wrap(STATUS, columns),
    )
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def _groups(columns: int) -> Iterator[str]:
    defaults = Config()
    for group, options in OPTIONS.items():
        names = [f"{name}*" if node == getattr(defaults, group) else name for name, node in options.items()]
        yield from _row(group, ": ".join(filter(None, (GROUPS.get(group), ", ".join(names)))), columns)
    yield from _row("experiment", f"A run that has a name: {len(experiments())} of them (show experiments).", columns)


def _keys() -> Iterator[tuple[str, str]]:
    for key in keys().values():
        owners = _owners(key)
        group, _, own = key.name.partition(".")
        text = f"Held by: safe, naive, or {', '.join(HOLDERS[own])}." if group == "state" else key.text
        yield key.name, " ".join(filter(None, (text, owners, f"Default: {key.default}.")))


def _owners(key: Key) -> str:
    """Which options have a key, or which have not, whatever is shorter; nothing where all have it."""
    if not key.owners:
        return ""
    group = key.name.partition(".")[0]
    others = [f"{group}={option}" for option in OPTIONS[group] if f"{group}={option}" not in key.owners]
    if len(others) < len(key.owners):
        return f"Not with {' or '.join(others)}."
    return f"With {' and '.join(key.owners)} only."


def _rows(rows: Iterable[tuple[str, str]], columns: int, indent: int = INDENT) -> list[str]:
    return [line for name, text in rows for line in _row(name, text, columns, indent)]


def _row(name: str, text: str, columns: int, indent: int = INDENT) -> list[str]:
    first = f"  {name}".ljust(indent)
    return textwrap.wrap(text, columns, initial_indent=first, subsequent_indent=" " * indent, break_on_hyphens=False)

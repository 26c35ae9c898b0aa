"""What `--help` prints: made from the schema, so that it cannot disagree with it. Standard library only."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from trainer.config import OPTIONS, Config
from trainer.experiments import experiments
from trainer.keys import Key, keys
from trainer.state.mechanisms import HOLDERS

HEAD = """\
Trains one Keras model on N replicas, under PyTorch threads, in one process or several, or TensorFlow's
MirroredStrategy, and tells what happened to the state that the replicas share.

  python -m trainer                            the tour: five small runs, safe and unsafe, and one table
  python -m trainer KEY=VALUE ...              one run
  python -m trainer -m KEY=A,B KEY=C,D ...     every combination, each in a process of its own; one table, sweep.csv and
                                               sweep.png
  python -m trainer report FOLDER...           the same table, CSV and plot again, of runs and sweeps that are there
  python -m trainer show modes|state|guarantees|experiments|bytecode
  python -m trainer show modes|state --prove   the same claims, each held to every order of a small case
"""

HYDRA = """\
Hydra's own (more: --hydra-help)
  -m, --multirun                 a sweep
  --cfg job                      show the configuration that the other arguments make, and run nothing
  --info                         show where it comes from
  hydra/launcher=joblib          a sweep's runs at the same time; hydra.launcher.n_jobs=2 says how many
  hydra/launcher=submitit_slurm  each a job of a cluster; submitit_local and ray: docs/cluster.md
  hydra.run.dir=FOLDER           where one run goes
  hydra.sweep.dir=FOLDER         where a sweep goes

Exit status: 0; 1 the verdict fails under fail_on; 2 bad configuration or input; 3 the run broke; 130 Ctrl-C;
143 SIGTERM.
"""

COLUMNS = 120
INDENT = 33


def usage() -> str:
    return "\n".join((HEAD, "\n".join(_groups()), "\n".join(_keys()), HYDRA))


def _groups() -> Iterator[str]:
    yield "Groups, GROUP=OPTION (* is the default)"
    defaults = Config()
    for group, options in OPTIONS.items():
        names = [f"{name}*" if node == getattr(defaults, group) else name for name, node in options.items()]
        yield from _row(group, ", ".join(names))
    yield from _row("experiment", ", ".join(experiments()))
    yield ""


def _keys() -> Iterator[str]:
    yield "Keys, KEY=VALUE (with their defaults)"
    for key in keys().values():
        owners = _owners(key)
        group, _, own = key.name.partition(".")
        text = f"Held by: safe, naive, or {', '.join(HOLDERS[own])}." if group == "state" else key.text
        yield from _row(key.name, " ".join(filter(None, (text, owners, f"Default: {key.default}."))))
    yield ""


def _owners(key: Key) -> str:
    """Which options have a key, or which have not, whatever is shorter; nothing where all have it."""
    if not key.owners:
        return ""
    group = key.name.partition(".")[0]
    others = [f"{group}={option}" for option in OPTIONS[group] if f"{group}={option}" not in key.owners]
    if len(others) < len(key.owners):
        return f"Not with {' or '.join(others)}."
    return f"With {' and '.join(key.owners)} only."


def _row(name: str, text: str) -> list[str]:
    first = f"  {name}".ljust(INDENT)
    return textwrap.wrap(text, COLUMNS, initial_indent=first, subsequent_indent=" " * INDENT, break_on_hyphens=False)

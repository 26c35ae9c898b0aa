"""The command line's way to Hydra and back: options, flags, mistakes on one line, an exit status."""

from __future__ import annotations

import dataclasses
import os
import sys
import traceback
from typing import NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from trainer import launchers
from trainer.config import OPTIONS, Config, ConfigError
from trainer.interrupts import Interrupted, interruptible, wait_for_workers
from trainer.invocation import INVOCATION, complain
from trainer.job import Job
from trainer.launch import ROOT
from trainer.mistakes import MISTAKES, line
from trainer.stop import REASONS

CONFIGS = ROOT / "configs"
# What submitit, which is not imported where nobody asks for it, raises for a worker that ended without a word.
LEFT_NOTHING = ("UncompletedJobError", "FailedJobError")
COMMANDS = ("run", "multirun", "cfg", "info", "shell_completion")


def main(arguments: list[str]) -> int:
    """Do what these arguments of the command line ask for, and return the exit status."""
    try:
        arguments = _with_brought(_flags_first(arguments))
    except ConfigError as error:
        return complain(str(error))
    _register()
    try:
        with interruptible() as caught:
            return _run(arguments, caught)
    except Interrupted as interruption:
        return complain(f"{REASONS[interruption.number]}.", interruption.status)


def _run(arguments: list[str], caught: list[Interrupted]) -> int:
    """Do the runs and, after a sweep, sum it up however it ended."""
    try:
        status = _hand_over(arguments)
    except Interrupted as interruption:
        status = complain(f"{REASONS[interruption.number]}.", interruption.status)
    except Exception as error:
        if caught:
            # Ray's compiled code has made another one of it.
            status = complain(f"{REASONS[caught[0].number]}.", caught[0].status)
        # joblib's own, which is not imported where no worker was asked for.
        elif type(error).__name__ == "TerminatedWorkerError":
            status = complain("a worker process of hydra/launcher=joblib was killed, and the others with it.", 3)
        else:
            # Not a mistake of the user's but of the program's: its stack is told, and its status is not a verdict's.
            traceback.print_exc()
            status = 3
    if INVOCATION.follower is not None:
        INVOCATION.follower.end()
    if INVOCATION.sweep is not None:
        # Here, so that a command that makes no sweep does not wait for rich.
        from trainer.sweep_end import end

        status = end(INVOCATION.sweep, status)
    return status


def _flags_first(arguments: list[str]) -> list[str]:
    """The same arguments, flags before overrides: Hydra takes `-m` before or after all overrides, but not between them.

    Raises:
        ConfigError: there is no such flag. Hydra would print its usage.
    """
    parser = get_args_parser()

    def fail(message: str) -> NoReturn:
        raise ConfigError(f"{message}. --help lists the flags.")

    parser.error = fail  # type: ignore[method-assign]
    found = parser.parse_intermixed_args(arguments)
    asked = [f"--{name.replace('_', '-')}" for name in COMMANDS if getattr(found, name)]
    if len(asked) > 1:
        raise ConfigError(f"{' and '.join(asked)} exclude each other. Give one of them.")
    if found.experimental_rerun:
        raise ConfigError("--experimental-rerun is not supported. A verdict's run.command has what does its run again.")
    flags = list(arguments)
    for override in found.overrides:
        flags.remove(override)
    return [*flags, *found.overrides]


def _with_brought(arguments: list[str]) -> list[str]:
    """The same, and GROUP=custom for each group of which a `_target_` is given: it has no other option to go with.

    A loop of the user's own does its own locking, which is an update mode too.
    """
    given = [argument.partition("=")[0] for argument in arguments]
    groups = [group for group, options in OPTIONS.items() if "custom" in options and f"{group}._target_" in given]
    if "workload" in groups:
        groups.append("update_mode")
    return [*arguments, *(f"{group}=custom" for group in dict.fromkeys(groups) if group not in given)]


def _register() -> None:
    """Give Hydra the schema, and every built-in option as a typed node of its group."""
    store = ConfigStore.instance()
    # Left open, so that the node of the chosen option says which keys there are.
    open_fields = {field.name: MISSING for field in dataclasses.fields(Config) if field.type == "Any"}
    store.store(name="schema", node=Config(**open_fields))
    for group, options in OPTIONS.items():
        for name, node in options.items():
            store.store(group=group, name=name, node=node)
    launchers.register()


def _hand_over(arguments: list[str]) -> int:
    # Hydra reads its arguments there.
    sys.argv[1:] = arguments
    run = hydra.main(config_path=str(CONFIGS), config_name="config", version_base="1.3")(Job(os.getpid()))
    try:
        run()
    except MISTAKES as error:
        if INVOCATION.running:
            raise
        return complain(line(error))
    except SystemExit as end:
        # Hydra ends the program after it has shown something, with 1 where there was nothing to show; the checks end it
        # with 2 and 3.
        return end.code if end.code in (0, 3) else 2
    except Exception as error:
        if type(error).__name__ not in LEFT_NOTHING:
            raise
        wait_for_workers()
        return complain(f"a sweep's {'job' if INVOCATION.batch else 'worker process'} was killed. Other runs go on.", 3)
    return INVOCATION.status

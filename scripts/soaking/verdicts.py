"""What must be true of every verdict, whatever the run was and whatever it came to."""

from __future__ import annotations

import dataclasses
import json
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from trainer.audit.guarantees import GUARANTEES
from trainer.audit.judge import claimed
from trainer.audit.verdict import FILE_NAME, Error, Verdict, exit_status
from trainer.config import Config, Custom
from trainer.workloads.small import small

SHA256 = re.compile(r"[0-9a-f]{64}")


def problems(folder: Path, config: Config, status: int) -> list[str]:
    """What is wrong with the verdict in a run's folder; nothing, as a rule.

    Args:
        status: that the run's process, or its command, ended with.
    """
    try:
        text = (folder / FILE_NAME).read_text(encoding="utf-8")
    except OSError as error:
        return [f"no {FILE_NAME}: {error.strerror}; status {status}"]
    try:
        found = json.loads(text, parse_constant=_no_number)
    except ValueError as error:
        return [f"{FILE_NAME} is no JSON: {error}"]
    wrong = list(_misfits(found, Verdict, FILE_NAME))
    # What follows reads keys that are there and of their types.
    return wrong or [*_of_words(found, config, status), *_of_numbers(found, config), *_of_run(found, config)]


def verdict(folder: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found


def _no_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is no JSON")


def _misfits(value: Any, hint: Any, where: str) -> Iterator[str]:
    """Where a value is not of the type that the verdict's own classes say."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        if not isinstance(value, dict) or sorted(value) != sorted(hints):
            yield f"{where} has {sorted(value) if isinstance(value, dict) else value!r} for {sorted(hints)}"
            return
        for name, each in hints.items():
            yield from _misfits(value[name], each, f"{where}.{name}")
    elif origin is typing.Literal:
        if value not in arguments:
            yield f"{where} is {value!r}, none of {arguments}"
    elif origin in (typing.Union, types.UnionType):
        if all(any(True for _ in _misfits(value, each, where)) for each in arguments):
            yield f"{where} is {value!r}, not {hint}"
    elif origin is list:
        if not isinstance(value, list):
            yield f"{where} is {value!r}, no list"
            return
        for number, each in enumerate(value):
            yield from _misfits(each, arguments[0], f"{where}[{number}]")
    elif origin is dict:
        if not isinstance(value, dict):
            yield f"{where} is {value!r}, no dict"
            return
        for name, each in value.items():
            yield from _misfits(each, arguments[1], f"{where}.{name}")
    elif hint is float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            yield f"{where} is {value!r}, no number"
    elif not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        yield f"{where} is {value!r}, not {hint.__name__}"


def _of_words(found: dict[str, Any], config: Config, status: int) -> Iterator[str]:
    """The verdict's word, its guarantees' and the exit status agree."""
    error = Error(**found["error"]) if found["error"] else None
    fits = exit_status(Verdict(found["verdict"], found["run"], error), config.fail_on)
    if status != fits:
        yield f"exit status {status}, and verdict {found['verdict']} with fail_on={config.fail_on} is {fits}"
    if (found["verdict"] == "broken") != (error is not None):
        yield f"verdict {found['verdict']} with error {error}"
    if error is not None and (not error.message.strip() or (error.kind == "refused" and "\n" in error.message)):
        yield f"error.message is {error.message!r}"
    guarantees = found["guarantees"]
    if guarantees and [each["name"] for each in guarantees] != list(GUARANTEES):
        yield f"guarantees are {[each['name'] for each in guarantees]}"
    statuses = {each["status"] for each in guarantees}
    for word in ("violated", "anomaly"):
        if error is None and word in statuses:
            if found["verdict"] != word:
                yield f"verdict {found['verdict']}, and a guarantee is {word}"
            break
    put_forward = claimed(config)
    for each in guarantees:
        if each["claimed"] != (each["name"] in put_forward) or each["required"] != (each["name"] in config.require):
            yield f"{each['name']}: claimed {each['claimed']}, required {each['required']}"
        if each["status"] in ("upheld", "violated") and not (each["claimed"] or each["required"]):
            yield f"{each['name']} is {each['status']} and neither claimed nor required"
        if each["status"] == "violated" and each["claimed"]:
            yield f"{each['name']} is claimed and violated: {each['evidence']}"
        if not each["evidence"].strip():
            yield f"{each['name']} has no evidence"
    if error is None and not statuses & {"violated", "anomaly"} and found["anomalies"]:
        yield f"anomalies and no guarantee against which: {[each['kind'] for each in found['anomalies']]}"


def _of_numbers(found: dict[str, Any], config: Config) -> Iterator[str]:
    """Counts are within what there can be."""
    for each in found["anomalies"]:
        if not 1 <= each["count"] <= each["of"]:
            yield f"{each['kind']}: {each['count']} of {each['of']}"
        if not each["witness"].strip():
            yield f"{each['kind']} has no witness"
    for row in found["precision"]:
        if not 0 <= row["steps_off"] <= row["steps"] or sum(row["computed"].values()) > row["steps"]:
            yield f"precision of replica {row['replica']}: {row['steps_off']} of {row['steps']}, {row['computed']}"
    numbers = found["metrics"]
    kept, expected = numbers.get("updates_kept"), numbers.get("updates_expected")
    if kept is not None and expected is not None and not 0 <= kept <= expected:
        yield f"updates_kept is {kept} of {expected}"
    if found["error"] is None and not _whole(config) and numbers.get("steps_done") is None:
        yield "steps_done is missing"
    if (done := numbers.get("steps_done")) is not None and _trains(config) and not 0 <= done <= config.train.steps:
        yield f"steps_done is {done} of {config.train.steps}"
    if numbers.get("accuracy") is not None and not 0 <= numbers["accuracy"] <= 1:
        yield f"accuracy is {numbers['accuracy']}"
    cosine = numbers.get("gradient_cosine_min")
    if cosine is not None and not -1.01 <= cosine <= 1.01:
        yield f"gradient_cosine_min is {cosine}"


def _of_run(found: dict[str, Any], config: Config) -> Iterator[str]:
    """It is about the run that was asked for, and has its bits where it trained to its end."""
    told = found["run"]
    for name, value in {
        "strategy": config.strategy.name,
        "num_replicas": config.replicas_in_all,
        "schedule": config.schedule.name,
        "audit": config.audit.name,
        "steps": config.train.steps,
        "seed": config.train.seed,
    }.items():
        if told.get(name) != value:
            yield f"run.{name} is {told.get(name)!r} and not {value!r}"
    digest = found["final_parameters_sha256"]
    if digest is not None and not SHA256.fullmatch(digest):
        yield f"final_parameters_sha256 is {digest!r}"
    if found["error"] is not None and digest is not None:
        yield "final_parameters_sha256 of a run that broke"
    # In many orders the last may be one that nobody could finish, and copies that differ have no bits in common.
    # Where nobody has compared them: what is held as it comes is in each copy its replica's own.
    held = {told.get("state", {}).get(name) for name in ("batch_statistics", "loss_scale")}
    equal = config.strategy.name == "threads" or ("replicas_identical" in claimed(config) and "shared" not in held)
    divergence = found["metrics"].get("replica_divergence_max")
    one_copy = divergence == 0 or (divergence is None and equal)
    if found["error"] is None and _trains(config) and not config.controlled and one_copy and digest is None:
        yield "final_parameters_sha256 is missing"


def _trains(config: Config) -> bool:
    return small(config) is None and not isinstance(config.workload, Custom)


def _whole(config: Config) -> bool:
    return not _trains(config) or config.controlled

"""How a process ended, and what is wrong with that."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from soaking import verdicts
from soaking.places import Place
from trainer.audit.judge import claimed
from trainer.audit.verdict import Verdict, exit_status
from trainer.config import Config

# What a run's process has beside its main thread: it waits for signals and for its parent's end.
THREADS = ["stop"]
# Files, pipes and sockets that a run may hold at its end and did not at its beginning: the two ends of a pipe that
# wakes the thread above, and what frameworks open once.
MOST_DESCRIPTORS = 6
TERMINATED = 143


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        how: `itself`; `asked`, by SIGTERM; or `ended`, for it hung.
        left: processes that it left behind.
        census: what it held at its end: threads, descriptors, children; nothing where it was ended, or is a command.
    """

    status: int
    seconds: float
    how: str
    output: str
    errors: str
    left: list[str] = field(default_factory=list)
    census: dict[str, list[str]] = field(default_factory=dict)


def of_process(ended: Ended, place: Place) -> Iterator[str]:
    """What is wrong with the end of any process."""
    if ended.how == "ended":
        yield f"hang: not done after {ended.seconds:.0f} s"
    for each in ended.left:
        yield f"leak: process left behind: {each}"
    for each in place.left_in_tmp():
        yield f"leak: temporary file left behind: {each}"
    if ended.census and ended.how == "itself":
        for name in ended.census["threads"]:
            if name not in THREADS:
                yield f"leak: thread left: {name}"
        for each in ended.census["children"]:
            yield f"leak: child process left: {each}"
        own = [each for each in ended.census["descriptors"] if each.startswith(str(place.folder))]
        for each in own:
            yield f"leak: file left open: {each}"
        if len(ended.census["descriptors"]) > MOST_DESCRIPTORS:
            yield f"leak: {len(ended.census['descriptors'])} descriptors opened: {ended.census['descriptors']}"


def of_run(ended: Ended, place: Place, config: Config) -> Iterator[str]:
    """What is wrong with a run that the rules took, and for which nothing was broken on purpose."""
    yield from of_process(ended, place)
    if ended.how == "ended":
        return
    found = verdicts.verdict(place.run)
    error = found.get("error") or {}
    kind, message = error.get("kind"), error.get("message")
    if ended.how == "asked" and found and not error:
        # It came to its end by itself, just then.
        yield from verdicts.problems(place.run, config, exit_status(Verdict(found["verdict"], {}), config.fail_on))
        return
    if ended.how == "asked":
        if (ended.status, kind) != (TERMINATED, "interrupted"):
            yield f"terminated, with status {ended.status} and error {error}"
        yield from verdicts.problems(place.run, config, 3)
        return
    yield from verdicts.problems(place.run, config, ended.status)
    if getattr(config.train, "on_nonfinite", "") == "stop":
        return  # a large learning rate is enough
    # Some ways to lock are there to be seen waiting for ever.
    if kind in ("crash", "timeout", "killed", "interrupted") or (
        kind == "deadlock" and "no_deadlock" in claimed(config)
    ):
        yield f"broken: {kind}: {message}"


def of_refusal(ended: Ended, place: Place, refused: bool, taken: int) -> Iterator[str]:
    """What is wrong with the answer to a command with a mistake in it.

    Args:
        refused: whether it must be refused.
        taken: the status that says that it was not.
    """
    yield from of_process(ended, place)
    if ended.how != "itself":
        return
    if ended.status == taken:
        if refused:
            yield "accepted"
        return
    if "Traceback" in ended.errors:
        yield f"traceback: {ended.errors.strip().splitlines()[-1]}"
    elif ended.status != 2:
        # Of a command that shows something there is nothing to refuse.
        if ended.status != 0 or refused:
            yield f"refused with status {ended.status}: {ended.errors.strip()[-300:]}"
        return
    elif not (ended.errors.startswith("trainer: ") and ended.errors.endswith("\n") and ended.errors.count("\n") == 1):
        yield f"refused in {ended.errors.count(chr(10))} lines: {ended.errors[:600]!r}"
    if ended.output:
        yield f"refused, and on standard output: {ended.output[:300]!r}"
    if left := place.left_here():
        yield f"refused, and left behind: {', '.join(left[:5])}"

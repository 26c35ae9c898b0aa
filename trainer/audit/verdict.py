"""The verdict: every guarantee with its evidence, and the one word that sums them up. Schema 1 of `verdict.json`."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from trainer.audit.guarantees import OF_THE_MODE
from trainer.whole_file import whole

Word = Literal["broken", "violated", "anomaly", "inconclusive", "upheld"]
Status = Literal["upheld", "violated", "anomaly", "not_seen", "not_checked", "not_applicable"]
ErrorKind = Literal["crash", "deadlock", "timeout", "killed", "interrupted", "refused", "nonfinite"]

# Worst first: the first that fits is the verdict.
WORDS: tuple[Word, ...] = ("broken", "violated", "anomaly", "inconclusive", "upheld")
FILE_NAME = "verdict.json"


@dataclass
class Covers:
    """What a status speaks of: this run, the only order there is, all orders, or all within a bound."""

    kind: Literal["this_run", "only_order", "all_orders", "bounded"] = "this_run"
    orders: int | None = None
    preemptions: int | None = None


@dataclass
class Guarantee:
    name: str
    claimed: bool
    required: bool
    status: Status
    covers: Covers
    evidence: str


@dataclass
class Anomaly:
    """Something that was seen, with how often and the smallest witness."""

    kind: str
    count: int
    of: int
    where: str
    witness: str
    replay: str | None = None
    remedy: str = ""


@dataclass
class PrecisionRow:
    """What one replica was asked to compute in and what was read off its activations, in steps.

    Attributes:
        gradients: what was read off a kernel's gradient -> steps.
        mode_at_entry, mode_at_exit: the precision mode that the replica was in before and after its step -> steps.
    """

    replica: int
    asked: str
    computed: dict[str, int]
    steps: int
    steps_off: int
    gradients: dict[str, int] = field(default_factory=dict)
    mode_at_entry: dict[str, int] = field(default_factory=dict)
    mode_at_exit: dict[str, int] = field(default_factory=dict)


@dataclass
class ProfileRow:
    """Where one replica's time went in the steps that were traced: phase -> median seconds of a step, and share of the
    wall time of those steps; `replica` is None for all of them, where one host takes their steps together."""

    replica: int | None
    seconds: dict[str, float]
    share: dict[str, float]


@dataclass
class Error:
    kind: ErrorKind
    message: str
    replica: int | None = None
    step: int | None = None


@dataclass
class Verdict:
    verdict: Word
    run: dict[str, Any]
    error: Error | None = None
    guarantees: list[Guarantee] = field(default_factory=list)
    anomalies: list[Anomaly] = field(default_factory=list)
    precision: list[PrecisionRow] = field(default_factory=list)
    metrics: dict[str, float | int | None] = field(default_factory=dict)
    final_parameters_sha256: str | None = None
    outcomes_distinct: int | None = None
    profile: list[ProfileRow] = field(default_factory=list)
    schema: int = 1

    def to_json(self) -> str:
        fields = asdict(self)
        ordered = {
            "schema": fields.pop("schema"),
            "verdict": fields.pop("verdict"),
            "error": fields.pop("error"),
            **fields,
        }
        ordered["metrics"] = {
            # JSON has no word for infinity or not-a-number.
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in ordered["metrics"].items()
        }
        return json.dumps(ordered, indent=2, allow_nan=False) + "\n"


def sum_up(
    error: Error | None,
    guarantees: list[Guarantee],
    at_risk: frozenset[str] = frozenset(),
    basis: tuple[str, ...] = OF_THE_MODE,
) -> Word:
    """The first word that fits, worst first.

    A run is inconclusive when something claimed or required was not checked (or, if required, could not be), and when
    an unsafe update mode or state holder showed nothing: its silence proves nothing.

    Args:
        at_risk: guarantees that what was chosen does not keep, as unsafe state holders do not.
        basis: guarantees of which one at least, claimed or required, has to be upheld for the run to be so.
    """
    statuses = {guarantee.status for guarantee in guarantees}
    claimed = [guarantee for guarantee in guarantees if guarantee.claimed or guarantee.required]
    if error is not None:
        return "broken"
    for word in ("violated", "anomaly"):
        if word in statuses:
            return word
    unchecked = any(
        guarantee.status == "not_checked" or (guarantee.required and guarantee.status == "not_applicable")
        for guarantee in claimed
    )
    silent = any(guarantee.name in at_risk and guarantee.status == "not_seen" for guarantee in guarantees)
    upheld = any(guarantee.status == "upheld" and guarantee.name in basis for guarantee in claimed)
    return "upheld" if upheld and not unchecked and not silent else "inconclusive"


def exit_status(verdict: Verdict, fail_on: str) -> int:
    """0; 1 when the verdict is as bad as `fail_on` or worse; 3 when the run broke; 2 when it was refused.

    Interruptions exit as their signal does, which whoever caught it knows.
    """
    if verdict.error is not None:
        return 2 if verdict.error.kind == "refused" else 3
    if fail_on == "never":
        return 0
    return 1 if WORDS.index(verdict.verdict) <= WORDS.index(fail_on) else 0


def save(verdict: Verdict, folder: Path) -> Path:
    """Write `verdict.json` so that a reader sees the whole file or none."""
    path = folder / FILE_NAME
    with whole(path) as partial:
        partial.write_text(verdict.to_json(), encoding="utf-8")
    return path

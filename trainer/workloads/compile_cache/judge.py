"""What a run of `workload=compile_cache` shows: whose bodies ran, what they gave, and what was found again."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from trainer.audit.findings import Finding
from trainer.audit.verdict import Anomaly
from trainer.config import CompileCache, Config
from trainer.holders import holder, mechanism
from trainer.workloads.compile_cache.plan import Ran

SIBLINGS, LATER = "siblings", "processes started later"


@dataclass
class Generation:
    """What the siblings of one round, or those of a later start, ran.

    Attributes:
        siblings: of each, its steps in order.
        parent: what it compiled before there were siblings.
    """

    siblings: Sequence[Sequence[Ran]]
    parent: Sequence[Ran] = ()

    @property
    def ran(self) -> Iterator[Ran]:
        return itertools.chain(self.parent, *self.siblings)

    @property
    def collided(self) -> int:
        """Pairs of steps, each of another sibling, that differ and have the same id."""
        pairs = itertools.combinations(self.siblings, 2)
        return sum(
            left.id == right.id and left.content != right.content
            for one, other in pairs
            for left, right in itertools.product(one, other)
        )


@dataclass
class Counts:
    """What ran in one kind of process.

    Attributes:
        foreign: steps under whose id another one was found.
        wrong: steps that did not give their own body's bits.
        spared: steps that were found by their own, before the process had compiled anything.
        saved: seconds that it had taken to compile those.
    """

    who: str
    ran: int = 0
    foreign: int = 0
    wrong: int = 0
    spared: int = 0
    saved: float = 0.0
    first_foreign: str = ""
    first_wrong: str = ""

    def add(self, ran: Ran, where: str, whose: dict[str, str]) -> None:
        self.ran += 1
        if ran.found not in ("", ran.content):
            self.foreign += 1
            body = whose.get(ran.found, "a step of an earlier run")
            self.first_foreign = self.first_foreign or f"{where}: under {ran.id} was {body}"
        elif ran.saved:
            self.spared += 1
            self.saved += ran.saved
        if not ran.same:
            self.wrong += 1
            self.first_wrong = self.first_wrong or f"{where}: loss and gradient are not its own body's"


@dataclass
class Seen:
    """What all rounds showed so far."""

    siblings: Counts = field(default_factory=lambda: Counts(SIBLINGS))
    later: Counts = field(default_factory=lambda: Counts(LATER))
    collided: int = 0
    warnings: set[str] = field(default_factory=set)

    def add(self, round: int, first: Generation, later: Generation) -> None:
        whose = {
            ran.content: f"sibling {own}'s step {number}"
            for own, sibling in enumerate(first.siblings)
            for number, ran in enumerate(sibling)
        }
        for counts, generation in ((self.siblings, first), (self.later, later)):
            for own, sibling in enumerate(generation.siblings):
                for number, ran in enumerate(sibling):
                    counts.add(ran, f"round {round}, sibling {own}, step {number}", whose)
            for number, ran in enumerate(generation.parent):
                counts.add(ran, f"round {round}, parent, step {number}", whose)
        self.collided += first.collided


def expected_collisions(config: Config) -> float:
    """Pairs of steps of two siblings that have one id, on average over all that siblings can draw.

    Of two siblings' steps every pair that was not named before the fork counts. Each such pair of random ids is alike
    once in 2**bits; of a counter's that of each number is. For `uuid` and `content` it is nothing to speak of.
    """
    own: CompileCache = config.workload
    steps = config.train.steps
    before = steps - own.after_fork if own.start == "compile_then_fork" else 0
    pairs = own.rounds * config.num_replicas * (config.num_replicas - 1) // 2
    match mechanism(config, "compile_ids"):
        case "random_offset":
            return float(pairs * (steps**2 - before**2) / 2**own.offset_bits)
        case "counter":
            return float(pairs * (steps - before))
    return 0.0


def judge(config: Config, seen: Seen) -> dict[str, Finding]:
    """Set what ran against what was to run."""
    both = (seen.siblings, seen.later)
    ran = sum(each.ran for each in both)
    warned = f"; {len(seen.warnings)} warnings of the cache" if seen.warnings else ""
    own = Finding(
        f"{_told([each.foreign for each in both], both)} ran another's body; {sum(each.spared for each in both):,} of "
        f"{ran:,} were found as another process had compiled them, which saved {sum(each.saved for each in both):.2g} "
        f"s; {seen.collided:,} pairs of siblings' ids collided, {expected_collisions(config):.3g} expected{warned}"
    )
    unmixed = Finding(f"{_told([each.wrong for each in both], both)} gave other bits than their own body does")
    remedy = holder(config, "compile_ids").remedy
    for finding, kind, counts, witnesses in (
        (own, "foreign_step", [each.foreign for each in both], [each.first_foreign for each in both]),
        (unmixed, "mixed_gradient", [each.wrong for each in both], [each.first_wrong for each in both]),
    ):
        if sum(counts):
            where = ", ".join(f"{each.who}: {count:,}" for each, count in zip(both, counts, strict=True))
            witness = next(filter(None, witnesses))
            finding.anomalies.append(Anomaly(kind, sum(counts), ran, where, witness, remedy=remedy))
    return {"own_compiled_step": own, "gradients_unmixed": unmixed}


def _told(counts: Sequence[int], both: Sequence[Counts]) -> str:
    each, other = (f"{count:,} of {of.ran:,} steps in {of.who}" for count, of in zip(counts, both, strict=True))
    return f"{each} and {other}"


def metrics(config: Config, seen: Seen) -> dict[str, float | int | None]:
    return {
        "steps_run": seen.siblings.ran + seen.later.ran,
        "steps_spared": seen.siblings.spared + seen.later.spared,
        "compiling_seconds_saved": seen.siblings.saved + seen.later.saved,
        "ids_collided": seen.collided,
        "ids_collided_expected": expected_collisions(config),
    }

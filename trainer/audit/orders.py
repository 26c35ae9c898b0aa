"""What was found over many orders of one case, as findings about it.

Each order is judged by itself, from its record (canaries, bits, settings, ...) and from its history (who read and wrote
which version). What an order shows is the same in every order that is equivalent to it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from trainer.audit import copies
from trainer.audit.anomalies import anomalies
from trainer.audit.findings import Finding
from trainer.audit.lanes import picture
from trainer.audit.records import RunRecord
from trainer.audit.verdict import Anomaly, Covers
from trainer.schedule.operations import VARIABLE, History

ORDERS = "orders"
# Not an anomaly of the run but of the audit: two witnesses that ought to agree do not.
DISAGREE = "disagree"
Kind = Literal["all_orders", "bounded", "sampled", "unfinished", "replayed"]

# Kinds that versions do not show.
OF_THE_RECORD = ("multiplied_update", "unconserved_element")
# What the history tells exactly and for every version, where canaries and counters tell a sample.
OF_THE_HISTORY = ("no_lost_updates", "no_torn_reads", "atomic_updates", "fresh_gradients")


@dataclass(frozen=True)
class Example:
    """An order that shows something, with as few preemptions and then switches as were needed in any that was run."""

    token: str
    preemptions: int
    switches: int
    anomaly: Anomaly
    granted: tuple[int, ...] = ()

    @property
    def size(self) -> tuple[int, int, int]:
        return self.preemptions, self.switches, len(self.granted)


@dataclass
class Judged:
    """One order.

    Attributes:
        findings: by guarantee.
        outcome: digest of what the run ended in; None where it did not end.
        witnesses: `GUARANTEE KIND` -> the operations that show it, by their places in the history.
    """

    findings: dict[str, Finding]
    outcome: str | None = None
    witnesses: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def labels(self) -> set[str]:
        """Every guarantee that is broken, every `GUARANTEE KIND`, and the outcome."""
        found = {f"outcome {self.outcome}"} if self.outcome else set()
        for name, finding in self.findings.items():
            if finding.applies and finding.anomalies:
                found |= {name, *(f"{name} {anomaly.kind}" for anomaly in finding.anomalies)}
        return found


@dataclass
class Explored:
    """Many orders.

    Attributes:
        kind: all_orders; bounded, all with at most `preemptions`; sampled, drawn at random; unfinished, those that
            there was time for; replayed, one that was given.
        orders: those covered; `runs` those that were made, the others being equivalent to one of them.
        counts: label -> orders that have it, and under `ORDERS` all.
        examples: `GUARANTEE KIND` -> the smallest order that shows it.
        first: what the first order showed, by guarantee.
        hidden: whether replicas were seen to share what is not announced.
        distinct: of orders drawn at random, those of which none is equivalent to another.
        sought: the kinds of anomaly that a recipe looked for.
    """

    kind: Kind = "unfinished"
    orders: int = 0
    runs: int = 0
    preemptions: int | None = None
    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, Example] = field(default_factory=dict)
    first: dict[str, Finding] = field(default_factory=dict)
    distinct: int = 0
    hidden: bool = False
    sought: tuple[str, ...] = ()

    @property
    def outcomes(self) -> int:
        """Different outcomes that orders ended in."""
        return sum(label.startswith("outcome ") for label in self.counts)

    @property
    def told_deadlock(self) -> str:
        """Who waited for whom, in the smallest order that ended so; nothing where none did."""
        example = self.examples.get("no_deadlock deadlock")
        return "" if example is None else example.anomaly.witness.partition("\n")[0]

    @property
    def covers(self) -> Covers:
        match self.kind:
            case "all_orders":
                return Covers("all_orders", self.orders)
            case "bounded":
                return Covers("bounded", self.orders, self.preemptions)
        return Covers("this_run", self.orders)


def judge_order(
    record: RunRecord,
    history: History,
    find: Callable[[RunRecord], dict[str, Finding]],
) -> Judged:
    """One order that was run to its end.

    Args:
        find: what the record alone tells, by guarantee.
    """
    found = find(record)
    told: dict[str, list[Anomaly]] = {}
    witnesses: dict[str, tuple[int, ...]] = {}
    for each in anomalies(history):
        told.setdefault(each.guarantee, []).append(Anomaly(each.kind, 1, 1, "", each.because))
        witnesses.setdefault(f"{each.guarantee} {each.kind}", each.events)
    for name, seen in told.items():
        if name not in OF_THE_HISTORY:
            # What both have seen is told by the history, which knows the operations.
            finding, kinds = found.setdefault(name, Finding("")), {each.kind for each in seen}
            finding.anomalies = [*seen, *(each for each in finding.anomalies if each.kind not in kinds)]
    for name in (name for name in OF_THE_HISTORY if name in found):
        by_record, by_history = found[name].anomalies, told.get(name, [])
        lost = any(each.kind in ("lost_update", "dropped_update") for each in by_history)
        # What is added twice is no loss to the history, nor are elements off their sum.
        missing = any(each.kind in ("overwritten_update", "dropped_update") for each in by_record)
        if name == "no_lost_updates" and not history.copies and missing != lost:
            found[DISAGREE] = Finding("", anomalies=[Anomaly(DISAGREE, 1, 1, "", f"{by_record} and {by_history}")])
        silent = history.copies or name in ("no_lost_updates", "no_torn_reads")
        others = [each for each in by_record if not by_history or each.kind in OF_THE_RECORD]
        found[name].anomalies = [*by_history, *(others if silent else [])]
        found[name].checked = True
        if not found[name].anomalies:
            found[name].evidence = _told_history(found[name].evidence, history, name)
    return Judged(found, copies.outcome(record), witnesses)


def pictured(anomaly: Anomaly, history: History, witness: tuple[int, ...] | None) -> Anomaly:
    """The same with a picture of the order: of what shows the anomaly, or of all where only a record has shown it."""
    if "\n" in anomaly.witness:
        return anomaly  # a deadlock's, which has the stacks as well
    return replace(anomaly, witness=f"{anomaly.witness}\n{picture(history, witness)}")


def _told_history(by_record: str, history: History, name: str) -> str:
    """What was looked at and showed nothing."""
    touched = sum(event.operation.of == VARIABLE and bool(event.versions) for event in history.events)
    versions = f"versions of {touched} reads and writes"
    return f"{by_record}; {versions}" if name == "no_lost_updates" else versions


def deadlocked(told: str, stacks: Mapping[int, str], history: History) -> Judged:
    """One order in which no replica could go on."""
    where = "\n".join(f"replica {own}:\n{stack}" for own, stack in stacks.items())
    witness = "\n".join([told, picture(history), where])
    return Judged({"no_deadlock": Finding(told, anomalies=[Anomaly("deadlock", 1, 1, "", witness)])})


def over_all(explored: Explored, replay: Callable[[str], str], *, same_bits: bool) -> dict[str, Finding]:
    """Findings about all orders together.

    Args:
        replay: the command that runs a token's order again.
        same_bits: whether all orders are to end in the same bits.
    """
    names = [*explored.first, *(label.partition(" ")[0] for label in explored.examples)]
    found = {name: _over_all(explored, name, replay) for name in dict.fromkeys(names) if name != DISAGREE}
    found.setdefault(
        "no_deadlock",
        Finding(
            "every replica came to its end" if explored.orders else "no order came to its end", bool(explored.orders)
        ),
    )
    found["same_bits"] = _same_bits(explored, applies=same_bits)
    told_in = found.get("no_lost_updates", found["no_deadlock"])
    if explored.counts[DISAGREE]:
        told_in.evidence += (
            f"; in {explored.counts[DISAGREE]:,} orders canaries and versions disagree: something wrote what it had "
            "not read through the schedule"
        )
    if explored.hidden:
        told_in.evidence += (
            "; replicas share something that is not announced, of which the schedule sees no more than its effects"
        )
    return found


def _over_all(explored: Explored, name: str, replay: Callable[[str], str]) -> Finding:
    first = explored.first.get(name, Finding(""))
    broken = explored.counts[name]
    finding = Finding(first.evidence, first.checked, first.applies)
    examples = {label: each for label, each in explored.examples.items() if label.partition(" ")[0] == name}
    if not examples:
        if first.checked and first.applies and explored.orders > 1:
            told = "; ".join(filter(None, [_held(explored), first.evidence and f"the first: {first.evidence}"]))
            finding.evidence = told
        return finding
    finding.applies = finding.checked = True
    finding.evidence = (
        f"broken in {broken:,} of {_number(explored.orders)}" if broken else "broken in an order beyond those counted"
    )
    for index, (label, example) in enumerate(sorted(examples.items(), key=lambda item: item[1].size)):
        seen = example.anomaly
        # One picture a guarantee: what breaks it in another way is often in the same order.
        witness = seen.witness if not index else seen.witness.partition("\n")[0]
        preempted = "1 preemption" if example.preemptions == 1 else f"{example.preemptions} preemptions"
        told = f"orders; with {preempted}" if explored.counts[label] else f"in an order with {preempted}, not counted"
        finding.anomalies.append(
            Anomaly(
                seen.kind,
                explored.counts[label] or 1,
                # Of a search that was interrupted no order may be counted yet, though one was run.
                explored.orders or explored.runs or 1,
                ", ".join(filter(None, [told if explored.orders > 1 else "", seen.where])),
                witness,
                replay(example.token),
                seen.remedy,
            )
        )
    return finding


def _held(explored: Explored) -> str:
    """Where a guarantee held that nothing broke: an order that ended in a deadlock says nothing about it."""
    stuck = explored.counts["no_deadlock"]
    return f"held in the {_number(explored.orders - stuck)} that came to an end" if stuck else "held in each run"


def _same_bits(explored: Explored, *, applies: bool) -> Finding:
    number = explored.outcomes
    told = f"{number:,} distinct outcome{'' if number == 1 else 's'} of {_number(explored.orders)}"
    finding = Finding(told, applies=applies)
    if applies and number > 1:
        least = min(count for label, count in explored.counts.items() if label.startswith("outcome "))
        finding.anomalies.append(Anomaly("different_bits", least, explored.orders, "orders", finding.evidence))
    if not applies:
        finding.evidence = f"not claimed: {finding.evidence}"
    finding.checked = number > 0
    return finding


def _number(orders: int) -> str:
    return f"{orders:,} order{'' if orders == 1 else 's'}"

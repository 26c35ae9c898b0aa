"""What the replicas' calls say about each guarantee."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from trainer.audit.findings import Finding
from trainer.audit.records import RunRecord
from trainer.audit.verdict import Anomaly
from trainer.config import Config
from trainer.holders import holder, mechanism
from trainer.workloads.precision.calls import Call
from trainer.workloads.precision.rounds import Rounds


def fill(record: RunRecord, config: Config, rounds: Rounds) -> None:
    """Leave in a record what one order has come to."""
    record.engine = "eager"
    findings = found(config, rounds)
    del findings["no_deadlock"]  # that is the schedule's to say
    record.findings = findings
    record.ended_in = repr([sorted(map(repr, tally.calls.items())) for tally in rounds.tallies]).encode()
    for replica in record.replicas:
        replica.steps_done = rounds.num_rounds


def found(config: Config, rounds: Rounds) -> dict[str, Finding]:
    """By guarantee; only for a run that came to its end."""
    told = f"every replica came to the end of {_count(rounds.num_rounds, 'round')}"
    about_first_calls = config.workload.program == "first_call"
    not_asked = f"workload.program={config.workload.program} is not about it"
    elsewhere = Finding(not_asked, applies=False)
    return {
        "precision_as_asked": elsewhere if about_first_calls else _precision(config, rounds),
        "initialized_once": _first_calls(config, rounds) if about_first_calls else elsewhere,
        "no_deadlock": Finding(told),
    }


def _precision(config: Config, rounds: Rounds) -> Finding:
    calls = sum(sum(tally.calls.values()) for tally in rounds.tallies)
    passed = mechanism(config, "precision") == "explicit"
    wrong, off = _number(rounds, lambda call: call.wrong), _number(rounds, lambda call: call.off)
    mode = "were passed their dtype" if passed else f"found the mode that they were to be made in, {wrong:,} another"
    finding = Finding(f"{calls - wrong:,} of {calls:,} calls {mode}; {off:,} computed in another dtype than asked")
    if wrong and rounds.num_rounds > 1:
        each = Counter(step for tally in rounds.tallies for step in tally.wrong)
        least, most = (end(each[step] for step in range(rounds.num_rounds)) for end in (min, max))
        finding.evidence += f"; in one round {least} to {most} of {len(rounds.tallies)} replicas found another"
    remedy = holder(config, "precision").remedy
    kinds = dict.fromkeys(filter(None, map(rounds.program.amiss, range(len(rounds.tallies)))))
    for kind in kinds:
        replicas = [own for own in range(len(rounds.tallies)) if rounds.program.amiss(own) == kind]
        if _number(rounds, lambda call: call.wrong, replicas):
            finding.anomalies.append(_anomaly(rounds, kind, lambda call: call.wrong, replicas))
    if off:
        finding.anomalies.append(_anomaly(rounds, "precision_off", lambda call: call.off, range(len(rounds.tallies))))
    for anomaly in finding.anomalies:
        anomaly.remedy = remedy
    return finding


def _anomaly(rounds: Rounds, kind: str, seen: Callable[[Call], bool], replicas: Iterable[int]) -> Anomaly:
    replicas = list(replicas)
    own, call = next((own, call) for own in replicas for call in rounds.tallies[own].calls if seen(call))
    step = rounds.tallies[own].seen_at[call]
    witness = (
        f"replica {own}, step {step}: asked for {call.asked or 'no mode'}, found {call.found or 'no mode'} and "
        f"computed in {call.computed}"
    )
    calls = sum(sum(rounds.tallies[each].calls.values()) for each in replicas)
    return Anomaly(kind, _number(rounds, seen, replicas), calls, _where(rounds, seen, replicas), witness)


def _where(rounds: Rounds, seen: Callable[[Call], bool], replicas: Iterable[int]) -> str:
    """The replicas concerned: each where they are few, and how many where not."""
    counts = {own: count for own in replicas if (count := _number(rounds, seen, [own]))}
    if len(counts) > 4:
        return f"calls by {len(counts)} replicas, {min(counts.values()):,} to {max(counts.values()):,} each"
    return ", ".join(f"replica {own}: {count:,}" for own, count in counts.items())


def _number(rounds: Rounds, seen: Callable[[Call], bool], replicas: Iterable[int] | None = None) -> int:
    replicas = range(len(rounds.tallies)) if replicas is None else replicas
    return sum(count for own in replicas for call, count in rounds.tallies[own].calls.items() if seen(call))


def _first_calls(config: Config, rounds: Rounds) -> Finding:
    """First calls, of which each round is to have one."""
    made = Counter(step for tally in rounds.tallies for step in tally.firsts)
    total, calls = made.total() + rounds.by_main, rounds.num_rounds * len(rounds.tallies)
    by = "the main thread, before there were replicas" if rounds.by_main else "replicas"
    finding = Finding(f"{_count(total, 'first call')} in {_count(rounds.num_rounds, 'round')}, by {by}")
    repeated = {step: number for step, number in made.items() if number > 1}
    if repeated:
        most = max(repeated, key=lambda step: (repeated[step], -step))
        who = [own for own, tally in enumerate(rounds.tallies) if most in tally.firsts]
        told = ", ".join(map(str, who[:4])) + (f" and {len(who) - 4} more" if len(who) > 4 else "")
        finding.anomalies.append(
            Anomaly(
                "repeated_first_call",
                total - rounds.num_rounds,
                calls,
                f"in {len(repeated):,} of {_count(rounds.num_rounds, 'round')}, {repeated[most]:,} first calls in one",
                f"step {most}: replicas {told} each made the first call, in float32",
                remedy=holder(config, "first_call").remedy,
            )
        )
    return finding


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}" + ("" if number == 1 else "s")

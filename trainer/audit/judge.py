"""Set what was found against what is claimed, and sum it up as a verdict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from trainer import holders
from trainer.audit import copies, findings, nonfinite, precision_findings, profile, state_findings
from trainer.audit.findings import Finding
from trainer.audit.gradients import gradient_rows
from trainer.audit.guarantees import GUARANTEES, OF_THE_MODE, has_copies, has_joint_gradient, synchronized
from trainer.audit.orders import Explored, over_all
from trainer.audit.records import RunRecord
from trainer.audit.verdict import Covers, Error, Guarantee, PrecisionRow, Status, Verdict, sum_up
from trainer.config import Config, Custom, Search, Seeded
from trainer.holders import holder, mechanism
from trainer.schedule.replay import command
from trainer.state.mechanisms import HOLDERS
from trainer.updates.mechanisms import MODES
from trainer.updates.mirrored import MIRRORING
from trainer.workloads import small as smalls
from trainer.workloads.small import heeds, small


def judge(
    config: Config,
    record: RunRecord | None,
    error: Error | None,
    run: dict[str, Any],
    outcomes: Sequence[str] = (),
    explored: Explored | None = None,
) -> Verdict:
    """The verdict on a run.

    Args:
        record: None when the run broke before there was one.
        outcomes: what the run and each of its repetitions ended in (`copies.outcome`).
        explored: what many orders showed, where the run was made in many; `record` is one of them.
    """
    found: dict[str, Finding] = {}
    precision: list[PrecisionRow] = []
    if explored is not None and record is not None:
        found, precision = _find_over_all(config, record, explored, run, outcomes)
    elif record is not None and error is None and config.audit.name != "none":
        if record.findings is not None:
            found = dict(record.findings)
            if heeds(config, "update_mode"):
                _settle(config, found)
        else:
            found, precision = _find(config, record)
            _settle(config, found)
            found["same_bits"] = findings.differing_outcomes(outcomes)
    covers = explored.covers if explored is not None else _of_one_run(config)
    guarantees = [
        _guarantee(config, name, found.get(name), _why_not(config, error, name), covers) for name in GUARANTEES
    ]
    anomalies = [anomaly for finding in found.values() if finding.applies for anomaly in finding.anomalies]
    return Verdict(
        sum_up(error, guarantees, _at_risk(config), _basis(config)),
        run,
        error,
        guarantees,
        anomalies,
        precision,
        metrics(config, record) | _explored_metrics(explored),
        copies.final_digest(record) if record is not None and error is None else None,
        _distinct(outcomes, explored),
        profile.rows(record) if record is not None else [],
    )


def _explored_metrics(explored: Explored | None) -> dict[str, float | int | None]:
    """How much was looked at; nothing for a run in one order."""
    if explored is None:
        return {}
    numbers: dict[str, float | int | None] = {"orders": explored.orders, "orders_run": explored.runs}
    # Of orders drawn at random some are equivalent to others.
    return numbers | ({"orders_distinct": explored.distinct} if explored.kind == "sampled" else {})


def _distinct(outcomes: Sequence[str], explored: Explored | None) -> int | None:
    if explored is not None and explored.kind != "replayed":
        return explored.outcomes or None
    return len(set(outcomes)) if len(outcomes) > 1 else None


def _of_one_run(config: Config) -> Covers:
    return Covers("only_order" if config.strategy.name in MIRRORING else "this_run")


def claimed(config: Config) -> frozenset[str]:
    """The guarantees that the run puts forward: its update mode's and its state holders'."""
    if isinstance(config.workload, Custom):
        return frozenset()  # a loop of the user's own is held to what `require` names
    if small(config) is not None:
        return smalls.claims(config)
    names = MODES[config.update_mode.name].claims | holders.claims(config)
    if holders.at_risk(config):
        names -= {"joint_gradient", "same_bits"}  # the mode reduces what the holders leave of the gradients
    if not has_copies(config):
        names -= {"replicas_identical"}  # copies can only differ where there are several
    if config.audit.repeat == 1 and not isinstance(config.schedule, Search | Seeded):
        names -= {"same_bits"}  # one run has nothing to compare with, and says nothing about it
    if config.controlled and config.update_mode.name != "custom":
        names |= {"no_deadlock"}
    return names


def _at_risk(config: Config) -> frozenset[str]:
    """The guarantees that what was chosen does not keep, so that silence about them proves nothing."""
    own = small(config)
    return holders.at_risk(config) if own is None else frozenset(own.guarantees) - smalls.claims(config)


def _basis(config: Config) -> tuple[str, ...]:
    """The guarantees of which one at least has to be upheld for the run to be so."""
    own = small(config)
    return OF_THE_MODE if own is None else own.guarantees


def _find_over_all(
    config: Config, record: RunRecord, explored: Explored, run: dict[str, Any], outcomes: Sequence[str]
) -> tuple[dict[str, Finding], list[PrecisionRow]]:
    """What all orders showed, and how precise the one was whose record this is."""
    same_bits = "same_bits" in claimed(config) | set(config.require)

    def replay(token: str) -> str:
        return command(str(run.get("command", "python -m trainer")), token, config)

    found = over_all(explored, replay, same_bits=same_bits)
    if explored.kind == "replayed":
        found["same_bits"] = findings.differing_outcomes(outcomes)
    if heeds(config, "update_mode"):
        if explored.first:
            _settle(config, found)
    else:
        _name_remedies(config, found)
    precision = precision_findings.computed_precision(record)[1] if record.trains and record.ended else []
    return found, precision


def find(config: Config, record: RunRecord) -> dict[str, Finding]:
    """What a run's record tells by itself, by guarantee, whoever claims what."""
    return _find(config, record)[0]


def _find(config: Config, record: RunRecord) -> tuple[dict[str, Finding], list[PrecisionRow]]:
    mode = MODES[config.update_mode.name]
    # Copies that are each updated by themselves have an order each.
    own_copies = config.strategy.name in MIRRORING or mode.name == "local_steps"
    precision, rows = precision_findings.computed_precision(record)
    derived = mechanism(config, "random_numbers") == "derived"
    repeatable = derived or not record.draws
    found = {
        "no_lost_updates": findings.lost_updates(record),
        "no_torn_reads": findings.torn_reads(record),
        "atomic_updates": findings.update_order(record, own_copies=own_copies),
        "fresh_gradients": Finding("between averages a copy has only its own process's updates", applies=False)
        if "fresh_gradients" in mode.not_applicable
        else findings.staleness(record),
        "finite_values": nonfinite.finite_values(record),
        "joint_gradient": _joint_gradient(config, record, repeatable=repeatable),
        "gradients_unmixed": state_findings.mixed_gradients(record, repeatable=repeatable),
        "replicas_identical": findings.diverged_copies(record)
        if has_copies(config)
        else Finding("all replicas share one copy", applies=False),
        "precision_as_asked": precision,
    }
    if not isinstance(config.workload, Custom):
        joint = "barrier" in mode.read_under
        growth_steps = holders.growth_steps(config)
        found |= {
            "initialized_once": precision_findings.first_calls(record),
            "settings_as_asked": state_findings.settings(record),
            "loss_scale_kept": state_findings.kept_loss_scale(record, joint=joint, growth_steps=growth_steps),
            "batch_statistics_kept": state_findings.kept_statistics(record),
            "rng_independent": state_findings.random_numbers(record, derived=derived),
            "samples_once": state_findings.samples_once(record),
            "own_compiled_step": state_findings.compiled_steps(record, findings.JOINT_TOLERANCE[config.precision.name]),
        }
    return found, rows


def _joint_gradient(config: Config, record: RunRecord, *, repeatable: bool) -> Finding:
    if "joint_gradient" in MODES[config.update_mode.name].not_applicable:
        mean = "process applies the mean of its own replicas' gradients"
        alone = mean if config.update_mode.name == "local_steps" else "replica's gradient is applied"
        return Finding(f"each {alone} by itself", applies=False)
    normalizes_alone = config.replicas_in_all > 1 and record.layout.of_kind("statistic") and not synchronized(config)
    if not has_joint_gradient(config) or normalizes_alone:
        why = "replicas do not normalize the joint batch and nothing else, so that no gradient is the joint batch's"
        return Finding(why, applies=False)
    if not repeatable:
        return findings.not_checked("the random numbers of a step are gone, so it cannot be computed again")
    return findings.joint_gradient(record, config.precision.name)


def _settle(config: Config, found: dict[str, Finding]) -> None:
    """Name remedies, and take out what the update mode openly gives up."""
    if not isinstance(config.workload, Custom):
        _name_remedies(config, found)
    mode = MODES[config.update_mode.name]
    for name in found.keys() & {*OF_THE_MODE, "fresh_gradients"}:
        for anomaly in found[name].anomalies:
            anomaly.remedy = (name in OF_THE_MODE and mode.remedy) or _claimants(config, name)
    for name in found.keys() & (mode.given_up - frozenset(config.require)):
        if found[name].anomalies:
            found[name].applies = False
            found[name].evidence = f"given up by update_mode={mode.name}: {found[name].evidence}"


def _name_remedies(config: Config, found: dict[str, Finding]) -> None:
    """Name the holder that would keep what was broken; where the holder is safe, it is the update mode that is not."""
    for key in (key for key in HOLDERS if heeds(config, f"state.{key}")):
        held = holder(config, key)
        for anomaly in found[held.guarantee].anomalies if held.guarantee in found else ():
            anomaly.remedy = held.remedy or (
                MODES[config.update_mode.name].remedy if heeds(config, "update_mode") else ""
            )
        if config.strategy.name not in held.strategies:
            # Of those that wait for it, too: there is no order in which they do not.
            for anomaly in found["no_deadlock"].anomalies if "no_deadlock" in found else ():
                anomaly.remedy = next(each.remedy for each in HOLDERS[key].values() if each.remedy)


def _claimants(config: Config, name: str) -> str:
    """The modes of the same strategy that claim a guarantee, as a remedy."""
    modes = [mode.name for mode in MODES.values() if name in mode.claims and config.strategy.name in mode.strategies]
    return f"update_mode={','.join(modes)} claim{'s' if len(modes) == 1 else ''} {name}" if modes else ""


def _guarantee(config: Config, name: str, finding: Finding | None, why: str, covers: Covers) -> Guarantee:
    is_claimed, required = name in claimed(config), name in config.require
    if finding is None:
        return Guarantee(name, is_claimed, required, "not_checked", covers, why)
    return Guarantee(name, is_claimed, required, _status(is_claimed or required, finding), covers, finding.evidence)


def _why_not(config: Config, error: Error | None, name: str) -> str:
    """Why a guarantee that nothing was found about was not checked."""
    own = small(config)
    if error is not None or (own is not None and name in own.guarantees):
        return "the run did not reach its end"
    if own is not None:
        return f"workload={own.name} does not look at it"
    return "audit=none records nothing" if config.audit.name == "none" else "this version has no check for it"


def _status(put_forward: bool, finding: Finding) -> Status:
    if not finding.applies:
        return "not_applicable"
    if not finding.checked:
        return "not_checked"
    if finding.anomalies:
        return "violated" if put_forward else "anomaly"
    return "upheld" if put_forward else "not_seen"


def metrics(config: Config, record: RunRecord | None) -> dict[str, float | int | None]:
    """The numbers of `verdict.json`; None where a thing was not measured."""
    names = (
        "loss accuracy updates_expected updates_kept torn_reads staleness_mean staleness_max gradient_cosine_min "
        "gradient_error_max replica_divergence_max micro_steps_per_second steps_done"
    )
    numbers: dict[str, float | int | None] = dict.fromkeys(names.split())
    if small(config) is None:
        numbers["updates_expected"] = config.replicas_in_all * config.train.steps
    if record is None:
        return numbers
    numbers |= {"steps_done": record.steps_done, **profile.metrics(record)}
    if not record.trains:
        return {**numbers, **record.metrics}
    if record.steps_done:
        numbers["loss"] = float(np.mean([replica.losses[record.steps_done - 1] for replica in record.replicas]))
    if record.evaluations:
        numbers["accuracy"] = record.evaluations[-1].accuracy
    if record.duration_seconds > 0:
        numbers["micro_steps_per_second"] = record.micro_steps_done / record.duration_seconds
    if record.layout.loss_scale is not None:
        numbers["updates_skipped"] = nonfinite.updates_skipped(record)
    if config.audit.name == "none":
        return numbers
    numbers["torn_reads"] = sum(int(replica.read_state.astype(bool).sum()) for replica in record.replicas)
    staleness = findings.recorded_staleness(record)
    if len(staleness):
        numbers["staleness_mean"], numbers["staleness_max"] = float(staleness.mean()), int(staleness.max())
    rows = gradient_rows(record)
    numbers["gradient_cosine_min"] = min((row.cosine_min for row in rows if row.cosine_min is not None), default=None)
    numbers["gradient_error_max"] = max((error for row in rows for error in row.errors.values()), default=None)
    if record.copies is not None:
        numbers["updates_kept"] = int(copies.kept(record).sum())
        numbers["replica_divergence_max"] = copies.divergence(record)
    if record.averages:
        largest, relative = findings.apart_at_averages(record)
        numbers |= {"divergence_before_averages_max": largest, "divergence_before_averages_relative": relative}
    return numbers

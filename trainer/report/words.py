"""The words in which the console, the log and TensorBoard tell a verdict. Standard library only."""

from __future__ import annotations

import math

from trainer.audit.verdict import Anomaly, Covers, Error, Guarantee, Verdict, exit_status


def told(guarantees: list[Guarantee]) -> list[Guarantee]:
    """The guarantees that have something to say: held to, or looked at."""
    return [
        guarantee
        for guarantee in guarantees
        if guarantee.required
        or (guarantee.claimed and guarantee.status != "not_applicable")
        or guarantee.status not in ("not_checked", "not_applicable")
    ]


def untold(guarantees: list[Guarantee]) -> str:
    """One line that names the guarantees which `told` leaves out, or nothing when there are none."""
    quiet = [guarantee for guarantee in guarantees if guarantee not in told(guarantees)]
    lines = []
    for status, title in (("not_checked", "Not claimed and not checked"), ("not_applicable", "Not applicable")):
        names = [guarantee.name for guarantee in quiet if guarantee.status == status]
        if names:
            lines.append(f"{title}: {', '.join(names)}.")
    return " ".join(lines)


def claimed(guarantee: Guarantee) -> str:
    """Who holds the run to it: `yes` its mode or state holders, `required` only the user, `no` nobody."""
    if guarantee.claimed:
        return "yes"
    return "required" if guarantee.required else "no"


def covered(guarantee: Guarantee) -> str:
    """What the status speaks of; nothing was looked at where it was not checked."""
    return "-" if guarantee.status in ("not_checked", "not_applicable") else covers(guarantee.covers)


def covers(what: Covers) -> str:
    match what.kind:
        case "this_run":
            if what.orders is not None:
                return f"{_some(what.orders, 'order')}; others not tried"
            return "this run; other orders not tried"
        case "only_order":
            return "the only order"
        case "all_orders":
            if what.orders == 1:
                return "the only order"
            return "all orders" if what.orders is None else f"all {what.orders:,} orders"
        case "bounded":
            orders = "" if what.orders is None else f"{what.orders:,} orders: "
            bound = (
                "within the bound"
                if what.preemptions is None
                else f"with at most {_some(what.preemptions, 'preemption')}"
            )
            return f"{orders}all {bound}"


def faults(verdict: Verdict) -> str:
    """The faults that the run was asked to have, or nothing."""
    asked = verdict.run.get("faults") or []
    return f"With faults that were asked for: {', '.join(asked)}." if asked else ""


def seen(anomaly: Anomaly) -> str:
    """`37 of 400 (where)`: how often, and where."""
    often = share(anomaly.count, anomaly.of)
    return f"{often} ({anomaly.where})" if anomaly.where else often


def told_of(anomaly: Anomaly) -> list[tuple[str, str]]:
    """What else there is to tell of an anomaly, under titles."""
    parts = (("witness", anomaly.witness), ("replay", anomaly.replay), ("remedy", anomaly.remedy))
    return [(title, text) for title, text in parts if text]


def error(what: Error) -> str:
    """`crash in replica 1 at step 17: message`, as far as it is known; of a message with stacks the first line."""
    replica = "" if what.replica is None else f" in replica {what.replica}"
    step = "" if what.step is None else f" at step {what.step}"
    first, _, stacks = what.message.strip().partition("\n")
    more = " (console.log has the stacks)" if stacks else ""
    return f"{what.kind}{replica}{step}: {' '.join(first.split())}{more}"


def exit_meaning(verdict: Verdict, fail_on: str) -> str:
    """The exit status that follows from a verdict, and why."""
    if verdict.error is not None and verdict.error.kind == "interrupted":
        return "exit status 130 after Ctrl-C, 143 after SIGTERM"
    status = exit_status(verdict, fail_on)
    if verdict.verdict == "upheld":
        return f"exit status {status}"
    why = {
        0: f"fail_on={fail_on} lets it pass",
        1: f"fail_on={fail_on}",
        2: "bad configuration or input",
        3: "the run broke",
    }[status]
    return f"exit status {status}: {why}"


def number(value: object, digits: int = 4) -> str:
    """A measured number, short; `-` where nothing was measured."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "-"
    if not math.isfinite(value):
        return str(value)
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    # A loss that ran away has forty digits, of which none matters.
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.{digits}g}"


def share(kept: object, expected: object) -> str:
    """`37 of 400`; a dash alone where nothing was counted, the count alone where it is not known of how many."""
    found = number(kept)
    return found if found == "-" or expected is None else f"{found} of {number(expected)}"


def measured(verdict: Verdict) -> str:
    """The run's main numbers on one line, those that were measured."""
    run, metrics = verdict.run, verdict.metrics
    steps, done = run.get("steps"), metrics.get("steps_done", run.get("steps"))
    mean, largest = metrics.get("staleness_mean"), metrics.get("staleness_max")
    kept, speed = metrics.get("updates_kept"), metrics.get("micro_steps_per_second")
    of_all = number(steps) if done == steps else share(done, steps)
    orders, ran = metrics.get("orders"), metrics.get("orders_run")
    equivalent = "" if orders == ran else f" ({number(ran)} were run, to one of which each other is equivalent)"
    parts: list[tuple[object, str]] = [
        (orders, f"{_some(orders, 'order')}{equivalent}"),
        (steps, f"{_some(run.get('num_replicas'), 'replica')} x {of_all} steps"),
        *((metrics.get(name), f"{name} {number(metrics.get(name))}") for name in ("loss", "accuracy")),
        (kept, f"updates kept {share(kept, metrics.get('updates_expected'))}"),
        (mean, f"staleness mean {number(mean, 3)}, max {number(largest)}"),
        (speed, f"{number(speed)} micro-steps/s"),
    ]
    return "; ".join(text for value, text in parts if value is not None)


def checkpoints(verdict: Verdict) -> str:
    """Where the run went on from and what it has saved; nothing where it did neither."""
    resumed, saved = verdict.run.get("resumed"), verdict.run.get("checkpoints")
    parts = []
    if resumed:
        first = resumed["step"]
        parts.append(
            f"resumed from {resumed['folder']} after {_some(first, 'step')}, of which is told what was recorded there"
        )
        if resumed["not_carried"]:
            parts.append(f"not carried over: {', '.join(resumed['not_carried'])}")
        parts += [f"passed over: {each}" for each in resumed["skipped"]]
    if saved and saved["written"]:
        parts.append(f"{_some(saved['written'], 'checkpoint')}, the last after step {number(saved['last_step'])}")
    if saved and saved["failed"]:
        failed = saved["failed"]
        parts.append(f"{_some(len(failed), 'checkpoint')} could not be written, the first of {failed[0]}")
    return "; ".join(parts)


def _some(count: object, thing: str) -> str:
    return f"{number(count)} {thing}" if count == 1 else f"{number(count)} {thing}s"

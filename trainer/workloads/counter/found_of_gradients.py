"""What a variable that gradient steps have changed says about each guarantee. NumPy only."""

from __future__ import annotations

import numpy as np

from trainer.audit.findings import Finding, not_checked
from trainer.audit.verdict import Anomaly
from trainer.config import Config
from trainer.workloads.counter.ended import Ended, span
from trainer.workloads.counter.shared import Numbers
from trainer.workloads.counter.ways import JOINT, RATE, num_writers, start_of, way_of

# Of amounts that are no powers of two: thirds, where three replicas share a mean.
TOLERANCE = 1e-9


def of_gradients(ended: Ended) -> dict[str, Finding]:
    """What gradient steps are held to besides what every count is."""
    found = {
        "no_lost_updates": lost_steps(ended),
        "fresh_gradients": not_checked("a schedule sees who read what; a free run does not"),
    }
    if ended.config.update_mode.name in JOINT:
        alone = Finding("no replica steps by itself", applies=False)
        return {**found, "joint_gradient": not_joint(ended), "invariants_kept": alone}
    alone = Finding("each replica's gradient is applied by itself", applies=False)
    return {**found, "joint_gradient": alone, "invariants_kept": not_serial(ended)}


def lost_steps(ended: Ended) -> Finding:
    """Hold every element to its first value less all that replicas have subtracted."""
    config, given = ended.config, sum(ended.given, start=np.zeros(1))
    if config.update_mode.name in JOINT:
        mean = config.update_mode.name == "all_reduce"
        expected: Numbers = np.array(end_of_joint_steps(config, 1 / config.num_replicas if mean else 1.0))
    else:
        expected = start_of(config) - given[None, :, None]
    # Each step may round what it leaves by as much as half an ulp of the largest value that there was.
    rounding = ended.made * np.finfo(np.float64).eps * (abs(start_of(config)) + np.abs(given).max())
    off = ~np.isclose(ended.values, expected, rtol=TOLERANCE, atol=rounding)
    finding = Finding(
        f"{int((~off).sum()):,} of {off.size:,} elements are what is left of {start_of(config):g} once all that "
        f"{ended.made:,} steps subtracted is subtracted"
    )
    if off.any():
        witness = f"elements show {span(ended.values)}, and {span(np.atleast_1d(expected))} is left"
        finding.anomalies.append(Anomaly("unconserved_element", int(off.sum()), off.size, "elements", witness))
    return finding


def not_serial(ended: Ended) -> Finding:
    """Hold the value to what steps that are taken one after another end in, whatever their order."""
    config = ended.config
    if way_of(config).name == "dependent_gradient_step":
        expected = start_of(config) * (1 - RATE) ** ended.made
    else:
        expected = start_of(config) - config.train.steps * RATE * sum(range(1, num_writers(config) + 1))
    return _held_to(ended, expected, "not_serial", "as steps taken one after another do, in any order")


def not_joint(ended: Ended) -> Finding:
    """Hold the value to steps along the gradient of the mean of all replicas' losses."""
    expected = end_of_joint_steps(ended.config, 1 / ended.config.num_replicas)
    return _held_to(ended, expected, "not_joint", "as steps along the gradient of the replicas' mean loss do")


def _held_to(ended: Ended, expected: float, kind: str, how: str) -> Finding:
    off = ~np.isclose(ended.values, expected, rtol=TOLERANCE, atol=0)
    finding = Finding(f"{int((~off).sum()):,} of {off.size:,} elements end in {expected:,.6g}, {how}")
    if off.any():
        witness = f"elements end in {span(ended.values)}, not in {expected:,.6g}"
        anomaly = Anomaly(kind, int(off.sum()), off.size, "elements", witness)
        if kind == "not_serial":
            anomaly.remedy = "update_mode=serialized holds the lock round read, gradient and update"
        finding.anomalies.append(anomaly)
    return finding


def end_of_joint_steps(config: Config, scale: float) -> float:
    """The value after joint steps, each of which subtracts `scale` times the sum of what all replicas take from it."""
    num_replicas, value = config.num_replicas, start_of(config)
    for _ in range(config.train.steps):
        dependent = way_of(config).name == "dependent_gradient_step"
        taken = num_replicas * value if dependent else sum(range(1, num_replicas + 1))
        value -= scale * RATE * taken
    return value

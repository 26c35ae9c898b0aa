"""Conservation on real vectors: rounding is never evidence, and one lost element is."""

from __future__ import annotations

import numpy as np
import pytest

from trainer.audit.conservation import unconserved
from trainer.audit.records import ReplicaRecord, RunRecord
from trainer.state.layout import plan


def added_up(deltas: np.ndarray) -> RunRecord:
    """A record of these additions, float32 [steps, elements], made one after the other, as to a shared vector."""
    steps, elements = deltas.shape
    layout = plan([("kernel", (elements,))], [], (), counter=False, num_replicas=1)
    values = layout.pack([np.ones(elements)])
    record = RunRecord(layout, steps, [ReplicaRecord.empty(0, steps, 1)], initial=values.copy())
    record.added, record.magnitudes = np.zeros(layout.size), np.zeros(layout.size)
    span = layout.segments[0].span
    for delta in deltas:
        values[span] += delta
        record.added[span] += delta
        record.magnitudes += np.abs(values)
    record.copies = values[np.newaxis].copy()
    return record


def rising_and_falling(steps: int, elements: int) -> np.ndarray:
    """Values that grow to thousands and come back, as an optimizer's slots do: rounding is far above the end's own."""
    random = np.random.default_rng(0)
    up = random.uniform(0, 10, (steps // 2, elements))
    return np.concatenate([up, -up[::-1]]).astype(np.float32)


@pytest.mark.parametrize("deltas", [rising_and_falling(2_000, 300), np.full((5_000, 3), 1e-3, np.float32)])
def test_rounding_is_no_evidence(deltas: np.ndarray) -> None:
    found = unconserved(added_up(deltas))
    assert found is not None
    assert (found.count, found.of) == (0, deltas.shape[1])


def test_one_lost_addition_to_one_element_is_found() -> None:
    record = added_up(np.full((500, 40), 1e-2, np.float32))
    record.copies[0, record.layout.segments[0].values + 7] -= 1e-2
    found = unconserved(record)
    assert found is not None
    assert (found.count, found.variable, found.element, found.where) == (1, "kernel", 7, {"kernel": 1})
    assert found.off == pytest.approx(1e-2, rel=1e-2)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_off(value: float) -> None:
    record = added_up(np.full((5, 4), 1e-2, np.float32))
    record.copies[0, record.layout.segments[0].values] = value
    found = unconserved(record)
    assert found is not None
    assert found.count == 1


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
def test_what_is_not_finite_by_what_was_added_tells_nothing(value: float) -> None:
    deltas = np.full((5, 4), 1e-2, np.float32)
    deltas[1:3, 0] = value  # twice 3e38 is more than a float32 holds
    with np.errstate(over="ignore"):
        record = added_up(deltas)
    found = unconserved(record)
    assert found is not None
    assert (found.count, found.of, found.untold) == (0, 3, 1)
    # One that is finite all the same has lost what was added.
    record.copies[0, record.layout.segments[0].values] = 1.0
    found = unconserved(record)
    assert found is not None
    assert (found.count, found.of, found.untold) == (1, 4, 0)

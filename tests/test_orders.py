"""What many orders come to together, where there were none that could be counted."""

from __future__ import annotations

import pytest

from trainer.audit.orders import Example, Explored, over_all
from trainer.audit.verdict import Anomaly


@pytest.mark.parametrize(("runs", "of"), [(2, 2), (0, 1)])
def test_a_search_that_was_interrupted_counts_what_it_saw_among_the_runs_that_it_made(runs: int, of: int) -> None:
    seen = Example("token", 0, 1, Anomaly("precision_off", 1, 1, "", "replica 0 computed in float32"))
    found = over_all(Explored(runs=runs, examples={"precision_as_asked precision_off": seen}), str, same_bits=False)
    (anomaly,) = found["precision_as_asked"].anomalies
    assert (anomaly.count, anomaly.of) == (1, of)


def test_a_search_in_which_no_order_ended_says_so() -> None:
    finding = over_all(Explored(), str, same_bits=False)["no_deadlock"]
    assert (finding.checked, finding.evidence) == (False, "no order came to its end")

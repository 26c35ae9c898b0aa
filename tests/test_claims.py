"""The claims table: what it says is what runs say now, and what it concludes follows from them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.claims.claim import Claim, Measured, Ran, of
from trainer.claims.measure import CannotMeasure, command, measure
from trainer.claims.table import CLAIMS
from trainer.experiments import experiments
from trainer.report.claims import BEGIN, END, between, free_table, replaced, table

ROOT = Path(__file__).resolve().parent.parent
LIMIT_SECONDS = 900  # a few times what it takes on two idle cores
DOCUMENTS = sorted({claim.name.partition(".")[0] for claim in CLAIMS})


@pytest.mark.slow
@pytest.mark.timeout(LIMIT_SECONDS)
@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_readme_says_what_is_measured_now(document: str) -> None:
    names = [claim.name for claim in CLAIMS if claim.name.partition(".")[0] == document]
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "claims.py"), "--check", *names],
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "README.md says what was measured.\n"), done.stderr


def test_every_claim_is_in_the_readme_once_and_in_order() -> None:
    rows = between((ROOT / "README.md").read_text()).splitlines()[2:]
    assert [row.split("**")[1] for row in rows] == [claim.name for claim in CLAIMS]
    page = between((ROOT / "docs" / "claims.md").read_text()).splitlines()[2:]
    assert [row.split("|")[1].strip() for row in page] == [claim.name for claim in CLAIMS if claim.free]


def test_every_experiment_of_a_document_measures_a_claim_or_stands_beside_one() -> None:
    used = {run for claim in CLAIMS for run in (*claim.runs, *claim.free)}
    named = {word.partition("=")[2] for run in used for word in run.split() if word.startswith("experiment=")}
    assert named <= set(experiments())


def ran(*statuses: tuple[str, str], orders: int = 6, evidence: str = "broken in 4 of 6 orders") -> Ran:
    guarantees = [{"name": name, "status": status, "evidence": evidence} for name, status in statuses]
    anomalies = [{"kind": "lost_update", "count": 4, "of": 6}]
    return Ran({"guarantees": guarantees, "anomalies": anomalies, "metrics": {"orders": orders}}, 0)


def test_counts_are_read_off_a_verdict() -> None:
    found = ran(("no_lost_updates", "anomaly"), ("no_deadlock", "upheld"), ("same_bits", "not_checked"))
    assert found.broken("no_lost_updates") == (4, 6)
    assert found.broken("no_deadlock") == (0, 6)
    assert found.held("no_deadlock")
    assert not found.held("same_bits")
    assert (found.anomaly("lost_update"), found.anomaly("torn_read")) == ((4, 6), (0, 0))
    assert ran(("a", "violated"), evidence="broken in 1,234 of 18,646 orders").broken("a") == (1234, 6)
    assert of((1234, 18646)) == "1,234 of 18,646 orders"


def test_a_table_is_put_between_its_marks_and_nowhere_else() -> None:
    claims = [Claim("S9.1", "says", ("a=b", "c=d"), lambda found: Measured("refuted", "none"), ("e=f",))]
    rows = table(claims, [Measured("refuted", "none")])
    assert rows.splitlines()[2] == "| **S9.1** says | none | refuted | `python -m trainer a=b` |"
    assert free_table(claims, ["seen once"]).splitlines()[2] == "| S9.1 | seen once | `python -m trainer e=f` |"
    document = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    assert replaced(document, rows) == f"before\n{BEGIN}\n{rows}\n{END}\nafter\n"
    assert between(replaced(document, rows)) == rows
    with pytest.raises(ValueError, match="there is no place for the table"):
        replaced("nothing here", rows)


@pytest.mark.slow
def test_what_cannot_be_run_is_told_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    claim = Claim("S9.1", "says", ("update_mode=nonsense",), lambda found: Measured("refuted", ""))
    told: list[str] = []
    with pytest.raises(CannotMeasure, match=r"python -m trainer update_mode=nonsense left no verdict: trainer: "):
        measure([claim], free=False, report=told.append)
    assert told == [command("update_mode=nonsense")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["S9"], f"no claim is called S9; there are {', '.join(claim.name for claim in CLAIMS)}"),
        (["S1.6"], "the tables are written whole: leave the names out, or add --print or --check"),
    ],
)
def test_a_name_that_there_is_none_of_is_one_line(arguments: list[str], message: str) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "claims.py"), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "100"},
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == f"claims.py: error: {message}"

"""Test results for build servers: which case passes, fails, is skipped or an error."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from report_factory import SAFE, UNSAFE, add_broken, add_run

from trainer.audit.verdict import FILE_NAME
from trainer.report import junit
from trainer.report.rows import find


def results(folder: Path) -> ElementTree.Element:
    path = folder / "results.xml"
    junit.write(find(folder), [folder], path)
    return ElementTree.parse(path).getroot()


def outcomes(folder: Path) -> dict[str, dict[str, str]]:
    """Suite -> case -> `passed` or the element in it."""
    return {
        suite.get("name", ""): {case.get("name", ""): case[0].tag if len(case) else "passed" for case in _cases(suite)}
        for suite in results(folder)
    }


def _cases(suite: ElementTree.Element) -> list[ElementTree.Element]:
    return suite.findall("testcase")


def judged(folder: Path, name: str, **fields: object) -> None:
    """Let a guarantee of the one verdict below a folder have come to something else."""
    path = next(folder.rglob(FILE_NAME))
    verdict = json.loads(path.read_text())
    next(each for each in verdict["guarantees"] if each["name"] == name).update(fields)
    path.write_text(
        json.dumps({**verdict, "verdict": "violated" if "violated" in fields.values() else verdict["verdict"]})
    )


def test_what_is_claimed_and_held_passes_and_what_is_not_claimed_is_no_case(tmp_path: Path) -> None:
    add_run(tmp_path, 0, SAFE)
    found = outcomes(tmp_path)["0_threads_locked_2"]
    assert found["verdict"] == found["no_lost_updates"] == "passed"
    assert "joint_gradient" not in found  # not applicable


def test_an_unsafe_mode_that_claims_nothing_does_not_fail(tmp_path: Path) -> None:
    add_run(tmp_path, 0, UNSAFE, kept=45)
    found = outcomes(tmp_path)["0_threads_overwrite_2"]
    assert found["verdict"] == "passed"
    assert "no_lost_updates" not in found


def test_a_violated_guarantee_is_a_failure_with_its_witness(tmp_path: Path) -> None:
    add_run(tmp_path, 0, UNSAFE, kept=45, command="python -m trainer x=1")
    judged(tmp_path, "no_lost_updates", required=True, status="violated")
    assert outcomes(tmp_path)["0_threads_overwrite_2"]["no_lost_updates"] == "failure"
    (failure,) = results(tmp_path).iter("failure")
    assert failure.get("message") == "45 of 90 updates are missing at the end"
    assert "overwritten_update: 45 of 90" in (failure.text or "")
    assert "again: python -m trainer x=1" in (failure.text or "")


def test_what_was_required_and_not_checked_is_skipped_and_says_so(tmp_path: Path) -> None:
    add_run(tmp_path, 0, SAFE)
    judged(tmp_path, "same_bits", required=True, status="not_checked", evidence="made once")
    assert outcomes(tmp_path)["0_threads_locked_2"]["same_bits"] == "skipped"
    assert [each.get("message") for each in results(tmp_path).iter("skipped")] == ["not checked: made once"]


@pytest.mark.parametrize(("fail_on", "outcome"), [("violated", "passed"), ("anomaly", "failure"), ("never", "passed")])
def test_the_verdict_fails_as_the_runs_own_fail_on_says(tmp_path: Path, fail_on: str, outcome: str) -> None:
    add_run(tmp_path, 0, UNSAFE, kept=45)
    hydra = tmp_path / "0_threads_overwrite_2" / ".hydra"
    hydra.mkdir()
    (hydra / "config.yaml").write_text(f"fail_on: {fail_on}\n")
    assert outcomes(tmp_path)["0_threads_overwrite_2"]["verdict"] == outcome


def test_a_run_that_broke_or_left_nothing_to_read_is_an_error(tmp_path: Path) -> None:
    add_broken(tmp_path, 0, "deadlock", "replica 0 waits for replica 1")
    (tmp_path / "1_x" / ".hydra").mkdir(parents=True)
    (tmp_path / "2_x").mkdir()
    (tmp_path / "2_x" / FILE_NAME).write_text("{")
    assert [list(each.values()) for each in outcomes(tmp_path).values()] == [["error"]] * 3
    assert next(results(tmp_path).iter("error")).get("message") == "deadlock: replica 0 waits for replica 1"


def test_a_refused_run_is_skipped_unless_all_are(tmp_path: Path) -> None:
    add_broken(tmp_path, 0, "refused", "no")
    assert outcomes(tmp_path)["0_mirrored_locked_2"] == {"verdict": "error"}
    add_run(tmp_path, 1, SAFE)
    assert outcomes(tmp_path)["0_mirrored_locked_2"] == {"verdict": "skipped"}


def test_the_counts_add_up(tmp_path: Path) -> None:
    add_run(tmp_path, 0, SAFE)
    add_broken(tmp_path, 1, "crash", "no")
    root = results(tmp_path)
    for holder in (root, *root):
        cases = list(holder.iter("testcase"))
        assert int(holder.get("tests", "")) == len(cases)
        for count, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
            assert int(holder.get(count, "")) == len(list(holder.iter(tag)))
    assert root.get("errors") == "1"


def test_what_no_xml_can_hold_does_not_break_the_file(tmp_path: Path) -> None:
    add_broken(tmp_path, 0, "crash", "\x1b[31m<red> & \x00 ]]> \ud800")
    assert next(results(tmp_path).iter("error")).get("message") == "crash: \ufffd[31m<red> & \ufffd ]]> \ufffd"

"""The claims of every update mode and state holder, held to every order of a small case; and the documents to that."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.config import ONE_PROCESS, Config, Search
from trainer.proofs import IN_PIECES, Proof, config_of, of_modes, of_state
from trainer.prove import Cell, Proven
from trainer.report.proofs import differences
from trainer.state.mechanisms import HOLDERS
from trainer.updates.mechanisms import COLUMNS, MODES
from trainer.workloads.small import heeds

ROOT = Path(__file__).resolve().parent.parent
LIMIT_SECONDS = 400  # a few times what it takes on two idle cores


def show(what: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-m", "trainer", "show", what, "--prove"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "100"},
        timeout=LIMIT_SECONDS,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return [line.rstrip() for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(LIMIT_SECONDS)
@pytest.mark.parametrize(
    ("what", "documents"), [("modes", ["README.md", "docs/schedules.md"]), ("state", ["docs/schedules.md"])]
)
def test_every_claim_holds_in_every_order_and_the_documents_say_so(
    what: str, documents: list[str], tmp_path: Path
) -> None:
    lines = show(what)
    tables = "\n".join(lines).split("\n\n")
    for table, document in zip(tables, documents, strict=False):
        assert f"```\n{table}\n```" in (ROOT / document).read_text()
    replays(lines, tmp_path)


def replays(lines: list[str], folder: Path) -> None:
    """The first token that the table has on one line shows what it says, by the command that it says."""
    rows = [line.split() for line in lines]
    whole = (row for row, following in itertools.pairwise(rows) if len(row) == 4 and len(following) > 1)
    case, guarantee, kind, token = next(row for row in whole if row[3].startswith("s1."))
    start = next(index for index, row in enumerate(rows) if row[:1] == [case] and "python" in row)
    words = rows[start][1:]
    for row in rows[start + 1 :]:
        if "schedule=search" in words:
            break
        words += row
    command = [word for word in words[3:] if word != "schedule=search"]
    subprocess.run(
        [
            *(sys.executable, "-m", "trainer", *command, "schedule=replay", f"schedule.token={token}"),
            *(f"hydra.run.dir={folder / 'run'}", f"require=[{guarantee}]", "fail_on=never"),
        ],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=LIMIT_SECONDS,
        check=True,
        capture_output=True,
    )
    verdict = json.loads((folder / "run" / "verdict.json").read_text())
    statuses = {each["name"]: each["status"] for each in verdict["guarantees"]}
    assert statuses[guarantee] == "violated"
    assert kind in [each["kind"] for each in verdict["anomalies"]]


def test_every_mode_and_every_holder_has_a_search() -> None:
    modes = {(proof.name, proof.strategy) for proof in of_modes() if proof.overrides[-2:] != IN_PIECES}
    hosted = {(mode.name, name) for mode in MODES.values() if mode.name != "custom" for name in mode.strategies}
    assert modes == {(mode, strategy) for mode, strategy in hosted if strategy in ONE_PROCESS}
    kept = {key: holders for key, holders in HOLDERS.items() if heeds(Config(), f"state.{key}")}
    named = {f"{key}={name}" for key, holders in kept.items() for name in holders}
    assert {proof.name for proof in of_state()} == named


def proven(name: str, **statuses: str) -> Proven:
    cells = {each: Cell(statuses.get(each, "upheld")) for each in (*COLUMNS, "samples_once")}
    return Proven(Proof(name, "threads", ()), 1, 1, None, cells)


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (proven("locked", fresh_gradients="broken", joint_gradient="not_applicable"), ""),
        (
            proven("locked", fresh_gradients="broken", joint_gradient="not_applicable", no_torn_reads="broken"),
            "update_mode=locked: no_torn_reads is broken, and the table says upheld",
        ),
        (
            proven("locked", joint_gradient="not_applicable"),
            "update_mode=locked: fresh_gradients is upheld, and the table says broken",
        ),
        (proven("cursor=sharded"), ""),
        (
            proven("cursor=shared_iterator"),
            "state.cursor=shared_iterator: samples_once is upheld, and the table says broken",
        ),
    ],
)
def test_a_claim_that_a_search_contradicts_is_told(found: Proven, told: str) -> None:
    assert differences([found]) == ([told] if told else [])


def test_a_case_is_the_configuration_that_its_command_makes() -> None:
    config = config_of(("update_mode=locked", "model=mlp", "model.hidden=[4,2]", "train.steps=3", "schedule=search"))
    assert (config.update_mode.name, config.model.hidden, config.train.steps) == ("locked", [4, 2], 3)
    assert isinstance(config.schedule, Search)
    assert config_of(()) == Config()
    assert all(re.fullmatch(r"python -m trainer( [\w.]+=\S+)+", proof.command) for proof in (*of_modes(), *of_state()))

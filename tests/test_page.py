"""`report.html`: what it says, from finished, failed and interrupted sweeps alike, and that nothing gets out of it."""

from __future__ import annotations

import html.parser
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
from report_factory import SAFE, UNSAFE, add_broken, add_run, seen

from trainer.audit.verdict import FILE_NAME, Anomaly
from trainer.report import matrix, page, planned, story
from trainer.report.groups import Group, group
from trainer.report.rows import find

HOSTILE = "</script><img src=x onerror=alert(1)>\"'&`{{ 7 * 7 }}{% raise %}"


class Parsed(html.parser.HTMLParser):
    """The page's tags and text, and which tags were closed that were not open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def parsed(folder: Path) -> Parsed:
    return Parsed(page.render(find(folder), [folder]))


def changed(folder: Path, **fields: Any) -> None:
    """Put other values into the one verdict below a folder."""
    path = next(folder.rglob(FILE_NAME))
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def groups(folder: Path) -> list[Group]:
    return group(find(folder))


def plan(folder: Path, *task: str, hydra: tuple[str, ...] = ()) -> None:
    overrides = {"task": list(task), "hydra": ["hydra.mode=MULTIRUN", *hydra]}
    sweeper = {"_target_": "hydra._internal.core_plugins.basic_sweeper.BasicSweeper", "params": None}
    (folder / planned.FILE_NAME).write_text(json.dumps({"hydra": {"overrides": overrides, "sweeper": sweeper}}))


@pytest.fixture
def hurt(tmp_path: Path) -> Path:
    """Two modes with one and two replicas and two seeds, of which one loses updates with two."""
    jobs = itertools.count()
    for seed in (0, 1):
        for replicas in (1, 2):
            add_run(tmp_path, next(jobs), SAFE, replicas=replicas, seed=seed, loss=0.25)
            kept = 45 + 9 * seed if replicas == 2 else None
            add_run(tmp_path, next(jobs), UNSAFE, replicas=replicas, seed=seed, kept=kept, loss=0.75)
    return tmp_path


def test_the_summary_says_which_mode_hurt_where_and_by_how_much_against_the_safe_one(hurt: Path) -> None:
    said, held = story.findings(groups(hurt))
    assert said.startswith(
        "`overwrite` went wrong: `overwritten_update` in 2 of 4 runs (up to 45 of 90), from 2 replicas"
    )
    assert "Updates kept: 100% with 1 replica, 55% (50% to 60%) with 2 replicas." in said
    assert said.endswith(
        "With 2 replicas, `locked` kept every update, ended at a loss of 0.25, not 0.75 and was about as fast."
    )
    assert held == "`locked` upheld everything that was checked of what it claimed; other orders were not tried."


def test_without_an_anomaly_the_summary_blames_nobody(tmp_path: Path) -> None:
    add_run(tmp_path, 0, SAFE)
    told = story.findings(groups(tmp_path))
    assert told[0] == "No run that ended by itself showed an anomaly."
    assert not any("went wrong" in each for each in told)


def test_runs_that_differ_in_more_are_not_compared(tmp_path: Path) -> None:
    add_run(tmp_path, 0, SAFE, model="cnn")
    add_run(tmp_path, 1, UNSAFE, kept=45)
    assert not any("ended at a loss" in each for each in story.findings(groups(tmp_path)))


def test_an_update_that_is_missing_is_not_rounded_away(tmp_path: Path) -> None:
    add_run(tmp_path, 0, UNSAFE, kept=89)
    path = next(tmp_path.rglob(FILE_NAME))
    verdict = json.loads(path.read_text())
    verdict["metrics"] |= {"updates_kept": 9999, "updates_expected": 10000}
    path.write_text(json.dumps(verdict))
    assert "Updates kept: 99.99% with 2 replicas." in story.findings(groups(tmp_path))[0]


def test_the_matrix_has_every_status_that_the_runs_of_a_mode_came_to(hurt: Path) -> None:
    found = matrix.matrix(groups(hurt))
    at = found.columns.index("no_lost_updates")
    cells = {line.group.name: [(part.status, part.often) for part in line.cells[at]] for line in found.lines}
    assert cells == {SAFE: [("upheld", "")], UNSAFE: [("anomaly", "2 of 4 runs"), ("not_seen", "2 of 4 runs")]}
    assert found.covers == "this run; other orders not tried"


def test_what_a_status_covers_is_said_where_runs_covered_different_things(tmp_path: Path) -> None:
    for job, mode in enumerate((SAFE, UNSAFE)):
        add_run(tmp_path, job, mode)
    path = tmp_path / "0_threads_locked_2" / FILE_NAME
    verdict = json.loads(path.read_text())
    for each in verdict["guarantees"]:
        each["covers"] = {"kind": "all_orders", "orders": 6, "preemptions": None}
    path.write_text(json.dumps(verdict))
    found = matrix.matrix(groups(tmp_path))
    assert found.covers == ""
    assert [line.covers for line in found.lines] == ["all 6 orders", "this run; other orders not tried"]
    assert "locked 1 run all 6 orders ✓ upheld" in parsed(tmp_path).text


def test_a_witness_is_that_of_the_fewest_replicas_and_stands_with_its_remedy_and_command(tmp_path: Path) -> None:
    token = "python -m trainer schedule=replay schedule.token=s1.2.x"
    for job, replicas in enumerate((4, 2)):
        torn = Anomaly("torn_tensor", 3, 9, "replica 1", f"with {replicas}\n  | a picture |", token, "hold a lock")
        add_run(tmp_path, job, UNSAFE, replicas=replicas, anomalies=[torn])
    text = parsed(tmp_path).text
    assert (
        "torn_tensor in 2 of 2 runs in run 1 3 of 9 (replica 1) witness with 2 | a picture | remedy hold a lock" in text
    )
    assert f"this very order {token}" in text


def test_a_sweep_that_was_cut_short_says_so_and_how_many_runs_are_missing(tmp_path: Path) -> None:
    add_run(tmp_path, 0, SAFE)
    add_broken(tmp_path, 1, "interrupted", "interrupted by Ctrl-C (SIGINT)")
    plan(
        tmp_path,
        "update_mode=locked,overwrite",
        "num_replicas=range(1,5)",
        "train.steps=9",
        hydra=("hydra.sweep.dir=x",),
    )
    text = parsed(tmp_path).text
    assert "6 of 8 runs are missing, since they never began; 1 of those that began did not come to its end" in text
    assert "python -m trainer -m update_mode=locked,overwrite 'num_replicas=range(1,5)' train.steps=9 Each run" in text
    assert "Run 1: interrupted: interrupted by Ctrl-C (SIGINT)" in text


@pytest.mark.parametrize(
    ("task", "jobs"),
    [(["train.steps=5"], 1), (["experiment=glob(tour_*)"], 5), (["model=choice(mlp,cnn)", "train.seed=0,1,2"], 6)],
)
def test_the_plan_is_counted_as_hydra_does(tmp_path: Path, task: list[str], jobs: int) -> None:
    plan(tmp_path, *task)
    (found,) = planned.planned([tmp_path])
    assert found.jobs == jobs


@pytest.mark.parametrize("content", ["", "hydra: 3", "{", "hydra: {overrides: {task: ['=,,='], hydra: []}}"])
def test_a_plan_that_cannot_be_read_costs_nothing_else(tmp_path: Path, content: str) -> None:
    add_run(tmp_path, 0, SAFE)
    (tmp_path / planned.FILE_NAME).write_text(content)
    assert planned.planned([tmp_path]) == []
    assert "1 run: 1 upheld." in parsed(tmp_path).text


def test_runs_that_never_ended_by_themselves_are_rows_with_their_reasons(tmp_path: Path) -> None:
    add_broken(tmp_path, 0, "refused", "update_mode=locked needs strategy=threads")
    add_broken(tmp_path, 1, "crash", "replica 1 raised ValueError: no")
    (tmp_path / "2_x" / ".hydra").mkdir(parents=True)
    (tmp_path / "3_x").mkdir()
    (tmp_path / "3_x" / FILE_NAME).write_text("{")
    text = parsed(tmp_path).text
    assert "4 runs: 1 refused, 1 broken (crash), 1 without a verdict, 1 unreadable." in text
    assert "Run 0: refused: update_mode=locked needs strategy=threads" in text
    assert "Run 1: crash: replica 1 raised ValueError: no" in text
    assert "No run that ended by itself has numbers to draw." in text


def test_replicas_off_their_precision_are_told_by_replica(tmp_path: Path) -> None:
    add_run(tmp_path, 0, SAFE)
    assert "No replica was seen to compute in another precision" in parsed(tmp_path).text
    row = {"replica": 1, "asked": "bfloat16", "computed": {"float32": 30, "bfloat16": 15}, "steps": 45, "steps_off": 30}
    changed(tmp_path, precision=[row])
    assert "1 bfloat16 float32: 30, bfloat16: 15 30 of 45" in parsed(tmp_path).text


def test_whatever_a_run_says_is_text(tmp_path: Path) -> None:
    folder = tmp_path / "<b>sweep & co"
    add_run(folder, 0, UNSAFE, kept=45, anomalies=[seen(HOSTILE, 1, 2)], model=HOSTILE, command=HOSTILE, engine=HOSTILE)
    add_run(folder, 1, UNSAFE, replicas=4, kept=45, update_mode=HOSTILE, strategy=HOSTILE)
    add_broken(folder, 2, "crash", HOSTILE)
    anomaly = {
        "kind": "x",
        "count": 1,
        "of": 2,
        "where": HOSTILE,
        "witness": f"{HOSTILE}\n{HOSTILE}",
        "remedy": HOSTILE,
    }
    changed(folder / "0_threads_overwrite_2", anomalies=[{**anomaly, "replay": HOSTILE}])
    found = parsed(folder)
    assert {tag for tag, _ in found.tags} & {"script", "img", "b", "iframe", "object", "link"} == set()
    assert not [name for _, attributes in found.tags for name in attributes if name.startswith("on")]
    assert found.text.count("{{ 7 * 7 }}") > 5
    assert "49" not in re.sub(r"\d{3,}", "", found.text)


def test_the_page_needs_nothing_but_itself(hurt: Path) -> None:
    text = page.render(find(hurt), [hurt])
    found = Parsed(text)
    policy = [each["content"] for tag, each in found.tags if each.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]
    assert not [each for _, each in found.tags for name in ("src", "href", "xlink:href") if not _inside(each.get(name))]
    # Of addresses only the names of SVG's vocabularies.
    assert set(re.findall(r"https?://[\w./]+", text)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert "@import" not in text
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text
    assert len([tag for tag, _ in found.tags if tag == "svg"]) == 1


def _inside(address: str | None) -> bool:
    return address is None or address.startswith("#")


def test_the_plot_takes_the_pages_colours(hurt: Path) -> None:
    text = page.render(find(hurt), [hurt])
    drawn = text[text.index("<svg") : text.index("</svg>")]
    assert {"var(--ink)", "var(--faint)", "var(--paper)"} == set(re.findall(r"var\(--\w+\)", drawn))
    assert "#ffffff" not in drawn
    for name in ("ink", "grey", "faint", "paper"):
        assert text.count(f"--{name}:") == 3  # light, dark, printed


def test_the_same_runs_make_the_same_page(hurt: Path) -> None:
    assert page.render(find(hurt), [hurt]) == page.render(find(hurt), [hurt])

"""The soak: what it draws, that runs of it find nothing, and that it finds what has been put there to be found."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "scripts"))

from soak import SLOW  # noqa: E402
from soaking import items, verdicts  # noqa: E402
from soaking.draw import Draw, leaves  # noqa: E402
from soaking.ended import Ended, of_refusal, of_run  # noqa: E402
from soaking.forks import Template  # noqa: E402
from soaking.growth import Growth  # noqa: E402
from soaking.places import EXAMPLES, Place  # noqa: E402
from soaking.spoil import NONSENSE, spoilt  # noqa: E402
from soaking.template import TAKEN  # noqa: E402

from trainer.config import OPTIONS, Config, Custom, Mlp, Train  # noqa: E402
from trainer.rules import validate  # noqa: E402

LIMIT_SECONDS = 300  # many times what it takes on two idle cores
HANG_SECONDS = 4.0
# Keys whose value only a user can know.
USERS = {"data.path", "schedule.token", "train.compile_cache", "workload.folder", "resume", "faults"}


@pytest.fixture
def _examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))


def soak(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "soak.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        check=False,
    )


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_every_key_is_drawn_but_those_that_only_a_user_can_know() -> None:
    draw = Draw({})
    for group, options in OPTIONS.items():
        for option in options.values():
            for leaf in leaves(replace(Config(), **{group: option})):
                assert (draw.values(leaf) is None) == (leaf.name in USERS), leaf.name


@pytest.mark.usefixtures("_examples")
def test_what_is_drawn_is_taken_by_the_rules_and_the_same_for_the_same_seed() -> None:
    first, second = Draw({}), Draw({})
    drawn = [first.drawn(number) for number in range(30)]
    assert drawn == [second.drawn(number) for number in range(30)]
    assert len({each.overrides for each in drawn}) == 30
    for each in drawn:
        assert not each.raised
        validate(each.config)
    names = {override.partition("=")[0] for each in drawn for override in each.overrides}
    assert len(names) > 40


@pytest.mark.slow
@pytest.mark.timeout(LIMIT_SECONDS)
def test_a_short_soak_finds_nothing(tmp_path: Path) -> None:
    done = soak("--seed", "3", "--runs", "40", "--quick", "--kinds", "short,taken,refused", "--out", str(tmp_path))
    assert (done.returncode, [row for row in rows(tmp_path) if row["findings"]]) == (0, [])
    assert len(rows(tmp_path)) == 40
    # Of items in which nothing was found nothing is left.
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.isdecimal()) == []


@pytest.mark.slow
@pytest.mark.timeout(LIMIT_SECONDS)
@pytest.mark.usefixtures("_examples")
def test_a_run_that_is_killed_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # While it imports: at any later moment it may be done before.
    monkeypatch.setattr(items, "EARLY", 1.0)
    own = items.Items(0, Draw({}, SLOW), LIMIT_SECONDS / 2)
    try:
        row = own.do(0, "kill", Place.made(tmp_path / "place", tmp_path / "cache"))
    finally:
        own.close()
    assert (row.findings, row.killed, row.status) == ([], True, 3)


@pytest.mark.slow
@pytest.mark.timeout(LIMIT_SECONDS)
def test_ctrl_c_ends_a_soak_with_its_summary(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "soak.py"), "--kinds", "taken", "--out", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not (tmp_path / "log.jsonl").exists() or not rows(tmp_path):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "taken" in output


@pytest.fixture(scope="module")
def template() -> Iterator[Template]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        patch.syspath_prepend(str(Path(__file__).parent))
        found = Template("threads")
        yield found
        found.close()


@pytest.mark.slow
@pytest.mark.timeout(LIMIT_SECONDS)
@pytest.mark.parametrize(
    ("name", "finding"),
    [
        ("nothing", ""),
        ("a_thread", "leak: thread left: forgotten"),
        ("a_process", "leak: child process left: sleep 60"),
        ("an_open_file", "leak: file left open: "),
        ("a_temporary_file", "leak: temporary file left behind: tmp/"),
        ("a_crash", "broken: crash: ArithmeticError: broken on purpose"),
        ("a_sudden_end", "no verdict.json"),
        ("a_hang", "hang: not done after "),
    ],
)
def test_what_a_run_leaves_is_found(template: Template, tmp_path: Path, name: str, finding: str) -> None:
    place = Place.made(tmp_path / "place", tmp_path / "cache")
    config = Config(data=Custom(_target_=f"leaky.{name}"), model=Mlp(hidden=[4]), train=Train(steps=2, batch_size=4))
    limit = HANG_SECONDS if name == "a_hang" else LIMIT_SECONDS / 2
    ended = template.run(config, place, limit, "")
    found = list(of_run(ended, place, config))
    assert any(each.startswith(finding) for each in found) if finding else found == [], found


@pytest.fixture(scope="module")
def verdict(template: Template, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Config]:
    """A run's folder and its configuration."""
    place = Place.made(tmp_path_factory.mktemp("verdict"), tmp_path_factory.mktemp("cache"))
    config = Config(data=Custom(_target_="leaky.nothing"), model=Mlp(hidden=[4]), train=Train(steps=2, batch_size=4))
    ended = template.run(config, place, LIMIT_SECONDS / 2, "")
    assert (ended.status, verdicts.problems(place.run, config, 0)) == (0, [])
    return place.run, config


@pytest.mark.slow
@pytest.mark.timeout(LIMIT_SECONDS)
@pytest.mark.parametrize(
    ("old", "new", "finding"),
    [
        ('"verdict": "upheld"', '"verdict": "anomaly"', "exit status 0"),
        ('"verdict": "upheld"', '"verdict": "good"', "verdict.json.verdict is 'good'"),
        ('"status": "upheld"', '"status": "violated"', "claimed and violated"),
        ('"updates_kept": 4', '"updates_kept": 5', "updates_kept is 5 of 4"),
        ('"updates_kept": 4', '"updates_kept": NaN', "NaN is no JSON"),
        ('"final_parameters_sha256": "', '"final_parameters_sha256": "x', "final_parameters_sha256 is 'x"),
        ('"schema": 1,', '"schema": 1, "more": 2,', "'more'"),
        ('"seed": 0', '"seed": 1', "run.seed is 1 and not 0"),
    ],
)
def test_a_verdict_that_cannot_be_is_found(
    verdict: tuple[Path, Config], tmp_path: Path, old: str, new: str, finding: str
) -> None:
    folder, config = verdict
    text = (folder / "verdict.json").read_text()
    assert old in text
    (tmp_path / "verdict.json").write_text(text.replace(old, new, 1))
    config = replace(config, fail_on="anomaly") if finding.startswith("exit") else config
    assert any(finding in each for each in verdicts.problems(tmp_path, config, 0))


@pytest.mark.parametrize(
    ("ended", "finding"),
    [
        (Ended(2, 1.0, "itself", "", "trainer: no.\n"), ""),
        (Ended(TAKEN, 1.0, "itself", "", ""), "accepted"),
        (Ended(2, 1.0, "itself", "", "Traceback (most recent call last):\nKeyError: 1\n"), "traceback: KeyError: 1"),
        (Ended(2, 1.0, "itself", "", "trainer: a\nb\n"), "refused in 2 lines"),
        (Ended(3, 1.0, "itself", "", "trainer: no.\n"), "refused with status 3"),
        (Ended(2, 1.0, "itself", "something", "trainer: no.\n"), "refused, and on standard output"),
        (Ended(-6, 9.0, "ended", "", ""), "hang"),
    ],
)
def test_a_refusal_that_is_none_is_found(tmp_path: Path, ended: Ended, finding: str) -> None:
    place = Place.made(tmp_path, tmp_path / "cache")
    found = list(of_refusal(ended, place, True, TAKEN))
    assert [each[: len(finding)] for each in found] == ([finding] if finding else [])
    (place.here / "outputs").mkdir()
    assert ("refused, and left behind: outputs" in list(of_refusal(ended, place, True, TAKEN))) == (ended.status == 2)


@pytest.mark.slow
@pytest.mark.timeout(LIMIT_SECONDS)
def test_a_command_is_given_in_a_fork_as_on_the_command_line(tmp_path: Path) -> None:
    template = Template("command")
    try:
        for number, (arguments, status) in enumerate(
            [((b"train.steps=3",), TAKEN), ((b"train.steps=no",), 2), ((b"train.steps=\xff",), 2), ((b"--nothing",), 2)]
        ):
            place = Place.made(tmp_path / str(number), tmp_path / "cache")
            ended = template.command(list(arguments), place, LIMIT_SECONDS / 2)
            assert ended.status == status
            assert list(of_refusal(ended, place, status == 2, TAKEN)) == []
            # Its twin: what is taken where it ought to be refused.
            assert (list(of_refusal(ended, place, True, TAKEN)) == ["accepted"]) == (status == TAKEN)
    finally:
        template.close()


@pytest.mark.usefixtures("_examples")
def test_mistakes_are_of_many_kinds() -> None:
    draw, chance = Draw({}), random.Random(0)
    one, other = draw.drawn(1), draw.drawn(2)
    found = [spoilt(draw, one, other, chance) for _ in range(150)]
    assert len({each.arguments for each in found}) > 125
    assert {each.refused for each in found} == {True, False}
    assert sum(each.how.startswith("nonsense") for each in found) > 4
    assert len(set(NONSENSE)) == len(NONSENSE)


LEAKS = "import os, time\nkept = []\nfor _ in range(40):\n    {}\n    time.sleep(0.05)"


@pytest.mark.parametrize(
    ("does", "what"),
    [
        ("pass", ""),
        ("kept.append(os.dup(0))", "descriptors"),
        ("kept.append(b'x' * 2**22)", "bytes"),
        ("import threading; threading.Thread(target=time.sleep, args=(9,), daemon=True).start()", "threads"),
    ],
)
def test_a_process_that_grows_is_found(does: str, what: str) -> None:
    with subprocess.Popen([sys.executable, "-c", LEAKS.format(does)]) as process:
        with Growth(process.pid, 0.05) as growth:
            process.wait(60)
        found = list(growth.problems())
    assert [each.split()[1] for each in found] == ([what] if what else [])

"""The trainer from Python, in processes of its own, and what real runs leave for those who compare and report them."""

from __future__ import annotations

import os
import pkgutil
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from xml.etree import ElementTree

import pytest
from command import ROOT, WAIT_SECONDS
from report_factory import SAFE, UNSAFE, add_broken, add_run

import trainer
from trainer import api
from trainer.api import RunVerdict, Sweep, read_verdict
from trainer.audit.read import Unreadable
from trainer.audit.verdict import FILE_NAME
from trainer.config import ConfigError
from trainer.report import junit
from trainer.report.compare import HISTORY, compare
from trainer.report.rows import find

EXAMPLE = ROOT / "scripts" / "examples"


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """Two seeds of one run and a mode that its strategy cannot host, in a folder with an odd name."""
    folder = tmp_path_factory.mktemp("api") / "it's a, sweep = [x]"
    overrides = ("train.steps=12", "audit=full", "train.seed=0,1", "update_mode=all_reduce,unreduced")
    return api.sweep(*overrides, folder=folder)


@pytest.fixture
def again(real: Sweep, tmp_path_factory: pytest.TempPathFactory) -> RunVerdict:
    """The first of them again."""
    return api.run("train.steps=12", "audit=full", folder=tmp_path_factory.mktemp("again") / "run")


def python(folder: Path, program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=WAIT_SECONDS,
        check=True,
    )


def test_importing_it_loads_nothing_that_a_run_needs(tmp_path: Path) -> None:
    program = (
        "import sys, trainer; before = len([n for n in sys.modules if n.startswith('trainer.')]); "
        "from trainer import ConfigError, RunVerdict, Sweep, TrainerError, read_verdict, run, sweep; "
        "heavy = {'torch', 'tensorflow', 'keras', 'numpy', 'hydra', 'omegaconf', 'rich', 'matplotlib', 'jinja2'}; "
        "print(before, sorted(heavy & set(sys.modules)), run.__module__, sweep.__module__)"
    )
    assert python(tmp_path, program).stdout == "0 [] trainer.api trainer.api\n"
    assert (ROOT / "trainer" / "py.typed").exists()


def test_no_module_stands_in_a_functions_place() -> None:
    assert {"run", "sweep"} <= set(trainer.__all__)
    assert not {module.name for module in pkgutil.iter_modules(trainer.__path__)} & set(trainer.__all__)


def test_a_verdict_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    add_run(tmp_path, 0, UNSAFE, kept=45)
    (folder,) = tmp_path.iterdir()
    verdict = read_verdict(folder)
    assert verdict.to_json() == (folder / FILE_NAME).read_text()
    assert (verdict.verdict, verdict.folder) == ("anomaly", folder)
    assert verdict.guarantee("no_lost_updates").status == "anomaly"
    assert verdict.anomalies[0].kind == "overwritten_update"
    assert verdict.metrics["updates_kept"] == 45
    assert verdict.error is None
    assert "folder" not in asdict(verdict)


def test_ok_is_the_exit_status(tmp_path: Path) -> None:
    add_run(tmp_path, 0, UNSAFE, kept=45)
    add_broken(tmp_path, 1, "crash", "no")
    anomaly, broken = (read_verdict(folder) for folder in sorted(tmp_path.iterdir()))
    assert [anomaly.ok(fail_on) for fail_on in api.FAIL_ON] == [True, False, False, True]
    assert not any(broken.ok(fail_on) for fail_on in api.FAIL_ON)
    with pytest.raises(
        ValueError, match="fail_on must be one of violated, anomaly, inconclusive, never; got 'anomlay'"
    ):
        anomaly.ok("anomlay")


def test_a_failed_assertion_says_why_on_one_line(tmp_path: Path) -> None:
    add_run(tmp_path, 0, UNSAFE, kept=45)
    add_broken(tmp_path, 1, "crash", "replica 1 raised\nstacks")
    anomaly, broken = (read_verdict(folder) for folder in sorted(tmp_path.iterdir()))
    assert repr(anomaly) == f"<anomaly: threads overwrite x2; overwritten_update 45 of 90; {anomaly.folder}>"
    assert repr(broken) == f"<broken: mirrored locked x2; crash: replica 1 raised; {broken.folder}>"


def test_a_guarantee_that_there_is_none_of_is_named(tmp_path: Path) -> None:
    add_run(tmp_path, 0, SAFE)
    with pytest.raises(KeyError, match=r"'no_lost_update' is no guarantee of this verdict. It has no_lost_updates, "):
        read_verdict(next(tmp_path.iterdir())).guarantee("no_lost_update")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is not there; give a run's folder."),
        ("{", "cannot be read: Expecting property name"),
        ("[]", "cannot be read: it holds no verdict."),
        ('{"schema": 2}', "cannot be read: its schema is 2; this version reads 1."),
        ('{"schema": 1, "verdict": "fine", "run": {}}', "cannot be read: verdict.verdict is 'fine'."),
        ('{"schema": 1, "verdict": "upheld"}', "cannot be read: verdict has no 'run'."),
        (
            '{"schema": 1, "verdict": "upheld", "run": {}, "guarantees": 3}',
            "cannot be read: guarantees is 3, not a list.",
        ),
        (
            '{"schema": 1, "verdict": "upheld", "run": {}, "anomalies": [{"kind": "x", "count": true}]}',
            "cannot be read: anomaly.count is True.",
        ),
    ],
)
def test_what_is_no_verdict_is_told_on_one_line(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / FILE_NAME).write_text(content)
    with pytest.raises(Unreadable) as caught:
        read_verdict(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / FILE_NAME} {message}")
    assert "\n" not in str(caught.value)


def test_keys_of_a_later_version_are_left_out(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text('{"schema": 1, "verdict": "upheld", "run": {}, "more": 1, "error": null}')
    assert read_verdict(tmp_path).verdict == "upheld"


@pytest.mark.parametrize(
    ("do", "overrides", "message"),
    [
        (api.run, ["update_mode=lockd"], "update_mode must be one of all_reduce, "),
        (api.run, ["num_replicas=0"], "num_replicas must be between 1 and 64; got 0."),
        (api.run, ["num_replicas=1,2"], "num_replicas=1,2 is a sweep: "),
        (api.run, ["--multirun"], "--multirun cannot be read: there is no '=' in it. Write KEY=VALUE."),
        (api.run, ["hydra.run.dir=x"], "hydra.run.dir is the argument folder here: folder='x'."),
        (api.sweep, ["num_replicas=0,65"], ""),
        (api.sweep, ["model=cnnn,mlp"], "model must be one of "),
    ],
)
def test_a_mistake_is_the_command_lines_own_message(
    tmp_path: Path, do: Callable[..., object], overrides: list[str], message: str
) -> None:
    if not message:
        # Each for a reason of its own: that is a sweep of refused runs.
        found = do(*overrides, folder=tmp_path / "here")
        assert isinstance(found, Sweep)
        assert [each.error.kind for each in found.verdicts if each.error] == ["refused", "refused"]
        assert not found.ok()
        return
    with pytest.raises(ConfigError) as caught:
        do(*overrides, folder=tmp_path / "here")
    assert str(caught.value).startswith(message)
    assert not (tmp_path / "here").exists()


def test_a_folder_that_holds_a_run_is_refused_and_its_verdict_is_not_taken_for_this_runs(tmp_path: Path) -> None:
    add_run(tmp_path, 0, SAFE)
    (folder,) = tmp_path.iterdir()
    with pytest.raises(ConfigError, match="already holds a run"):
        api.run(folder=folder)
    with pytest.raises(ConfigError, match="already holds a run"):
        api.sweep("train.seed=0,1", folder=tmp_path)


@pytest.mark.slow
def test_a_sweep_returns_every_verdict_refused_ones_included(real: Sweep) -> None:
    assert [each.verdict for each in real.verdicts] == ["upheld", "broken", "upheld", "broken"]
    assert [each.run["seed"] for each in real.verdicts] == [0, 0, 1, 1]
    assert real.ok()
    assert {"sweep.csv", "sweep.png", "report.html"} <= {path.name for path in real.folder.iterdir()}


@pytest.mark.slow
def test_the_same_seed_is_the_same_run_and_another_parts_at_the_first_step(real: Sweep, again: RunVerdict) -> None:
    first, _, other, _ = (each.folder for each in real.verdicts)
    same = compare(first, again.folder)
    assert same.same, same
    assert {each.source for each in same.partings if each.name.startswith("train/loss/")} == {HISTORY}
    found = compare(first, other)
    assert found.config == {"train.seed": ("0", "1")}
    assert not found.same
    parted = [each for each in found.partings if each.first == 0]
    assert {"train/loss/replica_0", "train/loss/replica_1"} <= {each.name for each in parted}


@pytest.mark.slow
def test_real_runs_are_test_results(real: Sweep, tmp_path: Path) -> None:
    junit.write(find(real.folder), [real.folder], tmp_path / "results.xml")
    root = ElementTree.parse(tmp_path / "results.xml").getroot()
    assert [suite.get("name") for suite in root] == [each.folder.name for each in real.verdicts]
    assert (root.get("failures"), root.get("errors")) == ("0", "0")
    assert [case.get("name") for case in root[1].findall("testcase")] == ["verdict"]
    assert root[1].find("testcase/skipped") is not None


@pytest.mark.slow
def test_an_interruption_ends_the_run_which_has_its_verdict(tmp_path: Path) -> None:
    program = (
        "from trainer import run\n"
        "try:\n    run('train.steps=1000000', folder='run')\n"
        "except KeyboardInterrupt:\n    print('interrupted')\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + WAIT_SECONDS
        # Its run has been handed over by then.
        while not (tmp_path / "run" / "console.log").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=WAIT_SECONDS)
    finally:
        process.kill()
        process.wait()
    assert output == "interrupted\n"
    error = read_verdict(tmp_path / "run").error
    assert error is not None
    assert error.kind == "interrupted"


@pytest.mark.slow
@pytest.mark.parametrize("test", ["test_my_mode_loses_no_update", "test_this_test_can_fail"])
def test_the_example_holds_a_mode_of_ones_own_to_its_guarantees(tmp_path: Path, test: str) -> None:
    for name in ("test_update_mode.py", "bring_update_mode.py"):
        shutil.copy(EXAMPLE / name, tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"test_update_mode.py::{test}"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=WAIT_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout

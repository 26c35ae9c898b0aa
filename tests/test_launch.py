"""What becomes of a run's process: signals, a parent that dies, a process that is killed, time that is up."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import Command, Running, verdict
from tensorboard.compat.tensorflow_stub import errors
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import PyRecordReader_New

from trainer import child, imports, stop
from trainer.audit.verdict import Error
from trainer.config import Config, Custom, Mlp
from trainer.folders import claim, settle, status_of
from trainer.stop import Stop

# Everything has stopped within this.
STOP_SECONDS = 2.0
ENDLESS = "train.steps=10000000"
MESSAGES = {signal.SIGINT: "interrupted by Ctrl-C (SIGINT)", signal.SIGTERM: "terminated (SIGTERM)"}


def assert_interrupted(folder: Path, message: str) -> None:
    found = verdict(folder)
    assert found["verdict"] == "broken"
    assert (found["error"]["kind"], found["error"]["message"]) == ("interrupted", message)


def records(event_file: Path) -> int:
    """Whole records with right checksums, by TensorBoard's own reader."""
    reader = PyRecordReader_New(str(event_file))
    found = 0
    while True:
        try:
            reader.GetNext()
        except errors.OutOfRangeError:
            return found
        found += 1


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "number"), [("threads", signal.SIGINT), ("mirrored", signal.SIGTERM)])
def test_a_signal_ends_a_run_with_a_verdict(command: Command, strategy: str, number: signal.Signals) -> None:
    running = command.start(f"strategy={strategy}", ENDLESS, "hydra.run.dir=run")
    (run,) = running.wait_for(running.training)
    ended = running.end_by(number)
    assert ended.status == 128 + number
    assert ended.left == []
    assert ended.seconds < STOP_SECONDS
    assert_interrupted(run, MESSAGES[number])
    assert verdict(run)["error"]["step"] > 0
    assert f"trainer: {MESSAGES[number]}." in ended.errors
    (event_file,) = run.glob("events.out.tfevents.*")
    assert records(event_file) > 2


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["threads", "mirrored"])
def test_a_signal_while_the_framework_is_imported_ends_the_run(command: Command, strategy: str) -> None:
    running = command.start(f"strategy={strategy}", ENDLESS, "hydra.run.dir=run")
    # Python and this package alone are not as large.
    running.wait_for(lambda: [run for run in running.runs() if run.memory_info().rss > 80 * 2**20])
    ended = running.end_by(signal.SIGINT, group=True)
    assert ended.status == 130
    assert ended.left == []
    assert ended.seconds < STOP_SECONDS
    assert_interrupted(command.folder / "run", MESSAGES[signal.SIGINT])


@pytest.mark.slow
def test_a_run_ends_when_its_parent_is_killed(command: Command) -> None:
    running = command.start(ENDLESS, "hydra.run.dir=run")
    (run,) = running.wait_for(running.training)
    ended = running.end_by(signal.SIGKILL)
    assert ended.left == []
    assert ended.seconds < STOP_SECONDS
    assert_interrupted(run, "parent process ended")


def joblib_sweep(command: Command) -> Running:
    """Four endless runs, two of them at a time, which have begun to train."""
    launcher = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.sweep.dir=sweep"]
    running = command.start("-m", "num_replicas=1,2", "update_mode=locked,all_reduce", ENDLESS, *launcher)
    running.wait_for(lambda: len(running.training()) == 2)
    return running


@pytest.mark.slow
@pytest.mark.parametrize(("number", "group"), [(signal.SIGINT, True), (signal.SIGTERM, False)])
def test_a_signal_ends_a_sweep_under_joblib(command: Command, number: signal.Signals, group: bool) -> None:
    running = joblib_sweep(command)
    began = running.training()
    ended = running.end_by(number, group=group)
    assert ended.status == 128 + number
    assert ended.left == []
    assert ended.seconds < STOP_SECONDS
    for run in began:
        assert_interrupted(run, MESSAGES[number])
    # None of the others was begun, and the table has those that were.
    assert sorted(run.parent for run in running.folder.rglob("verdict.json")) == sorted(began)
    assert "tensorboard --logdir sweep" in ended.output


@pytest.mark.slow
def test_nothing_is_left_of_a_sweep_under_joblib_that_is_killed(command: Command) -> None:
    running = joblib_sweep(command)
    began = running.training()
    ended = running.end_by(signal.SIGKILL)
    assert ended.left == []
    assert ended.seconds < STOP_SECONDS
    for run in began:
        assert_interrupted(run, "parent process ended")


@pytest.mark.slow
def test_a_sweep_whose_worker_is_killed_says_so_and_has_a_verdict_for_every_run(command: Command) -> None:
    running = joblib_sweep(command)
    began = running.training()
    running.runs()[0].parent().kill()
    output, errors_ = running.process.communicate(timeout=20)
    assert running.process.returncode == 3
    assert "trainer: a worker process of hydra/launcher=joblib was killed, and the others with it.\n" in errors_
    assert "Traceback" not in errors_
    assert {verdict(run)["error"]["kind"] for run in began} <= {"killed", "interrupted"}
    assert "tensorboard --logdir sweep" in output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "kind", "message"),
    [
        (signal.SIGKILL, "killed", "killed by SIGKILL, which is what the system does when memory runs out"),
        (signal.SIGSEGV, "crash", "ended by SIGSEGV; console.log has the stack of every thread"),
    ],
)
def test_a_run_that_is_gone_without_a_word_has_its_verdict_from_its_parent(
    command: Command, number: signal.Signals, kind: str, message: str
) -> None:
    running = command.start(ENDLESS, "hydra.run.dir=run")
    running.wait_for(running.runs)[0].send_signal(number)
    _, errors_ = running.process.communicate(timeout=20)
    assert running.process.returncode == 3
    assert errors_ == f"trainer: run is broken: {kind}: {message}\n"
    found = verdict(command.folder / "run")
    assert (found["verdict"], found["error"]["kind"]) == ("broken", kind)
    assert found["run"]["num_replicas"] == 2


@pytest.mark.slow
def test_a_run_whose_time_is_up_is_ended(command: Command) -> None:
    done = command(ENDLESS, "hydra.run.dir=run", "train.timeout_seconds=1")
    assert done.returncode == 3
    assert verdict(command.folder / "run")["error"]["kind"] == "timeout"
    assert done.stderr == "trainer: run is broken: timeout: not done after train.timeout_seconds=1\n"


def test_a_child_that_finds_other_packages_than_ours_says_which(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    child._check_packages()
    monkeypatch.setattr(child, "ROOT", tmp_path)
    with pytest.raises(ImportError, match=r"^package 'models' is .*/models/__init__\.py, not the trainer's own "):
        child._check_packages()


def test_a_child_without_a_request_leaves_no_process(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "trainer.child", str(tmp_path)], input=b"", capture_output=True, timeout=20, check=False
    )
    assert done.returncode != 0


@pytest.fixture
def _handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in stop.REASONS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("_handlers")
@pytest.mark.parametrize("end", ["pipe", "signal"])
def test_stop_is_raised_once_and_calls_too_late(monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    monkeypatch.setattr(stop, "PATIENCE_SECONDS", 0.0)
    reading, writing = os.pipe()
    flag, late = Stop(), threading.Event()
    flag.listen(reading, late.set)
    assert not flag.is_set()
    if end == "pipe":
        os.close(writing)
        reason, status = "parent process ended", 143
    else:
        os.kill(os.getpid(), signal.SIGINT)
        reason, status = MESSAGES[signal.SIGINT], 130
    assert late.wait(5)
    assert (flag.reason, flag.status) == (reason, status)
    flag.set("something else", 1)
    assert (flag.reason, flag.status) == (reason, status)


@pytest.mark.parametrize("own", [False, True])
def test_what_keras_takes_along_is_left_out_where_no_user_brings_code(
    own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(imports, "TAKEN_ALONG", ("colorsys",))
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    with imports.frameworks(Config(model=Custom(_target_="mine.build") if own else Mlp())):
        assert not gc.isenabled()
        assert (importlib.util.find_spec("colorsys") is not None) if own else sys.modules["colorsys"] is None
        if not own:
            with pytest.raises(ImportError, match="colorsys"):
                importlib.import_module("colorsys")
    assert gc.isenabled()
    assert importlib.import_module("colorsys").__name__ == "colorsys"


def test_settle_keeps_a_verdict_that_is_there(tmp_path: Path) -> None:
    assert settle(Config(), tmp_path, "python -m trainer", Error("timeout", "first"))
    assert not settle(Config(), tmp_path, "python -m trainer", Error("crash", "second"))
    assert verdict(tmp_path)["error"]["message"] == "first"
    assert status_of(tmp_path, "never") == 3


def test_of_two_claims_to_one_folder_one_is_refused(tmp_path: Path) -> None:
    claim(tmp_path / "run", "hydra.run.dir")
    (tmp_path / "run" / ".hydra").mkdir()
    with pytest.raises(ValueError, match=r"run already holds a run \(\.hydra\)"):
        claim(tmp_path / "run", "hydra.run.dir")
    # An empty folder that the user made is as good as none, and runs beside it are no hindrance.
    (tmp_path / "mine").mkdir()
    claim(tmp_path / "mine", "hydra.run.dir")
    claim(tmp_path, "hydra.run.dir")

"""Runs that never come to their end: found, told with who holds and who waits for which lock, and ended."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from command import Command, verdict

from trainer.config import Config, Custom, Linear, Train, Watchdog
from trainer.one_run import empty_record
from trainer.pulse import Pulse
from trainer.strategies.hosting import RunBroken

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")  # Keras' own
DEADLOCKS = Path(__file__).with_name("deadlocks.py")
WAIT = 30.0


def line_of(text: str) -> int:
    lines = DEADLOCKS.read_text(encoding="utf-8").splitlines()
    return 1 + next(at for at, line in enumerate(lines) if text in line)


FIRST, SECOND = (f"{name} (deadlocks.py:{line_of(f'self.{name} =')})" for name in ("first", "second"))


def train(mode: str, *, steps: int = 3, seconds: float = 0.5) -> RunBroken | None:
    """Train with a mode of `deadlocks.py` in this process, and return what broke the run."""
    from train_all import Nobody

    from trainer.strategies import threads
    from trainer.workloads.train import Training

    config = Config(
        update_mode=Custom(_target_=f"deadlocks.{mode}"),
        model=Linear(),
        train=Train(steps=steps, batch_size=4),
        watchdog=Watchdog(seconds),
    )
    training, record = Training(config), empty_record(config)
    record.layout, record.initial = training.layout, training.initial
    try:
        threads.train(config, training, record, Nobody(), threading.Event())
    except RunBroken as broken:
        return broken
    return None


@pytest.mark.parametrize(
    ("mode", "steps", "told"),
    [
        ("Twice", 3, {f"replica {own} waits for {FIRST}, which it holds itself" for own in range(2)}),
        (
            "Kept",
            1,
            {f"replica {own} waits for {FIRST}, which replica {1 - own} holds and is through" for own in (0, 1)},
        ),
    ],
)
def test_a_lock_that_is_never_given_back_is_told_with_its_holder(mode: str, steps: int, told: set[str]) -> None:
    # Nobody waits for the watchdog: what all replicas are stuck at is certain.
    broken = train(mode, steps=steps, seconds=WAIT)
    assert broken is not None
    assert broken.kind == "deadlock"
    first, held = broken.message.split("\n", 1)
    assert any(first.startswith(each) for each in told), first
    assert f"acquired {FIRST} at" in held
    assert "deadlocks.py" in held


def test_locks_taken_in_opposite_orders_are_told_as_a_cycle() -> None:
    broken = train("Opposite", seconds=WAIT)
    assert broken is not None
    first = broken.message.split("\n", 1)[0]
    assert f"replica 1 waits for {SECOND}, which replica 0 holds" in first
    assert f"replica 0 waits for {FIRST}, which replica 1 holds" in first


def test_a_wait_without_a_lock_is_told_by_its_line() -> None:
    broken = train("Unset")
    assert broken is not None
    line = line_of("self.never.wait()")
    assert broken.message.startswith("no replica finished a step for 0.5 s (watchdog.seconds): ")
    assert f"deadlocks.py:{line} in step" in broken.message
    assert f"waits for {FIRST}, which replica " in broken.message


@pytest.mark.parametrize("mode", ["Monitor", "Ring"])
def test_locks_that_are_used_rightly_are_no_deadlock(mode: str) -> None:
    assert train(mode, steps=40, seconds=WAIT) is None
    assert threading.Lock is not None
    assert type(threading.Lock()).__module__ == "_thread"  # as it was before


CHILD = """
import os, sys, time, signal, faulthandler
faulthandler.enable()
from trainer.pulse import beat
beat(int(sys.argv[1]))
print("beats", flush=True)
exec(sys.stdin.readline())
"""


def child(what: str, seconds: float) -> tuple[Pulse, int, str]:
    """A process that beats and does something, and how it ended: its pulse, its status and what it wrote."""
    pulse = Pulse(seconds, "a while")
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(pulse.fd)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        pass_fds=[pulse.fd],
        start_new_session=True,
    )
    pulse.watch(process)
    assert process.stdout is not None
    assert process.stdout.readline() == "beats\n"
    _, errors = process.communicate(what + "\n", timeout=WAIT)
    return pulse, process.returncode, errors


def test_a_process_whose_python_stands_still_is_ended_with_its_stacks() -> None:
    pulse, status, errors = child("import ctypes; ctypes.PyDLL(None).sleep(600)", 1.5)
    assert pulse.error is not None
    assert pulse.error.kind == "deadlock"
    assert pulse.error.message.startswith("no sign of life for a while: no thread of it could run Python")
    assert status == -signal.SIGABRT
    assert "most recent call first" in errors


def test_a_stopped_process_is_ended_and_told_as_such() -> None:
    pulse, status, _ = child("os.kill(os.getpid(), signal.SIGSTOP)", 1.5)
    assert pulse.error is not None
    assert "it was stopped (SIGSTOP)" in pulse.error.message
    assert status in (-signal.SIGABRT, -signal.SIGKILL)


def test_a_process_that_beats_is_left_alone_whatever_it_takes() -> None:
    pulse, status, _ = child("time.sleep(6)", 1.5)
    assert pulse.error is None
    assert status == 0


# Whole runs.


def run(command: Command, *arguments: str) -> dict[str, Any]:
    shutil.copy(DEADLOCKS, command.folder)
    ended = command("model=linear", "train.steps=8", "hydra.run.dir=run", *arguments)
    assert ended.returncode == 3, ended.stdout + ended.stderr
    found = verdict(command.folder / "run")
    assert found["verdict"] == "broken"
    return found


@pytest.mark.slow
def test_a_deadlock_in_a_users_mode_exits_3_with_every_stack(command: Command) -> None:
    found = run(command, "update_mode._target_=deadlocks.Opposite", "watchdog.seconds=30")
    assert found["error"]["kind"] == "deadlock"
    log = (command.folder / "run" / "console.log").read_text(encoding="utf-8")
    assert "which replica 0 holds" in log
    assert log.count("most recent call first") >= 3  # main's and both replicas'


@pytest.mark.slow
def test_a_users_mode_that_keeps_the_interpreter_exits_3(command: Command) -> None:
    found = run(command, "update_mode._target_=deadlocks.HoldsTheInterpreter", "watchdog.seconds=1")
    assert found["error"]["message"].startswith("no sign of life for 1 + 10 s (watchdog.seconds): no thread of it")
    assert "deadlocks.py" in (command.folder / "run" / "console.log").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["threads", "mirrored"])
def test_a_replica_that_hangs_is_found(command: Command, strategy: str) -> None:
    found = run(command, f"strategy={strategy}", "faults=[hang:1:3]", "watchdog.seconds=2")
    assert (found["error"]["kind"], found["error"]["step"]) == ("deadlock", 3)
    assert "trainer/faults.py:" in found["error"]["message"]


def test_this_file_knows_its_modes() -> None:
    assert os.path.basename(DEADLOCKS) == "deadlocks.py"
    assert FIRST != SECOND

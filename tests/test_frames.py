"""Looking at where threads are must not run the garbage collector, which hangs in there."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import pytest
from command import ROOT

# The collector runs at one allocation after the other, and finds a ring with a threading.local in it.
PROGRAM = """
import faulthandler, gc, sys, threading
from trainer.frames import frames
from trainer.workloads.counter.bytecode import Waits

class Ring:
    pass

look = {look}
look()

def ring_then_look(allocations):
    gc.collect()
    gc.set_threshold(allocations)
    ring = Ring()
    ring.itself, ring.local = ring, threading.local()
    ring.local.value = 1
    del ring
    look()

faulthandler.dump_traceback_later({seconds}, exit=True)
for allocations in range(1, 200):
    ring_then_look(allocations)
print("looked")
"""


def looked(look: str, seconds: float) -> subprocess.CompletedProcess[str]:
    """Look again and again, and give up after so many seconds."""
    program = PROGRAM.format(look=look, seconds=seconds)
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=50)


@pytest.mark.slow
@pytest.mark.parametrize("look", ["frames", "Waits().look"])
def test_looking_does_not_hang_in_the_collector(look: str) -> None:
    done = looked(look, 30)
    assert (done.returncode, done.stdout) == (0, "looked\n"), done.stderr


@pytest.mark.slow
def test_python_itself_hangs_so_that_the_test_above_can_fail() -> None:
    done = looked("sys._current_frames", 2)
    assert (done.returncode, done.stdout) == (1, "")
    assert "Timeout" in done.stderr


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_left_as_it_was(enabled: bool) -> None:
    from trainer.frames import collector_off

    assert gc.isenabled()
    try:
        if not enabled:
            gc.disable()
        with collector_off():
            assert not gc.isenabled()
        assert gc.isenabled() == enabled
    finally:
        gc.enable()


def test_nobody_asks_python_for_frames_in_another_way() -> None:
    asking = {path.name for path in Path(ROOT / "trainer").rglob("*.py") if "sys._current_frames" in path.read_text()}
    assert asking == {"frames.py", "bytecode.py"}

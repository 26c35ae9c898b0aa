"""`scripts/extrapolate.py`: queues of which the answer is known, what is kept and lost, and a real run's profile."""

from __future__ import annotations

import csv
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

pytest.importorskip("simpy", reason="the extra 'scripts' is not installed: no simpy")

import extrapolate  # noqa: E402
from extrapolation import check, pieces  # noqa: E402
from extrapolation.group import PARTS  # noqa: E402
from extrapolation.modes import LOSING, MODES, NOT_TOLD  # noqa: E402
from extrapolation.network import Network  # noqa: E402
from extrapolation.pieces import BadRun, Calibration, Pieces  # noqa: E402
from extrapolation.predict import switch_seconds  # noqa: E402
from extrapolation.simulate import Outcome, Setting, simulate  # noqa: E402
from extrapolation.versions import Variable, updates_kept  # noqa: E402

READ, COMPUTE, WRITE, REST, BARRIER = 1.0, 8.0, 2.0, 0.5, 0.25
FIXED = Pieces("locked", "native", 1, 1, (READ,), (COMPUTE,), (WRITE,), (REST,), (BARRIER,))
STEP = READ + COMPUTE + WRITE + REST
INSIDE = REST * (PARTS - 1) / PARTS  # of the rest, as much as comes with the gradient
MEASURED = Path(__file__).parent / "calibration.json"  # python scripts/extrapolate.py, its first 60 steps
LOCKED = ("serialized", "locked", "write_locked")


def of(mode: str, replicas: int, **more: object) -> Outcome:
    return simulate(FIXED, dataclasses.replace(Setting(mode, replicas, updates=1000, slice_seconds=STEP), **more))  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "all_reduce"])
def test_one_replica_takes_as_long_as_its_pieces(mode: str) -> None:
    found = of(mode, 1)
    assert found.micro_steps_per_second == pytest.approx(1 / STEP)
    assert (found.lock_wait_seconds, found.staleness_max, found.again_share) == (0, 0, 0)


@pytest.mark.parametrize("replicas", [2, 5, 40])
def test_a_lock_lets_no_more_through_than_its_critical_sections_and_as_much_when_many_wait(replicas: int) -> None:
    held = {
        "serialized": READ + COMPUTE + WRITE + INSIDE,
        "locked": READ + WRITE,
        "write_locked": WRITE,
        "reader_writer": WRITE,
    }
    for mode, seconds in held.items():
        speed = of(mode, replicas).micro_steps_per_second
        assert speed <= 1 / seconds * (1 + 1e-9)
        assert speed <= replicas / STEP * (1 + 1e-9)
        if replicas == 40 and mode in LOCKED:
            assert speed == pytest.approx(1 / seconds, rel=0.01)


def test_the_wait_for_a_lock_is_what_the_bound_leaves() -> None:
    # Each replica's cycle is as long as all others' critical sections: its own work, and waiting for the rest of it.
    assert of("locked", 40).lock_wait_seconds == pytest.approx(40 * (READ + WRITE) - STEP, rel=0.02)


@pytest.mark.parametrize("replicas", [1, 2, 16])
def test_all_reduce_takes_a_step_and_two_barriers_together(replicas: int) -> None:
    # Read in place; who is last wakes the others one by one, so that a barrier takes as long as there are replicas.
    step = COMPUTE + WRITE + REST + 2 * BARRIER * replicas
    found = of("all_reduce", replicas)
    assert found.micro_steps_per_second == pytest.approx(replicas / step, rel=0.01)
    assert (found.staleness_max, found.lost_share) == (0, 0.0)


def test_staleness_is_that_of_a_full_queue() -> None:
    # With a lock on the write alone, all others write between a replica's read and its write.
    assert of("write_locked", 40).staleness_mean == pytest.approx(39, abs=0.1)
    # Where reads wait in the same queue, half of those in it are writes.
    assert of("locked", 40).staleness_mean == pytest.approx(39 / 2, abs=1)
    for mode in ("serialized", "optimistic", "all_reduce"):
        assert of(mode, 40).staleness_max == 0


def test_optimistic_computes_again_what_came_too_late_and_each_update_twice_at_most() -> None:
    assert of("optimistic", 1).again_share == 0
    assert of("optimistic", 40).again_share == pytest.approx(1, abs=0.01)
    # Then it is as one replica at a time, the second gradient under the lock.
    assert of("optimistic", 40).micro_steps_per_second == pytest.approx(1 / (READ + COMPUTE + WRITE + INSIDE), rel=0.01)


@pytest.mark.parametrize("mode", LOSING)
def test_what_writes_over_others_loses_more_with_more_replicas_and_nothing_alone(mode: str) -> None:
    shares = [of(mode, replicas, num_variables=1).lost_share for replicas in (1, 2, 4, 16)]
    assert shares[0] == 0
    # Of all that are under way at the same time one is left.
    assert shares[1:] == [pytest.approx(1 - 1 / replicas, abs=0.01) for replicas in (2, 4, 16)]
    # With more variables fewer updates are left in all of them.
    lost = of(mode, 4).lost_share
    assert lost is not None
    assert lost > 3 / 4 - 0.01


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("more", [{}, {"cores": 2, "has_gil": True}, {"group_size": 3, "local_steps": 2}])
def test_updates_made_are_kept_or_lost(mode: str, more: dict[str, object]) -> None:
    found = of(mode, 7, **more)
    if mode in NOT_TOLD:
        assert found.kept is None
        return
    assert found.kept is not None
    assert 0 < found.kept <= found.made
    assert (found.kept < found.made) == (mode in LOSING)


def test_canaries_count_what_a_write_was_based_on() -> None:
    one, other = Variable(), Variable()
    for variable in (one, other):
        variable.write(0, -1)
        variable.write(0, 0)
    assert updates_kept([one, other]) == 2
    one.write(1, 0)  # from a snapshot before replica 0's second update
    assert updates_kept([one, other]) == 1  # replica 1 is not in the other variable yet
    other.write(1, 1)
    assert updates_kept([one, other]) == 2


def test_more_replicas_than_cores_wait_for_a_core_and_no_more_is_done() -> None:
    found = of("lock_free", 8, cores=2)
    assert found.micro_steps_per_second == pytest.approx(2 / STEP, rel=0.02)
    assert found.core_wait_seconds == pytest.approx(3 * STEP, rel=0.1)


def test_the_interpreters_lock_lets_one_replica_at_a_time_do_its_part() -> None:
    slow = dataclasses.replace(FIXED, rest=(COMPUTE,))
    found = simulate(slow, Setting("lock_free", 40, has_gil=True, updates=1000))
    assert found.micro_steps_per_second == pytest.approx(1 / COMPUTE, rel=0.01)


def test_threads_that_ask_for_the_interpreter_after_each_kernel_take_turns() -> None:
    """Measured with 64 replicas on two cores: 32 in locked, 46 in lock_free, 59 in write_locked."""
    quick = Pieces("locked", "torchscript", 1, 2, (7e-6,), (231e-6,), (12e-6,), (37e-6,))
    stale = {
        mode: simulate(quick, Setting(mode, 64, cores=2, has_gil=True)).staleness_mean
        for mode in ("locked", "lock_free", "write_locked")
    }
    assert stale == {
        "locked": pytest.approx(32, abs=5),
        "lock_free": pytest.approx(50, abs=5),
        "write_locked": pytest.approx(62, abs=2),
    }


def test_a_run_with_more_replicas_than_cores_tells_what_it_takes_to_change_threads() -> None:
    def setting(mode: str, replicas: int) -> Setting:
        return Setting(mode, replicas, cores=2, has_gil=True, updates=1000)

    alone = dataclasses.replace(FIXED, cores=2, read=(7e-6,), compute=(231e-6,), write=(12e-6,), rest=(37e-6,))
    rate = simulate(alone, dataclasses.replace(setting("locked", 8), switch_seconds=30e-6)).micro_steps_per_second
    crowd = dataclasses.replace(alone, replicas=8, compute=(1.0,), rate=rate)
    both = Calibration((crowd, alone))
    assert both.of("locked", 8) is alone
    assert switch_seconds(both, setting) == pytest.approx(30e-6, abs=5e-6)
    assert switch_seconds(Calibration((alone,)), setting) == 0
    faster = dataclasses.replace(crowd, rate=1e9)
    assert switch_seconds(Calibration((alone, faster)), setting) < 2e-6


def test_processes_meet_after_their_local_steps_for_as_long_as_the_network_takes() -> None:
    network = Network(alpha_seconds=1.0, beta_seconds=0.5, gradient_bytes=8.0)
    assert network.all_reduce_seconds(1) == 0
    assert network.all_reduce_seconds(4) == pytest.approx(6 * 1.0 + 2 * 3 / 4 * 8 * 0.5)
    assert dataclasses.replace(network, algorithm="halving").all_reduce_seconds(4) == pytest.approx(4 + 6)
    for steps in (1, 4):
        found = of("lock_free", 8, group_size=2, local_steps=steps, network=network, updates=4000)
        cycle = steps * STEP + network.all_reduce_seconds(4)
        assert found.micro_steps_per_second == pytest.approx(8 * steps / cycle, rel=0.05)
        assert found.staleness_max <= 2


def test_the_same_seed_has_the_same_numbers_and_another_one_others() -> None:
    made_of = extrapolate.read_file(MEASURED).of("locked", 6)
    setting = Setting("locked", 6, cores=2, has_gil=True, updates=500)
    assert simulate(made_of, setting, 1) == simulate(made_of, setting, 1)
    assert simulate(made_of, setting, 1) != simulate(made_of, setting, 2)


def test_ten_thousand_replicas_are_simulated(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["--modes", "lock_free", "--replicas", "10000", "--cores-per-replica", "1", "--seeds", "1"]
    assert extrapolate.main([str(MEASURED), *arguments, "--out", str(tmp_path)]) == 0
    with (tmp_path / "predictions.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["replicas"] == "10000"
    assert "10,000" in capsys.readouterr().out
    assert (tmp_path / "extrapolation.png").read_bytes().startswith(b"\x89PNG")


# What a run has left.


def event(kind: str, start: float, stop: float, step: int, name: str = "") -> dict[str, object]:
    times = {"ts": start, "dur": stop - start}
    return {"ph": "X", "tid": 1, "cat": kind, "name": name or kind, "args": {"step": step}, **times}


def test_a_step_is_told_apart_by_its_spans() -> None:
    def spans(step: int, at: float) -> list[dict[str, object]]:
        return [
            event("step", at, at + 100, step),
            event("data", at + 1, at + 3, step),
            event("lock wait", at + 5, at + 6, step),
            event("critical section", at + 6, at + 16, step),
            event("read", at + 7, at + 15, step),
            event("compute", at + 20, at + 70, step),
            event("lock wait", at + 70, at + 73, step),
            event("critical section", at + 73, at + 93, step),
            event("compute", at + 74, at + 80, step, "compute delta"),
            event("update", at + 80, at + 92, step),
        ]

    (step,) = pieces.steps_of({"traceEvents": [*spans(0, 0), *spans(1, 110)]})
    told = {
        name: round(1e6 * getattr(step, name)) for name in ("read", "compute", "write", "lock_wait", "wall", "rest")
    }
    assert told == {"read": 10, "compute": 50, "write": 20, "lock_wait": 4, "wall": 110, "rest": 26}


def test_a_barriers_own_time_is_the_last_ones_wait() -> None:
    events = [
        {**each, "tid": lane + 1}
        for lane, wait in enumerate((30.0, 4.0))
        for step in (0, 1)
        for each in (event("step", 100 * step, 100 * step + 90, step), event("barrier wait", 0, wait, step))
    ]
    assert pieces._barriers(pieces.steps_of({"traceEvents": events})) == (pytest.approx(4e-6),)


def test_a_mode_is_made_of_its_own_runs_pieces_or_of_those_of_one_without_a_barrier() -> None:
    joint = dataclasses.replace(FIXED, mode="all_reduce", replicas=2, cores=2, barrier=(0.5,))
    alone = dataclasses.replace(FIXED, barrier=())
    each = dataclasses.replace(alone, replicas=2, cores=2, compute=(1.0,))
    assert Calibration((alone, joint)).of("all_reduce", 2) is joint
    # A barrier of two takes 0.5 s: one replica's part of it is half of that.
    assert Calibration((alone, joint)).of("overwrite", 8) == dataclasses.replace(alone, barrier=(0.25,))
    every = Calibration((alone, each, joint))
    assert every.of("all_reduce", 1) == dataclasses.replace(alone, barrier=(0.25,))
    assert every.of("overwrite", 1) == dataclasses.replace(alone, barrier=(0.25,))
    assert every.of("overwrite", 2) == dataclasses.replace(each, barrier=(0.5,))
    assert Calibration((joint,)).of("overwrite", 1) is joint


def test_a_check_makes_the_calibrating_run_again_in_other_modes() -> None:
    command = (
        "python -m trainer model=cnn update_mode=locked num_replicas=1 train.steps=5 audit=profile hydra.run.dir=x"
    )
    assert check.overrides_of(command) == ["model=cnn"]
    words, where = check.run_of("overwrite", 64, Path("here"), ["model=cnn"])
    assert {"model=cnn", "update_mode=overwrite", "num_replicas=64", "train.steps=62"} <= set(words)
    assert where == Path("here/overwrite_64")


# The command.


def test_a_mistake_is_one_line_and_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(path: Path) -> str:
        assert extrapolate.main([str(path), "--out", str(tmp_path / "out")]) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1
        return told.removeprefix("extrapolate: ").strip()

    assert said(tmp_path) == f"{tmp_path} holds no run: no verdict.json in it."
    verdict = tmp_path / "verdict.json"
    verdict.write_text(json.dumps({"run": {"strategy": "threads"}}))
    assert said(tmp_path) == f"{tmp_path} has no profile. Make the run with audit=profile."
    verdict.write_text(json.dumps({"run": {"strategy": "mirrored"}, "profile": [1]}))
    assert said(tmp_path) == f"{tmp_path} is a run of strategy=mirrored: what its replicas do is not told apart."
    verdict.write_text("{")
    assert said(tmp_path).startswith(f"{verdict} cannot be read: ")
    (tmp_path / "x.json").write_text("{}")
    assert said(tmp_path / "x.json").startswith(f"{tmp_path / 'x.json'} is no calibration.json of scripts/extrapolate")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--modes", "lockd"], "must be of all_reduce, serialized, locked"),
        (["--replicas", "0"], "must be numbers from 1 to 10,000, as in 1,2,4; got '0'."),
        (["--check", "65"], "must be numbers from 1 to 64, as in 1,2,4; got '65'."),
        (["--cores", "2", "--cores-per-replica", "1"], "not allowed with argument"),
    ],
)
def test_a_bad_option_has_status_2(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        extrapolate.main([str(MEASURED), *arguments])
    assert told in capsys.readouterr().err


@pytest.mark.slow
def test_predictions_are_held_to_real_runs(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, str(ROOT / "scripts" / "extrapolate.py"), str(MEASURED), "--check", "2"),
            *("--modes", "overwrite", "--seeds", "1", "--out", str(tmp_path)),
        ],
        capture_output=True,
        text=True,
        timeout=55,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = (tmp_path / "check.md").read_text()
    assert "| overwrite | lost updates, % | 2 |" in told
    assert "### Median error" in told


def test_a_run_that_is_refused_is_told_in_its_own_words(tmp_path: Path) -> None:
    with pytest.raises(
        BadRun, match=r"^update_mode=locked num_replicas=2: trainer: strategy=mirrored|update_mode=locked"
    ):
        check.make("locked", 2, tmp_path, ["strategy=mirrored"])

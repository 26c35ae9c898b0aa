"""The benchmark: everybody trains the same, goals follow from rows, and whatever happens leaves rows and no process."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS, RIVALS = ROOT / "scripts", ROOT / "scripts" / "rivals"
sys.path += [str(SCRIPTS), str(RIVALS)]

import bench  # noqa: E402
from bench_speed import goals, plan, plot, results, tables  # noqa: E402
from bench_speed.contenders import ALL_RIVALS, ENGINES, Ours, Rival, contenders  # noqa: E402
from bench_speed.goals import Judged, judged  # noqa: E402
from bench_speed.measure import Meter  # noqa: E402
from bench_speed.plan import Measurement  # noqa: E402
from bench_speed.processes import TimedOut, run  # noqa: E402
from bench_speed.results import Row  # noqa: E402
from cases import CASES  # noqa: E402

import models  # noqa: E402
from trainer import rules  # noqa: E402
from trainer.config import ONE_PROCESS  # noqa: E402
from trainer.report.claims import between  # noqa: E402
from trainer.updates.mechanisms import MODES  # noqa: E402

LIMIT_SECONDS = 300  # many times what it takes on two idle cores
PARAMETERS = {"small_mlp": 4810, "mlp": 669706, "cnn": 20490, "cnn_batch": 20538, "transformer": 27690}


@pytest.mark.parametrize("name", CASES)
def test_everybody_trains_as_many_parameters(name: str) -> None:
    import keras_models
    import torch_models

    case = CASES[name]
    ours = models.build(case.model, input_shape=case.input_shape, num_classes=10, seed=0)
    rival, keras_rival = torch_models.build(case), keras_models.build(case)
    trained = [sum(int(each.value.numel()) for each in model.trainable_variables) for model in (ours, keras_rival)]
    assert [*trained, sum(each.numel() for each in rival.parameters())] == [PARAMETERS[name]] * 3


@pytest.mark.parametrize("name", CASES)
def test_a_rival_is_fed_the_arrays_of_ours(name: str) -> None:
    import torch_models

    case = CASES[name]
    x, y = torch_models.tensors(case)
    arrays = case.load()
    assert arrays.train_x.shape[1:] == case.input_shape
    assert (x.permute(0, 2, 3, 1).numpy() == arrays.train_x).all()
    assert (y.numpy() == arrays.train_y).all()


def test_a_case_is_told_to_the_command_line() -> None:
    images = ["data=synthetic", "data.shape=[28,28,1]", "train.batch_size=64"]
    assert CASES["small_mlp"].overrides() == ["model=mlp", "data=digits", "train.batch_size=32"]
    assert CASES["mlp"].overrides() == ["model=mlp", "model.hidden=[512,512]", *images]
    assert CASES["cnn"].overrides() == ["model=cnn", "model.normalization=none", "model.dropout=0.0", *images]
    assert CASES["cnn_batch"].overrides() == ["model=cnn", *images]
    assert CASES["transformer"].overrides() == ["model=transformer", "model.patch=4", "model.dropout=0.0", *images]


def test_replicas_of_a_rival_share_an_epoch_out() -> None:
    from itertools import islice

    from batches import shuffled

    batches = [list(islice(shuffled(100, 8, rank, 3), 4)) for rank in range(3)]
    seen = [index for own in batches for batch in own for index in batch.tolist()]
    assert all(len(batch) == 8 for own in batches for batch in own)
    assert len(set(seen)) == len(seen) == 96
    assert len(list(islice(shuffled(100, 8, 0, 3), 5))) == 5, "the next epoch follows"


def test_every_mode_and_engine_takes_part() -> None:
    assert set(ENGINES) >= set(rules.ENGINES)
    everybody = contenders(ENGINES)
    for mode, mechanism in MODES.items():
        for strategy in {*mechanism.strategies} & {*ONE_PROCESS}:
            assert mode == "custom" or any(name.startswith(f"{strategy}/{mode}") for name in everybody)
    assert {one.contender.name for one in plan.everything(everybody, ENGINES, list(CASES), [1, 2])} == set(everybody)


def test_the_default_plan_has_both_sides_of_every_goal() -> None:
    planned = plan.default(contenders(ENGINES), ["inductor"], list(CASES), [1, 2])
    keys = {(one.model, one.contender.name, one.replicas) for one in planned if one.kind == "speed"}
    for goal in goals.RATIOS:
        for model in goal.least:
            for name, replicas in (goal.over, goal.under):
                assert (model, name.replace(goals.ENGINE, "inductor"), replicas) in keys
    assert len(keys) == len([one for one in planned if one.kind == "speed"]), "nothing is measured twice in a round"


def test_a_name_stands_for_itself_and_a_beginning_for_all_that_begin_so() -> None:
    every = plan.everything(contenders(ENGINES), ENGINES, ["mlp"], [2])

    def names(*asked: str) -> set[str]:
        return {one.contender.name for one in plan.named(every, asked, ["native"])}

    assert names("hogwild", "threads/locked/native") == {"hogwild", "threads/locked/native"}
    assert names("threads/locked") == {
        f"threads/locked/native{more}" for more in ("", "/counters", "/mixed_bfloat16", "/mixed_bfloat16/counters")
    }
    assert names("hog") == set()


# By hand: two rounds, in the second of which the machine was half as fast.
TABLE = """\
speed,small_mlp,threads/all_reduce/inductor,2,30000,15000
speed,small_mlp,ddp,2,1000,500
speed,mlp,threads/all_reduce/inductor,2,900,400
speed,mlp,threads/all_reduce/inductor,1,500,200
speed,mlp,ddp,2,300,100
speed,mlp,threads/lock_free/inductor,2,1000,500
speed,mlp,plain_torch,1,400,
"""


def rows(table: str = TABLE, machine: str = "a machine") -> list[Row]:
    found = []
    for line in table.splitlines():
        kind, model, name, replicas, *speeds = line.split(",")
        engine = name.split("/")[2] if name.startswith("threads/") else ""
        for number, speed in enumerate(speeds, start=1):
            row = Row(number, kind, model, name, engine, int(replicas), machine=machine)
            found.append(replace(row, micro_steps_per_second=float(speed)) if speed else replace(row, error="it broke"))
    return found


def one(found: Sequence[Judged], told: str, model: str) -> Judged:
    (match,) = [each for each in found if (each.told, each.model) == (told, model)]
    return match


def test_ratios_are_taken_within_rounds() -> None:
    found = judged(rows())
    ddp = one(found, "all_reduce / DDP", "mlp")
    assert ddp.figures == (3.0, 4.0)
    assert (ddp.median, ddp.goal, ddp.reached) == (3.5, 4.0, False)
    assert one(found, "all_reduce / DDP", "small_mlp").reached
    assert one(found, "all_reduce / lock_free", "mlp").figures == (0.9, 0.8)
    assert one(found, "all_reduce, 2 replicas / 1 on one core", "mlp").median == pytest.approx(1.9)
    assert one(found, "all_reduce, 2 replicas / 1 on one core", "mlp").reached
    # The rival broke in the second round, which then does not count.
    assert one(found, "1 replica / plain PyTorch loop", "mlp").figures == (1.25,)
    assert not [each for each in found if "Hogwild" in each.told], "one side was never tried"


def test_a_goal_whose_other_side_broke_says_why() -> None:
    found = judged(rows("speed,mlp,threads/locked/inductor,2,500\nspeed,mlp,hogwild,2,\n"))
    hogwild = one(found, "locked / Hogwild", "mlp")
    assert (hogwild.figures, hogwild.reached, hogwild.note) == ((), None, "it broke")


def test_bfloat16_is_asked_of_hardware_that_has_it() -> None:
    table = "speed,mlp,threads/all_reduce/native,2,500\nspeed,mlp,threads/all_reduce/native/mixed_bfloat16,2,1200\n"
    told = "mixed_bfloat16 / float32"
    notes = [one(judged(rows(table, machine)), told, "mlp").note for machine in ("A with bfloat16", "B")]
    assert notes == ["", "for CPUs that compute in bfloat16, which this one does not"]


def test_memory_of_an_extra_replica_is_told_beside_a_gradient_buffer() -> None:
    assert goals.gradient_buffer("mlp") == 4 * PARAMETERS["mlp"]
    assert goals.activations("mlp") == 4 * 64 * (784 + 4 * (512 + 512 + 10))
    extra = goals.gradient_buffer("mlp") + goals.activations("mlp")
    peaks = {1: 500e6, 4: 500e6 + 3 * extra}
    measured = [
        Row(1, "memory", "mlp", "threads/all_reduce/native", "native", replicas, peak_rss_bytes=peak)
        for replicas, peak in peaks.items()
    ]
    (found,) = judged(measured)
    assert found.figures == (pytest.approx(4 * PARAMETERS["mlp"] / 1e6),)
    assert found.reached
    (found,) = judged([measured[0], replace(measured[1], peak_rss_bytes=peaks[4] + 3e6)])
    assert not found.reached, "a megabyte more for each replica"


def test_rows_come_back_from_their_file(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    results.begin(path)
    written = [*rows(), Row(1, "start", "mlp", "ddp", "", 2, wall_seconds=2.5, steps=1, error='a "b", c', command="d")]
    for row in written:
        results.add(path, row)
    assert results.read(path) == written
    with pytest.raises(FileExistsError, match="is there already"):
        results.begin(path)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(results.BadFile, match="is not a file of"):
        results.read(path)


def test_a_file_is_told_of_again_without_measuring(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results.csv"
    results.begin(path)
    for row in rows():
        results.add(path, row)
    assert bench.main(["--from", str(path)]) == 0
    said = capsys.readouterr().out
    for text in ("MLP 784-512-512-10", "all_reduce / DDP", "at least 20x", "it broke", "a machine"):
        assert text in said
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
    assert bench.main(["--from", str(tmp_path / "none.csv")]) == 2


def test_a_contender_that_cannot_be_measured_is_a_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tmp_path / "out")
    assert bench.main(["--contenders", "threads/looked", "--out", folder]) == 2
    assert "threads/looked is not known" in capsys.readouterr().err
    assert bench.main(["--contenders", "hogwild,plain_torch", "--replicas", "2", "--out", folder]) == 2
    assert "plain_torch takes none of --replicas 2" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_tables_have_a_place_in_the_documentation() -> None:
    page = bench.PAGE.read_text(encoding="utf-8")
    assert page.count(bench.BEGIN) == page.count(bench.END) == 1
    assert between(page, bench.BEGIN, bench.END) is not None
    text = tables.markdown(tables.tables(rows()))
    assert "| threads/all_reduce/inductor | 2 | 650 | 400 to 900 | 2 | 1.62 | 3.25 |" in text


def test_tables_and_plot_are_put_into_the_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "docs" / "speed.md"
    page.parent.mkdir()
    page.write_text(f"Before.\n\n{bench.BEGIN}\n{bench.END}\n\nAfter.\n")
    monkeypatch.setattr(bench, "PAGE", page)
    path = tmp_path / "results.csv"
    results.begin(path)
    for row in rows():
        results.add(path, row)
    assert bench.main(["--from", str(path), "--write-docs"]) == 0
    written = page.read_text()
    assert written.startswith("Before.\n")
    assert written.endswith("After.\n")
    assert "### Goals" in between(written, bench.BEGIN, bench.END)
    assert page.with_name("speed.png").read_bytes() == (tmp_path / "speed.png").read_bytes()
    assert bench.main(["--from", str(path), "--write-docs"]) == 0
    assert page.read_text() == written, "twice is as once"


def test_every_rival_is_told_of_in_the_documentation() -> None:
    page = bench.PAGE.read_text(encoding="utf-8")
    for rival in ALL_RIVALS:
        assert f"`{rival.name.partition('/')[0]}" in page


def test_nothing_to_draw_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no speed was measured"):
        plot.save([], tmp_path / "speed.png")


@pytest.mark.slow
@pytest.mark.timeout(LIMIT_SECONDS)
@pytest.mark.parametrize("rival", [each for each in ALL_RIVALS if each.name.count("/") == 0 or "keras" in each.name])
def test_a_rival_learns(rival: Rival) -> None:
    replicas = 2 if rival.has_replicas else 1
    done = run(rival.command("small_mlp", replicas, 0.5), str(ROOT), LIMIT_SECONDS)
    assert done.status == 0, done.errors
    told = json.loads(done.output.splitlines()[-1])
    assert told["loss_last"] < told["loss_first"]
    assert told["parameters"] == PARAMETERS["small_mlp"]
    assert told["micro_steps_per_second"] > 0
    assert 0 < told["start_to_first_step_seconds"] < done.wall_seconds
    assert set(told) <= set(results.COLUMNS)


@pytest.mark.slow
@pytest.mark.timeout(LIMIT_SECONDS)
def test_what_fails_is_a_row_with_its_reason() -> None:
    meter = Meter(0.1, "a machine")
    refused = meter.take(Measurement("start", Ours("mirrored", "locked"), "small_mlp", 2), 1)
    assert "update_mode=locked needs strategy=threads" in refused.error
    assert (refused.micro_steps_per_second, refused.machine) == (None, "a machine")
    assert refused.command.startswith("python -m trainer strategy=mirrored update_mode=locked num_replicas=2 ")
    wrong = Rival("plain_torch", "plain_torch.py", ("--no-such-option",))
    assert "--no-such-option" in meter.take(Measurement("speed", wrong, "small_mlp", 1), 1).error


@pytest.mark.slow
@pytest.mark.timeout(LIMIT_SECONDS)
def test_a_short_run_has_a_row_for_each_round_and_contender(tmp_path: Path) -> None:
    names = "plain_torch,threads/locked/torchscript"
    asked = f"--models small_mlp --contenders {names} --replicas 1 --engines torchscript --rounds 1 --seconds 0.2"
    done = bench_process(tmp_path, *asked.split())
    output, errors = done.communicate(timeout=LIMIT_SECONDS)
    assert done.returncode == 0, errors
    found = results.read(tmp_path / "results.csv")
    assert [(row.contender, row.error) for row in found] == [("threads/locked/torchscript", ""), ("plain_torch", "")]
    assert all(row.micro_steps_per_second and row.seconds for row in found)
    assert found[0].peak_rss_bytes is not None
    assert found[0].peak_rss_bytes > 50e6
    assert "MLP 64-64-10" in output
    assert (tmp_path / "speed.png").exists()


@pytest.mark.slow
@pytest.mark.timeout(LIMIT_SECONDS)
def test_ctrl_c_leaves_rows_and_no_process(tmp_path: Path) -> None:
    asked = "--models small_mlp --contenders plain_torch,hogwild --replicas 1,2 --engines torchscript --seconds 0.2"
    process = bench_process(tmp_path, *asked.split(), "--rounds", "1000")
    path, below = tmp_path / "results.csv", psutil.Process(process.pid)
    deadline = time.monotonic() + LIMIT_SECONDS / 2
    children: list[psutil.Process] = []
    # Until there is a row, and the next measurement runs.
    while not (path.exists() and results.read(path) and children):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
        children = below.children(recursive=True)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=LIMIT_SECONDS / 3)
    assert process.returncode == 130
    assert "interrupted" in errors
    assert "plain_torch" in output
    assert not [each for each in children if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]


def test_a_program_that_takes_too_long_is_ended_with_all_below_it(tmp_path: Path) -> None:
    forever = "import time; time.sleep(600)"
    program = (
        f"import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', {forever!r}]); "
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(p.pid)); time.sleep(600)"
    )
    with pytest.raises(TimedOut, match="not done after 3 s"):
        run([sys.executable, "-c", program], str(tmp_path), 3)
    pid = int((tmp_path / "pid").read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def bench_process(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(SCRIPTS / "bench.py"), "--out", str(folder), *arguments]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

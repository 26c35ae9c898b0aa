"""The table, the CSV file and the plot of a folder of runs; `test_plot.py` has what the plot shows."""

from __future__ import annotations

import csv
import io
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
from report_factory import SAFE, UNSAFE, add_broken, add_run, seen
from rich.console import Console

from trainer.audit import verdict as verdicts
from trainer.report import plot, sweep
from trainer.report.page import PAGE_NAME
from trainer.updates.mechanisms import MODES

ROOT = Path(__file__).resolve().parent.parent
REFUSED = "update_mode=locked needs strategy=threads: under mirrored every replica writes its own copy."


def add_refused(folder: Path, job: int) -> None:
    add_broken(folder, job, "refused", REFUSED)


def told(folder: Path, width: int = 120) -> list[str]:
    stream = io.StringIO()
    sweep.write(folder, Console(file=stream, width=width, highlight=False))
    return stream.getvalue().splitlines()


def table(folder: Path) -> list[list[str]]:
    """The printed table's rows below its head, as words."""
    lines = told(folder)
    start = next(number for number, line in enumerate(lines) if line.startswith("job")) + 2
    stop = next(number for number in range(start, len(lines)) if not lines[number].strip() or ": " in lines[number])
    return [line.split() for line in lines[start:stop]]


def anomalies(folder: Path, width: int = 120) -> dict[str, list[str]]:
    """The printed table of anomalies: job -> its lines. Nothing where there is no such table."""
    lines = told(folder, width)
    head = next((number for number, line in enumerate(lines) if line.split() == ["job", "anomalies"]), len(lines) - 2)
    found: dict[str, list[str]] = {}
    for line in lines[head + 2 :]:
        if not line.strip():
            break
        if not line.startswith(" "):
            found[line.split()[0]] = []
        found[list(found)[-1]].append(line.partition(" ")[2].strip())
    return found


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / sweep.CSV_NAME).open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def test_runs_are_rows_by_job_number(tmp_path: Path) -> None:
    for job in (10, 9, 0):
        add_run(tmp_path, job, SAFE)
    assert [row[0] for row in table(tmp_path)] == ["0", "9", "10"]


def test_a_row_tells_the_run_in_short(tmp_path: Path) -> None:
    add_run(tmp_path, 3, UNSAFE, replicas=4, kept=45)
    assert table(tmp_path) == [
        ["3", "threads", "overwrite", "4", "mlp", "45", "45/180", "0.5/3", *table(tmp_path)[0][8:]]
    ]
    assert table(tmp_path)[0][9:] == ["0.947", "1,234", "anomaly"]


@pytest.mark.parametrize("width", [200, 80])
def test_runs_that_differ_in_another_key_do_not_look_the_same(tmp_path: Path, width: int) -> None:
    for job, (precision, seed) in enumerate([("float32", 7), ("mixed_bfloat16", 7)]):
        add_run(tmp_path, job, SAFE)
        path = next(tmp_path.glob(f"{job}_*/verdict.json"))
        verdict = json.loads(path.read_text())
        verdict["run"]["command"] = f"python -m trainer precision={precision} train.seed={seed} hydra.x={job}"
        path.write_text(json.dumps(verdict))
    printed = " ".join(" ".join(told(tmp_path, width)).split())
    assert "precision" in printed
    assert "mixed_bfloat16" in printed
    assert "train.seed" not in printed  # the same in both
    assert "hydra" not in printed


def test_a_refused_run_is_a_row_with_its_reason(tmp_path: Path) -> None:
    add_run(tmp_path, 0, SAFE)
    add_refused(tmp_path, 1)
    assert table(tmp_path)[1] == ["1", "mirrored", "locked", "2", "mlp", "45", "-", "-", "-", "-", "-", "refused"]
    assert f"1: refused: {REFUSED}" in told(tmp_path)
    assert (rows_of(tmp_path)[1]["verdict"], rows_of(tmp_path)[1]["error.kind"]) == ("broken", "refused")
    assert rows_of(tmp_path)[1]["error.message"] == REFUSED


@pytest.mark.parametrize(
    "content", [b'{"verdict": ', b"[1, 2]", b"{}", b'"upheld"', b'{"verdict": null}', b"\xff\xfe", b""]
)
def test_a_verdict_that_cannot_be_read_is_a_row_that_says_so(tmp_path: Path, content: bytes) -> None:
    add_run(tmp_path, 0, SAFE)
    (tmp_path / "1_threads_locked_2").mkdir()
    (tmp_path / "1_threads_locked_2" / verdicts.FILE_NAME).write_bytes(content)
    assert [row[-1] for row in table(tmp_path)] == ["upheld", "unreadable"]
    assert any(line.startswith("1: verdict.json cannot be read: ") for line in told(tmp_path))
    assert rows_of(tmp_path)[1]["error.kind"] == "unreadable"


def test_odd_values_in_a_verdict_do_not_end_the_report(tmp_path: Path) -> None:
    (tmp_path / "0_x").mkdir()
    text = '{"verdict": "upheld", "run": null, "metrics": {"loss": "x", "accuracy": [1]}, "error": "odd"}'
    (tmp_path / "0_x" / verdicts.FILE_NAME).write_text(text)
    assert table(tmp_path)[0][-1] == "upheld"


def test_a_run_without_a_verdict_is_a_row_that_says_so(tmp_path: Path) -> None:
    add_run(tmp_path, 0, SAFE)
    (tmp_path / "1_threads_locked_2" / ".hydra").mkdir(parents=True)
    assert table(tmp_path)[1][-1] == "none"
    assert "the run is still going on, or was killed with its parent" in " ".join(told(tmp_path))


def test_the_csv_file_has_every_number_under_stable_columns(tmp_path: Path) -> None:
    add_run(tmp_path, 0, SAFE)
    add_run(tmp_path, 1, UNSAFE, kept=45, brought_along=7)
    told(tmp_path)
    with (tmp_path / sweep.CSV_NAME).open(encoding="utf-8", newline="") as stream:
        head = next(csv.reader(stream))
    assert tuple(head[: len(sweep.CSV_COLUMNS)]) == sweep.CSV_COLUMNS
    assert head[len(sweep.CSV_COLUMNS) :] == sorted(head[len(sweep.CSV_COLUMNS) :])
    safe, unsafe = rows_of(tmp_path)
    assert (safe["updates_kept"], unsafe["updates_kept"]) == ("90", "45")
    assert (safe["state.gradients"], safe["versions.python"]) == ("per_replica", "3.11")
    assert (safe["brought_along"], unsafe["brought_along"]) == ("", "7")
    # What was not measured is empty, not zero.
    assert safe["replica_divergence_max"] == ""
    assert not list(tmp_path.glob(".sweep*"))


def test_unsafe_runs_show_each_anomaly_by_name_with_a_count_and_safe_ones_none(tmp_path: Path) -> None:
    add_run(tmp_path, 0, UNSAFE, kept=45, anomalies=[seen("mixed_gradient", 1160, 1200), seen("mode_left_on", 1, 1)])
    add_run(tmp_path, 1, SAFE)
    add_refused(tmp_path, 2)
    assert anomalies(tmp_path) == {
        "0": ["overwritten_update 45 of 90, mixed_gradient 1,160 of 1,200, mode_left_on 1 of 1"],
        "1": ["none"],
        "2": ["-"],
    }
    assert [row["anomalies"] for row in rows_of(tmp_path)] == [
        "overwritten_update=45;mixed_gradient=1160;mode_left_on=1",
        "none",
        "",
    ]


def test_where_no_run_has_an_anomaly_there_is_no_second_table(tmp_path: Path) -> None:
    add_run(tmp_path, 0, SAFE)
    add_refused(tmp_path, 1)
    assert anomalies(tmp_path) == {}
    assert not any("anomalies" in line for line in told(tmp_path))


def test_a_run_that_checked_nothing_is_not_said_to_have_no_anomalies(tmp_path: Path) -> None:
    add_run(tmp_path, 0, UNSAFE, kept=45)
    add_run(tmp_path, 1, SAFE)
    path = next(tmp_path.glob("1_*/verdict.json"))
    verdict = json.loads(path.read_text())
    for each in verdict["guarantees"]:
        each["status"] = "not_checked"
    path.write_text(json.dumps(verdict))
    assert anomalies(tmp_path)["1"] == ["-"]
    assert rows_of(tmp_path)[1]["anomalies"] == ""


def test_anomalies_of_one_kind_are_one(tmp_path: Path) -> None:
    add_run(tmp_path, 0, UNSAFE, anomalies=[seen("setting_off", 1, 37), seen("x", 1, 2), seen("setting_off", 1, 37)])
    # Two of 37 in one replica, or one in each of two: it does not say of how many.
    assert anomalies(tmp_path) == {"0": ["setting_off 2, x 1 of 2"]}
    assert rows_of(tmp_path)[0]["anomalies"] == "setting_off=2;x=1"


@pytest.mark.parametrize("width", [80, 120])
def test_lines_of_anomalies_end_between_them_and_fit_the_console(tmp_path: Path, width: int) -> None:
    kinds = [f"{'repeated_' * (number % 4)}anomaly_{number}" for number in range(30)]
    add_run(tmp_path, 0, UNSAFE, anomalies=[seen(kind, 1234, 2500000) for kind in kinds])
    add_run(tmp_path, 1, SAFE)
    lines = anomalies(tmp_path, width)["0"]
    assert max(len(line) for line in told(tmp_path, width)[:-4]) <= width
    assert " ".join(lines) == ", ".join(f"{kind} 1,234 of 2,500,000" for kind in kinds)
    assert all(line.endswith(",") for line in lines[:-1])
    # As much as fits stands on each line.
    for line, after in itertools.pairwise(lines):
        assert len("job  ") + len(f"{line} {after.partition(', ')[0]},") > width


def test_jobs_are_called_the_same_in_both_tables(tmp_path: Path) -> None:
    add_run(tmp_path / "one", 0, SAFE)
    add_run(tmp_path / "two", 0, UNSAFE, kept=45)
    assert anomalies(tmp_path) == {"a0": ["none"], "b0": ["overwritten_update 45 of 90"]}


@pytest.mark.parametrize("odd", [None, "x", [1], [{}], [{"kind": "x", "count": "many"}], {"kind": "x"}])
def test_odd_anomalies_do_not_end_the_report(tmp_path: Path, odd: object) -> None:
    add_run(tmp_path, 0, SAFE)
    path = next(tmp_path.glob("0_*/verdict.json"))
    path.write_text(json.dumps({**json.loads(path.read_text()), "anomalies": odd}))
    assert table(tmp_path)[0][-1] == "upheld"
    assert anomalies(tmp_path) == {}


def test_a_plot_is_drawn_beside_the_table(tmp_path: Path) -> None:
    add_run(tmp_path, 0, SAFE)
    add_refused(tmp_path, 1)
    assert told(tmp_path)[-4:-1] == [str(tmp_path / name) for name in (sweep.CSV_NAME, sweep.PLOT_NAME, PAGE_NAME)]
    assert (tmp_path / sweep.PLOT_NAME).read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob(".sweep*"))


def test_nothing_is_drawn_where_no_run_has_numbers(tmp_path: Path) -> None:
    add_refused(tmp_path, 0)
    assert "no sweep.png: no run that ended by itself has numbers to draw." in told(tmp_path)
    assert not (tmp_path / sweep.PLOT_NAME).exists()


def test_an_older_plot_does_not_stay_where_there_is_nothing_to_draw_any_more(tmp_path: Path) -> None:
    (tmp_path / sweep.PLOT_NAME).write_bytes(b"of other runs")
    add_refused(tmp_path, 0)
    told(tmp_path)
    assert not (tmp_path / sweep.PLOT_NAME).exists()


def test_a_plot_that_cannot_be_drawn_costs_neither_table_nor_csv(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("the font\nis gone")

    monkeypatch.setattr(plot, "draw", fail)
    add_run(tmp_path, 0, SAFE)
    (tmp_path / sweep.PLOT_NAME).write_bytes(b"of other runs")
    lines = told(tmp_path)
    assert "no sweep.png: drawing it failed: RuntimeError: the font is gone" in lines
    assert any("upheld" in line for line in lines)
    (shown,) = tmp_path.glob("events.out.tfevents.*")
    left = ["0_threads_locked_2", shown.name, PAGE_NAME, sweep.CSV_NAME]
    assert sorted(path.name for path in tmp_path.iterdir()) == left
    assert "Drawing it failed: RuntimeError: the font is gone" in (tmp_path / PAGE_NAME).read_text(encoding="utf-8")


def test_files_that_cannot_be_written_are_told_and_the_table_is_printed(tmp_path: Path) -> None:
    add_run(tmp_path, 0, SAFE)
    for name in (sweep.CSV_NAME, sweep.PLOT_NAME, PAGE_NAME):
        (tmp_path / name).mkdir()
    lines = told(tmp_path)
    assert any("upheld" in line for line in lines)
    for name in (sweep.CSV_NAME, sweep.PLOT_NAME, PAGE_NAME):
        assert any(line.startswith(f"{tmp_path / name} cannot be written: ") for line in lines)
    assert not [*tmp_path.glob(".sweep*"), *tmp_path.glob(".report*")]


def test_jobs_of_several_sweeps_are_told_apart(tmp_path: Path) -> None:
    add_run(tmp_path / "one", 0, SAFE)
    add_run(tmp_path / "one", 1, SAFE)
    add_run(tmp_path / "two", 0, UNSAFE, kept=45)
    assert [row[0] for row in table(tmp_path)] == ["a0", "a1", "b0"]
    assert {"a: one", "b: two"} <= set(told(tmp_path))
    assert [row["job"] for row in rows_of(tmp_path)] == ["0", "1", "0"]


def test_single_runs_are_named_by_their_time(tmp_path: Path) -> None:
    for name in ("11-22-33_threads_locked_2", "11-22-44_threads_locked_2"):
        add_run(tmp_path, 0, SAFE)
        (tmp_path / "0_threads_locked_2").rename(tmp_path / name)
    assert [row[0] for row in table(tmp_path)] == ["11-22-33", "11-22-44"]


def test_the_last_line_can_be_pasted(tmp_path: Path) -> None:
    folder = tmp_path / ("a long name with spaces " * 4).strip()
    add_run(folder, 0, SAFE)
    assert told(folder, width=80)[-1] == f"tensorboard --logdir '{folder}'"


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits_the_console(tmp_path: Path, width: int) -> None:
    add_run(tmp_path, 0, SAFE, replicas=64, num_replicas=64)
    add_run(tmp_path, 1, UNSAFE, kept=45, model="linear", steps=1000)
    add_refused(tmp_path, 2)
    lines = told(tmp_path, width)[:-4]
    assert max(len(line) for line in lines) <= width
    text = "\n".join(lines)
    for word in ("threads", "mirrored", "overwrite", "locked", "2,880/2,880", "anomaly", "refused", "linear", "1,000"):
        assert word in text


@pytest.mark.parametrize("width", [80, 100, 120])
def test_names_of_modes_are_not_broken_in_two(tmp_path: Path, width: int) -> None:
    for job, mode in enumerate(mode for mode in MODES.values() if "threads" in mode.strategies):
        add_run(tmp_path, job, mode.name, replicas=16, model="transformer", steps=100000)
    lines = told(tmp_path, width)
    assert max(len(line) for line in lines[:-4]) <= width
    text = "\n".join(lines)
    for mode in MODES.values():
        assert "threads" not in mode.strategies or f" {mode.name} " in text


def test_a_narrow_table_says_once_what_is_the_same_in_all_runs(tmp_path: Path) -> None:
    add_run(tmp_path, 0, SAFE)
    add_run(tmp_path, 1, UNSAFE, kept=45)
    assert "all runs: strategy threads, model mlp, steps 45" in told(tmp_path, 80)
    assert not any("all runs" in line for line in told(tmp_path, 120))


def test_one_runs_own_folder_is_a_table_of_one(tmp_path: Path) -> None:
    add_run(tmp_path, 7, SAFE)
    assert [row[0] for row in table(tmp_path / "7_threads_locked_2")] == ["7"]


def test_a_folder_without_runs_says_so_and_gets_no_csv(tmp_path: Path) -> None:
    assert told(tmp_path, 500) == [f"{tmp_path} holds no run: no verdict.json below it."]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("runs", ["none", "refused"])
def test_the_report_imports_no_framework_and_nothing_to_draw_with_unless_it_draws(tmp_path: Path, runs: str) -> None:
    if runs == "refused":
        add_refused(tmp_path, 0)
    program = (
        "import sys; from pathlib import Path; from trainer.report import command, console, sweep; "
        "sweep.write(Path(sys.argv[1]), console.standard_output()); "
        "print(sorted({'numpy', 'matplotlib', 'tensorboard', 'tensorflow', 'torch', 'keras'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path], capture_output=True, text=True, timeout=60, cwd=ROOT, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"

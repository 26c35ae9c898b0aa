"""What a run says on the console, and in its log."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from report_factory import SAFE, UNSAFE, complete, make_config, make_record, make_verdict, report_run
from rich.console import Console

from trainer.audit.verdict import Covers, Error, Verdict, exit_status
from trainer.doing import doing, listening
from trainer.report import console as reports
from trainer.report import words
from trainer.report.observer import LOG_NAME, Observer
from trainer.report.progress import Clock, ProgressBar

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path("outputs/01_threads_overwrite_2")


def shown(verdict: Verdict, *, width: int = 120, fail_on: str = "violated") -> str:
    stream = io.StringIO()
    reports.show(Console(file=stream, width=width, highlight=False), verdict, FOLDER, fail_on)
    return stream.getvalue()


def unsafe_verdict() -> Verdict:
    config = make_config(UNSAFE)
    record = make_record(config)
    complete(record, config.train.steps)
    return make_verdict(config, record, kept=53)


@pytest.mark.parametrize(
    ("covers", "text"),
    [
        (Covers("this_run"), "this run; other orders not tried"),
        (Covers("only_order"), "the only order"),
        (Covers("all_orders", orders=924), "all 924 orders"),
        (Covers("all_orders"), "all orders"),
        (Covers("bounded", orders=2424, preemptions=2), "2,424 orders: all with at most 2 preemptions"),
        (Covers("bounded", orders=192, preemptions=1), "192 orders: all with at most 1 preemption"),
    ],
)
def test_covers_is_told_in_words(covers: Covers, text: str) -> None:
    assert words.covers(covers) == text


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits_the_console(width: int) -> None:
    text = shown(unsafe_verdict(), width=width)
    assert max(len(line) for line in text.splitlines()[:-1]) <= width
    assert re.search(r"guarantee +claimed +status +covers +evidence", text)
    # Whole names and statuses: what is searched for in a log must not be cut in two.
    for name in ("no_lost_updates", "no_torn_reads", "fresh_gradients"):
        assert name in text


def test_every_status_comes_with_what_it_covers() -> None:
    line = next(line for line in shown(unsafe_verdict()).splitlines() if line.startswith("no_torn_reads"))
    assert re.split(r" {2,}", line.strip()) == [
        "no_torn_reads",
        "no",
        "not_seen",
        "this run; other orders not tried",
        "nothing seen",
    ]


def test_what_was_not_checked_covers_nothing_and_is_shown_where_it_is_claimed() -> None:
    config = make_config(SAFE)
    config.require = ["same_bits"]
    text = shown(make_verdict(config, make_record(config)))
    line = next(line for line in text.splitlines() if line.startswith("same_bits"))
    assert line.split() == ["same_bits", "required", "not_checked", "-"]


def test_what_is_neither_claimed_nor_checked_is_summed_up() -> None:
    lines = shown(unsafe_verdict(), width=500).splitlines()
    (line,) = [line for line in lines if "no_deadlock" in line]
    assert line.startswith("Not claimed and not checked: ")
    assert line.rstrip().endswith("Not applicable: joint_gradient.")


def test_an_anomaly_comes_with_witness_and_remedy() -> None:
    text = shown(unsafe_verdict())
    assert "overwritten_update: 37 of 90 (all 2 shared variables)" in text
    assert re.search(r"witness +step 12: replica 1 wrote over replica 0's update", text)
    assert re.search(r"remedy +update_mode=locked updates the current values under a lock", text)


def test_the_last_line_has_word_exit_status_and_folder() -> None:
    last = shown(unsafe_verdict(), fail_on="anomaly").splitlines()[-1]
    assert last == f"anomaly (exit status 1: fail_on=anomaly) {FOLDER}"
    config = make_config(SAFE)
    last = shown(make_verdict(config, make_record(config)), width=20).splitlines()[-1]
    assert last == f"upheld (exit status 0) {FOLDER}"


@pytest.mark.parametrize("fail_on", ["violated", "anomaly", "inconclusive", "never"])
@pytest.mark.parametrize("word", ["violated", "anomaly", "inconclusive", "upheld"])
def test_the_exit_status_that_is_told_is_the_one_that_follows(word: str, fail_on: str) -> None:
    verdict = Verdict(word, {})  # type: ignore[arg-type]
    assert words.exit_meaning(verdict, fail_on).startswith(f"exit status {exit_status(verdict, fail_on)}")


def test_a_broken_run_says_where_it_broke() -> None:
    text = shown(Verdict("broken", {}, error=Error("crash", "ValueError: [not markup]", replica=1, step=17)))
    assert "crash in replica 1 at step 17: ValueError: [not markup]" in text
    assert text.splitlines()[-1] == f"broken (exit status 3: the run broke) {FOLDER}"


def test_the_numbers_tell_how_far_the_run_came() -> None:
    verdict = unsafe_verdict()
    assert words.measured(verdict).startswith("2 replicas x 45 steps; loss ")
    verdict.metrics |= {"steps_done": 17, "accuracy": None, "updates_kept": None}
    verdict.run["num_replicas"] = 1
    assert words.measured(verdict).startswith("1 replica x 17 of 45 steps; loss ")
    assert "accuracy" not in words.measured(verdict)
    assert "kept" not in words.measured(verdict)
    assert words.measured(Verdict("broken", {})) == ""


def test_an_interrupted_run_exits_as_its_signal_does() -> None:
    verdict = Verdict("broken", {}, error=Error("interrupted", "SIGTERM"))
    assert "exit status 130 after Ctrl-C, 143 after SIGTERM" in shown(verdict)


def test_the_log_has_the_same_text_without_colour(tmp_path: Path) -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=reports.LOG_COLUMNS, force_terminal=True, force_interactive=False)
    report_run(tmp_path / "run", UNSAFE, console=console)
    coloured, log = stream.getvalue(), (tmp_path / "run" / LOG_NAME).read_text()
    assert "\x1b[" in coloured
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured) == log


def test_the_log_is_appended_to(tmp_path: Path) -> None:
    (tmp_path / LOG_NAME).write_text("before\n")
    config = make_config()
    record = make_record(config)
    with Observer(config, tmp_path, Console(file=io.StringIO())) as observer:
        observer.finished(record, make_verdict(config, record))
    assert (tmp_path / LOG_NAME).read_text().startswith("before\n")


@pytest.mark.parametrize("width", [80, 120])
def test_the_bar_shows_steps_throughput_and_loss(width: int) -> None:
    stream = io.StringIO()
    config = make_config(steps=3000)
    record = make_record(config)
    bar = ProgressBar(Console(file=stream, width=width, force_terminal=True), "mirrored first_replica x8", 3000)
    bar.start()
    for steps in (300, 1500):
        complete(record, steps)
        bar.update(record, last=True)
    bar.stop()
    text = without_escapes(stream.getvalue())
    assert re.search(r"mirrored first_replica x8 .* 1500/3000 .*[\d,.]+ micro-steps/s loss \d\.\d+", text)


def without_escapes(text: str) -> str:
    return re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", text)


@pytest.mark.parametrize("width", [80, 120])
def test_what_takes_long_stands_in_the_bar_and_in_the_log(tmp_path: Path, width: int) -> None:
    stream = io.StringIO()
    longest = "compiling the step, 10 s to a minute"
    with Observer(make_config(), tmp_path, Console(file=stream, width=width, force_terminal=True)):
        with doing("capturing the step"), doing(longest):
            assert re.search(rf"{longest} .* 0/45 ", without_escapes(stream.getvalue()))
            stream.truncate(stream.seek(0))
        # What compiling was a part of comes back, and then the run's own title.
        assert re.search(
            r"capturing the step .* 0/45 .*threads locked x2 .* 0/45 ", without_escapes(stream.getvalue()), re.S
        )
    assert (tmp_path / LOG_NAME).read_text() == f"capturing the step\n{longest}\ncapturing the step\n"


def test_the_seconds_pass_while_it_takes_long() -> None:
    stream = io.StringIO()
    bar = ProgressBar(Console(file=stream, width=80, force_terminal=True), "threads locked x2", 45)
    ticked = threading.Event()
    bar.start()
    bar.doing("importing torch and keras")
    bar.doing("capturing the step")  # the clock of what was done before has stopped
    clock = Clock(lambda seconds: ticked.set())
    assert ticked.wait(20)
    clock.stop()
    bar.stop()
    assert [thread for thread in threading.enumerate() if thread.name == "clock"] == []
    assert "importing torch and keras, " not in stream.getvalue()


def test_who_does_not_listen_any_more_is_told_nothing() -> None:
    heard: list[str | None] = []
    with listening(heard.append), doing("one"):
        pass
    with doing("another"):
        pass
    assert heard == ["one", None]


def test_nothing_moves_where_there_is_no_terminal(tmp_path: Path) -> None:
    stream = io.StringIO()
    report_run(tmp_path / "run", SAFE, finish=False, console=Console(file=stream))
    with Observer(make_config(), tmp_path, Console(file=stream)), doing("capturing the step"):
        assert [thread for thread in threading.enumerate() if thread.name == "clock"] == []
    assert stream.getvalue() == ""


def test_standard_output_that_cannot_hold_box_lines_gets_plain_ones(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from report_factory import report_run, UNSAFE; "
        "from trainer.report.console import standard_output; "
        "report_run(Path(sys.argv[1]), UNSAFE, console=standard_output())"
    )
    environment = {
        **{name: value for name, value in os.environ.items() if name != "COLUMNS"},
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests"))),
        "PYTHONIOENCODING": "ascii",
        "FORCE_COLOR": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "run"], capture_output=True, timeout=60, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    text = done.stdout.decode("ascii")
    assert "no_lost_updates" in text
    assert "micro-steps/s loss" not in text
    assert len(text.split("evidence")[0].splitlines()[-1]) > 80

"""What the plot of several runs shows: the points before they are drawn, and that a picture comes of them."""

from __future__ import annotations

import itertools
import struct
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from report_factory import SAFE, UNSAFE, add_broken, add_run

from trainer.report import panels, plot
from trainer.report.rows import Row, find
from trainer.report.series import MEASURES, Chart, Ideal, Point, Series, chart
from trainer.updates.mechanisms import MODES


def row(mode: str, replicas: int, *, strategy: str = "threads", word: str = "upheld", **changed: Any) -> Row:
    """A run that kept everything, at 1,000 micro-steps a second, with staleness 1 and at most 3."""
    run = {"strategy": strategy, "update_mode": mode, "num_replicas": replicas, "model": "mlp", "seed": 0, "steps": 50}
    metrics = {
        "updates_kept": 50 * replicas,
        "updates_expected": 50 * replicas,
        "staleness_mean": 1.0,
        "staleness_max": 3,
        "micro_steps_per_second": 1000.0,
        "loss": 0.5,
    }
    for name, value in changed.items():
        (metrics if name in metrics else run)[name] = value
    claimed = MODES[mode].claims if mode in MODES else frozenset()
    return Row("0", "0_x", word, run=run, metrics=metrics, claimed=claimed)


def every_mode(counts: tuple[int, ...], seeds: tuple[int, ...] = (0,)) -> list[Row]:
    return [
        row(mode.name, count, strategy=strategy, seed=seed, staleness_max=count**3)
        for mode in MODES.values()
        for strategy in mode.strategies or ("threads",)
        for count in counts
        for seed in seeds
    ]


def only(shown: Chart) -> Series:
    (series,) = shown.series
    return series


def drawn(shown: Chart) -> Figure:
    figure = plot.draw(shown)
    figure.draw_without_rendering()
    return figure


def size(path: Path) -> tuple[int, int]:
    """Width and height in pixels, from the head of a PNG file."""
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert content.endswith(b"IEND\xaeB`\x82")
    width, height = struct.unpack(">II", content[16:24])
    return width, height


def test_points_are_the_runs_numbers_by_mode_and_number_of_replicas(tmp_path: Path) -> None:
    add_run(tmp_path, 0, SAFE, replicas=2, micro_steps_per_second=100.0, loss=0.25)
    add_run(tmp_path, 1, UNSAFE, replicas=2, kept=45, micro_steps_per_second=200.0, loss=0.7)
    add_run(tmp_path, 2, UNSAFE, replicas=4, kept=45, micro_steps_per_second=300.0, staleness_mean=2.5, loss=0.9)
    shown = chart(find(tmp_path))
    assert [(series.strategy, series.update_mode, series.keeps) for series in shown.series] == [
        ("threads", SAFE, True),
        ("threads", UNSAFE, False),
    ]
    assert shown.num_replicas == (2, 4)
    safe, unsafe = shown.series
    assert safe.points == {
        "kept_share": (Point(2, 1.0, 1.0, 1.0),),
        "throughput": (Point(2, 100.0, 100.0, 100.0),),
        # The mean of all updates, and up to the largest of any.
        "staleness": (Point(2, 0.5, 0.5, 1.0),),
        "loss": (Point(2, 0.25, 0.25, 0.25),),
    }
    assert unsafe.points == {
        "kept_share": (Point(2, 0.5, 0.5, 0.5), Point(4, 0.25, 0.25, 0.25)),
        "throughput": (Point(2, 200.0, 200.0, 200.0), Point(4, 300.0, 300.0, 300.0)),
        "staleness": (Point(2, 0.5, 0.5, 1.0), Point(4, 2.5, 2.5, 3.0)),
        "loss": (Point(2, 0.7, 0.7, 0.7), Point(4, 0.9, 0.9, 0.9)),
    }


def test_repeated_points_are_a_mean_with_its_spread() -> None:
    rows = [
        row("overwrite", 2, seed=0, updates_kept=40, staleness_mean=1.0, staleness_max=4),
        row("overwrite", 2, seed=1, updates_kept=60, staleness_mean=2.0, staleness_max=9),
        row("overwrite", 2, seed=2, updates_kept=80, staleness_mean=1.5, staleness_max=2),
    ]
    shown = chart(rows)
    points = only(shown).points
    assert points["kept_share"] == (Point(2, pytest.approx(0.6), 0.4, 0.8, 3),)
    assert points["staleness"] == (Point(2, pytest.approx(1.5), 1.0, 9.0, 3),)
    assert shown.varied == {"seed": ("0", "1", "2")}
    assert "Means over up to 3 runs, which differ in seed 0, 1, 2. Whiskers from the least to the largest run." in (
        plot.caption(shown)
    )


def test_a_mean_over_safe_and_unsafe_holders_says_so() -> None:
    shown = chart([row("all_reduce", 2, state={"gradients": held}) for held in ("per_replica", "shared")])
    assert "Means over up to 2 runs, which differ in state. Whiskers" in " ".join(plot.caption(shown))


def test_what_points_have_in_common_is_the_title_and_not_what_they_are_means_over() -> None:
    shown = chart([row("locked", 1), row("locked", 2, model="cnn")])
    assert shown.varied == {}
    assert shown.common == {"seed": 0, "steps": 50}
    assert plot.title(shown) == "threads, steps 50, seed 0"


@pytest.mark.parametrize(
    ("odd", "why"),
    [
        (Row("0", "x", "broken", error={"kind": "refused"}), "refused"),
        (Row("0", "x", "broken", error={"kind": "interrupted"}, metrics={"updates_kept": 1}), "broken (interrupted)"),
        (Row("0", "x", "broken"), "broken"),
        (Row("0", "x", "none"), "without a verdict"),
        (Row("0", "x", "unreadable"), "with a verdict that cannot be read"),
        (Row("0", "x", "upheld"), "without numbers"),
        (row("locked", 0), "without numbers"),
        (row("locked", 2, num_replicas="two"), "without numbers"),
    ],
)
def test_a_run_that_is_not_drawn_is_counted_in_the_caption(odd: Row, why: str) -> None:
    shown = chart([row("locked", 2), odd])
    assert shown.left_out == {why: 1}
    assert plot.caption(shown)[-1] == f"Runs drawn: 1. Not drawn: 1 {why}."


def test_an_interrupted_sweep_is_drawn_as_far_as_it_came(tmp_path: Path) -> None:
    add_run(tmp_path, 0, SAFE)
    add_broken(tmp_path, 1, "interrupted", "interrupted by Ctrl-C (SIGINT)")
    add_broken(tmp_path, 2, "crash", "replica 1 raised ValueError")
    (tmp_path / "3_threads_locked_2" / ".hydra").mkdir(parents=True)
    shown = chart(find(tmp_path))
    assert shown.num_runs == 1
    assert shown.left_out == {"broken (interrupted)": 1, "broken (crash)": 1, "without a verdict": 1}


def test_a_run_without_an_audit_has_its_throughput_only() -> None:
    unaudited = row("locked", 2, updates_kept=None, staleness_mean=None, staleness_max=None, loss=None)
    shown = chart([unaudited])
    assert {measure: len(points) for measure, points in only(shown).points.items()} == {
        "kept_share": 0,
        "throughput": 1,
        "staleness": 0,
        "loss": 0,
    }
    assert plot.caption(shown)[-1] == "Runs drawn: 1, 1 of them without a count of updates."
    texts = [text.get_text() for axes in drawn(shown).axes for text in axes.texts]
    assert texts.count("not measured") == 3


@pytest.mark.parametrize("value", ["x", True, float("nan"), float("inf"), [1], None])
def test_odd_values_are_not_drawn(value: object) -> None:
    shown = chart([row("locked", 2, micro_steps_per_second=value)])
    assert only(shown).points["throughput"] == ()


def test_strategies_are_told_apart_where_there_are_several() -> None:
    alone = chart([row("all_reduce", 2)])
    assert alone.name(only(alone)) == "all_reduce"
    both = chart([row("all_reduce", 2, strategy="mirrored"), row("all_reduce", 2)])
    assert [both.name(series) for series in both.series] == ["all_reduce, threads", "all_reduce, mirrored"]
    threads, mirrored = panels.styles(both)
    assert (threads.colour, threads.marker) == (mirrored.colour, mirrored.marker)
    assert threads.line != mirrored.line


def test_no_two_modes_look_the_same() -> None:
    shown = chart([row(mode, 2) for mode in (*MODES, "mine", "also_mine")])
    looks = panels.styles(shown)
    assert len({(look.colour, look.marker, look.filled) for look in looks}) == len(looks)
    few = panels.styles(chart([row(mode, 2) for mode in list(MODES)[:: len(MODES) // 4]]))
    assert len({look.colour for look in few}) == len(few)


def test_a_mode_that_claims_to_keep_every_update_is_filled_and_others_are_hollow() -> None:
    looks = dict(
        zip(("locked", "overwrite"), panels.styles(chart([row("locked", 2), row("overwrite", 2)])), strict=True)
    )
    assert looks["locked"].filled
    assert not looks["overwrite"].filled


def test_lines_stand_over_the_numbers_of_replicas() -> None:
    shown = chart([row("locked", count, micro_steps_per_second=1000.0 * count) for count in (1, 2, 8)])
    throughput = drawn(shown).axes[1]
    assert [label.get_text() for label in throughput.get_xticklabels()] == ["1", "2", "8"]
    (line,) = (each for each in throughput.get_lines() if each.get_marker() == panels.styles(shown)[0].marker)
    assert list(line.get_ydata()) == [1000.0, 2000.0, 8000.0]


def test_twice_as_many_replicas_are_equally_far_apart() -> None:
    throughput = drawn(chart([row("locked", count) for count in (1, 2, 8, 64)])).axes[1]
    assert list(throughput.get_xticks()) == [0, 1, 3, 6]


def test_numbers_of_replicas_close_together_leave_room_for_their_labels() -> None:
    throughput = drawn(chart([row("locked", count) for count in range(1, 65)])).axes[1]
    shown = [int(label.get_text()) for label in throughput.get_xticklabels()]
    assert {1, 2, 4, 8, 16, 32, 64} <= set(shown)
    assert shown == sorted(shown)
    boxes = [label.get_window_extent() for label in throughput.get_xticklabels()]
    assert not any(one.overlaps(other) for one, other in itertools.pairwise(boxes))


def ideal_line(figure: Figure) -> list[tuple[float, float]]:
    """Replicas and throughput of the dashed line, where there is one."""
    lines = [line for line in figure.axes[1].get_lines() if line.get_color() == panels.GREY]
    return [(2 ** float(at), float(value)) for line in lines for at, value in zip(*line.get_data(), strict=True)]


def scaling(**told: Any) -> list[Row]:
    return [
        row(mode, count, micro_steps_per_second=each, threads_per_replica=max(1, 4 // count), **told)
        for mode, each in (("locked", 100.0), ("lock_free", 110.0))
        for count in (1, 2, 8, 64)
    ]


def test_the_ideal_rises_up_to_the_cores_and_is_level_after() -> None:
    shown = chart(scaling(cores=4))
    assert shown.ideal == Ideal(110.0, 4, 4)
    line = ideal_line(drawn(shown))
    assert line[0] == pytest.approx((1, 110))
    assert line[-2:] == [pytest.approx((4, 440)), pytest.approx((64, 440))]
    assert all(value == pytest.approx(110 * min(count, 4)) for count, value in line)
    assert plot.caption(shown)[-2] == (
        "Dashed: the throughput of the fastest single replica, which had 4 threads, times the replicas; level from the "
        "machine's 4 cores on."
    )
    assert [text.get_text() for text in drawn(shown).legends[0].get_texts()] == ["locked", "lock_free", "ideal"]


@pytest.mark.parametrize(
    "rows",
    [
        scaling(),
        scaling(cores="four"),
        [*scaling(cores=4), row("overwrite", 2, cores=8)],
        [each for each in scaling(cores=4) if each.run["num_replicas"] > 1],
    ],
    ids=["no cores", "odd cores", "two machines", "nobody alone"],
)
def test_there_is_no_ideal_of_what_is_not_known(rows: list[Row]) -> None:
    shown = chart(rows)
    assert shown.ideal is None
    assert ideal_line(drawn(shown)) == []
    assert not any(said.startswith("Dashed") for said in plot.caption(shown))


def test_an_ideal_far_above_leaves_the_points_their_room() -> None:
    shown = chart(scaling(cores=64))
    assert shown.ideal is not None
    assert drawn(shown).axes[1].get_ylim()[1] < 3 * 110 < shown.ideal.of(64)


def test_one_number_of_replicas_is_bars_with_their_numbers() -> None:
    shown = chart([row("locked", 4), row("overwrite", 4, updates_kept=50, staleness_mean=2.5, staleness_max=120)])
    kept, throughput, staleness, loss = drawn(shown).axes
    assert [label.get_text() for label in kept.get_yticklabels()] == ["locked", "overwrite"]
    assert [bar.get_width() for bar in kept.patches] == [1.0, 0.25]
    assert [text.get_text() for text in kept.texts] == ["100%", "25%"]
    assert [text.get_text() for text in throughput.texts] == ["1,000", "1,000"]
    assert [text.get_text() for text in staleness.texts] == ["1, max 3", "2.5, max 120"]
    assert [text.get_text() for text in loss.texts] == ["0.5", "0.5"]


@pytest.mark.parametrize("counts", [(4,), (1, 2, 4, 8, 16, 32, 64)])
def test_with_every_mode_nothing_lies_over_anything_else(counts: tuple[int, ...]) -> None:
    figure = drawn(chart(every_mode(counts, seeds=(0, 1))))
    frames = [axes.get_tightbbox() for axes in figure.axes] + [legend.get_window_extent() for legend in figure.legends]
    for position, frame in enumerate(frames):
        assert all(not frame.overlaps(other) for other in frames[:position])
        assert frame.x0 >= 0
        assert frame.x1 <= figure.bbox.x1
    for axes in figure.axes:
        for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
            boxes = [label.get_window_extent() for label in labels if label.get_visible() and label.get_text()]
            assert not any(box.overlaps(other) for position, box in enumerate(boxes) for other in boxes[:position])


@pytest.mark.parametrize(
    "rows",
    [
        [row("locked", 2)],
        [row("locked", 2, micro_steps_per_second=None, staleness_mean=0, staleness_max=0)],
        every_mode((1, 2, 4)),
        every_mode((4,)),
        [row("a $dollar$ _sign_ that goes on and on " * 9, count, model="漢字 " * 50) for count in (1, 2)],
    ],
    ids=["one", "zeros", "lines", "bars", "names"],
)
def test_the_file_is_a_picture_of_a_sensible_size(tmp_path: Path, rows: list[Row]) -> None:
    plot.save(chart(rows), tmp_path / "sweep.png")
    width, height = size(tmp_path / "sweep.png")
    assert width == 1560
    assert 150 <= height <= 1600
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.png"]


def test_what_a_user_has_set_for_plots_changes_nothing(tmp_path: Path) -> None:
    import matplotlib

    shown = chart([row("locked", 1), row("locked", 2)])
    plot.save(shown, tmp_path / "one.png")
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "black", "savefig.bbox": "tight"}):
        plot.save(shown, tmp_path / "other.png")
        assert matplotlib.rcParams["font.size"] == 30
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "other.png").read_bytes()


def test_every_measure_has_a_panel() -> None:
    assert tuple(panel.measure for panel in panels.PANELS) == MEASURES

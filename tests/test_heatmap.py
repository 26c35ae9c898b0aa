"""The heat map of a run's precision: what it shows, and that it can be seen in the picture's own pixels."""

from __future__ import annotations

import io
import itertools
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from report_factory import complete, make_config, make_record, make_verdict, read_off
from test_tensorboard import images

from trainer.audit.records import DTYPES, RunRecord, code
from trainer.report import dtypes, heatmap
from trainer.report.dtypes import HeatMap, heat_map
from trainer.report.tensorboard import RunEvents

ROOT = Path(__file__).resolve().parent.parent
FLOAT32, BFLOAT16, FLOAT16 = (code(dtype) for dtype in ("float32", "bfloat16", "float16"))
# TensorBoard's smaller cards are so wide.
CARD = 345

Pixels = NDArray[np.uint8]


def make_run(
    activations: Sequence[Sequence[int]], gradients: Sequence[Sequence[int]] | None = None, asked: int = BFLOAT16
) -> RunRecord:
    """A run of which these codes were read off, a row a replica; gradients like activations where nothing is said."""
    steps = max(len(own) for own in activations)
    record = make_record(make_config(replicas=len(activations), steps=steps))
    complete(record, steps)
    for replica, own, of_gradients in zip(record.replicas, activations, gradients or activations, strict=True):
        read_off(replica, asked=[asked] * steps, activations=own, gradients=of_gradients)
    return record


def gathered(record: RunRecord) -> HeatMap:
    found = heat_map(record)
    assert found is not None
    return found


def picture(record: RunRecord) -> Pixels:
    """The picture's pixels: uint8 [height, width, 3]."""
    with Image.open(io.BytesIO(heatmap.png(gathered(record)))) as image:
        assert image.format == "PNG"
        return np.array(image.convert("RGB"))


def of_colour(pixels: Pixels, colour: str) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = (pixels == tuple(bytes.fromhex(colour[1:]))).all(axis=2)
    return found


def top(pixels: Pixels, replicas: int) -> int:
    """Where the first replica's row begins."""
    return len(pixels) - 2 * heatmap.LINE - heatmap.MARGIN - replicas * heatmap.pixels_per_row(replicas)


def rows(pixels: Pixels, replicas: int) -> list[Pixels]:
    """What is drawn of each replica, without the words at its sides."""
    first, high = top(pixels, replicas), heatmap.pixels_per_row(replicas)
    starts = range(first, first + replicas * high, high)
    return [pixels[start : start + high, heatmap.LEFT : -heatmap.RIGHT] for start in starts]


@pytest.mark.parametrize("step", [0, 4567, 9999, None])
def test_one_step_of_ten_thousand_that_was_off_is_seen(step: int | None) -> None:
    own = [[BFLOAT16] * 10_000 for _ in range(3)]
    if step is not None:
        own[1][step] = FLOAT32
    off = rows(picture(make_run(own)), 3)
    for replica, drawn in enumerate(off):
        marks, leaks = of_colour(drawn, heatmap.OFF), of_colour(drawn, heatmap.COLOURS["float32"])
        if step is None or replica != 1:
            assert not marks.any()
            assert not leaks.any()
            continue
        # Three pixels wide, where the step is, above what was computed in.
        places = np.flatnonzero(marks.any(axis=0))
        assert places.tolist() == np.flatnonzero(leaks.any(axis=0)).tolist()
        assert len(places) == 3
        assert places[1] / (3 * 264) == pytest.approx(step / 10_000, abs=0.01)
        assert marks.sum() >= 3 * 3
        assert leaks.sum() > marks.sum()


@pytest.mark.parametrize("replicas", [2, 64])
def test_it_is_seen_in_the_small_picture_that_tensorboard_shows_first(replicas: int) -> None:
    for step in range(0, 10_000, 1111):
        own = [[BFLOAT16] * 10_000 for _ in range(replicas)]
        own[1][step] = FLOAT32
        pixels = picture(make_run(own))
        # Without the words, of which some are black.
        pixels[: top(pixels, replicas)], pixels[:, : heatmap.LEFT], pixels[:, -heatmap.RIGHT :] = 255, 255, 255
        pixels[top(pixels, replicas) + replicas * heatmap.pixels_per_row(replicas) :] = 255
        whole = Image.fromarray(pixels)
        small = whole.resize((CARD, round(whole.height * CARD / whole.width)), Image.Resampling.NEAREST)
        for colour in (heatmap.OFF, heatmap.COLOURS["float32"]):
            assert of_colour(np.asarray(small), colour).any(), (step, colour)


@pytest.mark.parametrize("replicas", [1, 2, 7, 40, 41, 64])
def test_every_replica_has_a_row_of_its_own(replicas: int) -> None:
    # Each one's dtypes are its number in binary.
    own = [[FLOAT16 if replica >> bit & 1 else BFLOAT16 for bit in range(6)] for replica in range(replicas)]
    pixels = picture(make_run(own))
    drawn = rows(pixels, replicas)
    wide = heatmap.pixels_per_column(6)
    for replica, row in enumerate(drawn):
        middle = row[len(row) // 2, wide // 2 : 6 * wide : wide]
        found = of_colour(middle[np.newaxis], heatmap.COLOURS["float16"])[0]
        assert sum(int(bit) << place for place, bit in enumerate(found)) == replica
        # Rows do not touch.
        assert of_colour(row[-1:, : 6 * wide], heatmap.PAPER).all()
    assert pixels.shape[1] == heatmap.PIXELS_WIDE
    assert len(pixels) < 1400


def test_a_row_has_its_steps_from_left_to_right() -> None:
    (row,) = rows(picture(make_run([[BFLOAT16, FLOAT32, 0, FLOAT16]])), 1)
    middle = row[len(row) // 2, 100:796:199]
    names = ("bfloat16", "float32", "undetermined", "float16")
    expected = [tuple(bytes.fromhex(heatmap.COLOURS[name][1:])) for name in names]
    assert [tuple(pixel) for pixel in middle.tolist()] == expected
    # What tells nothing is not off.
    assert [bool(each) for each in of_colour(row[:1, 100:796:199], heatmap.OFF)[0]] == [False, True, False, True]


def test_gradients_are_a_band_of_their_own_where_they_differ() -> None:
    activations, gradients = [[BFLOAT16, BFLOAT16]], [[BFLOAT16, FLOAT32]]
    found = gathered(make_run(activations, gradients))
    assert found.gradients is not None
    assert found.gradients.tolist() == gradients
    assert found.off.tolist() == [[False, True]]
    assert "Wide bands: activations, off in 0; narrow bands below: gradients, off in 1." in found.caption
    (row,) = rows(picture(make_run(activations, gradients)), 1)
    band = of_colour(row, heatmap.COLOURS["float32"])
    assert not band[:, : heatmap.pixels_per_column(2)].any()
    assert 0 < band[:, 600].sum() < of_colour(row, heatmap.COLOURS["bfloat16"])[:, 600].sum()


@pytest.mark.parametrize("gradients", [None, [[0, BFLOAT16]], [[BFLOAT16, 0]]])
def test_gradients_that_do_not_differ_are_no_band(gradients: list[list[int]] | None) -> None:
    found = gathered(make_run([[BFLOAT16, BFLOAT16]], gradients))
    assert found.gradients is None
    assert "bands" not in found.caption


def test_many_steps_are_columns_that_show_their_first_step_that_was_off() -> None:
    steps = 3 * dtypes.MOST_COLUMNS - 2
    own = [[BFLOAT16] * steps, [0] * steps]
    own[0][4:6] = FLOAT16, FLOAT32
    own[1][10] = BFLOAT16
    found = gathered(make_run(own))
    assert (found.steps_per_column, found.off.shape) == (3, (2, dtypes.MOST_COLUMNS))
    assert found.activations[0].tolist() == [BFLOAT16, FLOAT16] + [BFLOAT16] * (dtypes.MOST_COLUMNS - 2)
    assert np.flatnonzero(found.off).tolist() == [1]
    assert found.steps_off.tolist() == [2, 0]
    # A step that tells a dtype comes before those that tell none.
    assert np.flatnonzero(found.activations[1]).tolist() == [3]
    assert "A column is 3 steps and shows the first of them that was off, if one was." in found.caption


@pytest.mark.parametrize(
    ("steps", "width", "columns"), [(1, 1, 1), (266, 1, 266), (267, 2, 134), (400, 2, 200), (1_000_000, 3760, 266)]
)
def test_there_are_never_more_columns_than_there_is_room_for(steps: int, width: int, columns: int) -> None:
    found = gathered(make_run([[BFLOAT16] * steps]))
    assert (found.steps_per_column, found.activations.shape[1]) == (width, columns)
    assert not (found.activations == dtypes.NOT_DONE).any()


def test_what_was_asked_for_may_change_from_step_to_step() -> None:
    record = make_run([[FLOAT32, BFLOAT16, FLOAT32]])
    read_off(record.replicas[0], asked=[FLOAT32, BFLOAT16, BFLOAT16])
    found = gathered(record)
    assert found.off.tolist() == [[False, False, True]]
    assert found.title == "precision by replica and step: off in 1 of 3"
    assert found.caption == "Asked for: bfloat16 in 2, float32 in 1."


def test_the_title_counts_steps_that_tell_a_dtype() -> None:
    found = gathered(make_run([[0, FLOAT32, BFLOAT16], [FLOAT32, FLOAT32, 0]]))
    assert found.title == "precision by replica and step: off in 3 of 4"
    assert found.steps_off.tolist() == [1, 2]


def test_steps_that_a_replica_did_not_come_to_stay_white() -> None:
    record = make_run([[BFLOAT16] * 8, [BFLOAT16] * 8])
    read_off(record.replicas[1], activations=[BFLOAT16] * 4)
    found = gathered(record)
    assert found.activations[1].tolist() == [BFLOAT16] * 4 + [dtypes.NOT_DONE] * 4
    one, other = rows(picture(record), 2)
    half = 4 * heatmap.pixels_per_column(8)
    assert of_colour(one[len(one) // 2 :][:1, : 2 * half], heatmap.COLOURS["bfloat16"]).all()
    assert of_colour(other[:, half:], heatmap.PAPER).all()


def test_the_longest_words_lie_over_nothing() -> None:
    steps = 1_000_000
    short = gathered(make_run([[BFLOAT16] * dtypes.MOST_COLUMNS] * 64, [[FLOAT32] * dtypes.MOST_COLUMNS] * 64))
    long = replace(
        short,
        title=f"precision by replica and step: off in {64 * steps:,} of {64 * steps:,}",
        caption=f"Asked for: bfloat16 in {64 * steps:,}, float32 in {steps:,}. Wide bands: activations, off in "
        f"{64 * steps:,}; narrow bands below: gradients, off in {64 * steps:,}. A column is 3,760 steps and shows the "
        "first of them that was off, if one was.",
        steps_off=np.full(64, steps),
        steps=steps,
        steps_per_column=3760,
    )
    with Image.open(io.BytesIO(heatmap.png(long))) as image:
        pixels = np.asarray(image.convert("RGB"))
    margin = heatmap.MARGIN - 1
    for edge in (pixels[:margin], pixels[:, :margin], pixels[:, -margin:]):
        assert (edge == 255).all()
    first, end = top(pixels, 64), heatmap.LEFT + 3 * dtypes.MOST_COLUMNS
    drawn = pixels[first : first + 64 * heatmap.pixels_per_row(64)]
    # Between the rows and the numbers at their sides.
    for gap in (drawn[:, heatmap.LEFT - 4 : heatmap.LEFT], drawn[:, end : end + 4]):
        assert (gap == 255).all()


def test_colours_differ_in_lightness_too() -> None:
    def luminance(colour: str) -> float:
        """Relative luminance. Source: WCAG 2.1."""
        parts = (value / 255 for value in bytes.fromhex(colour[1:]))
        linear = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    assert set(heatmap.COLOURS) == set(DTYPES)
    shades = [luminance(colour) for colour in (heatmap.OFF, *heatmap.COLOURS.values(), heatmap.PAPER)]
    assert all((light + 0.05) / (dark + 0.05) > 1.4 for dark, light in itertools.pairwise(shades))


def written(folder: Path, record: RunRecord) -> list[tuple[int, int, int, bytes]]:
    config = make_config(replicas=record.num_replicas, steps=record.steps)
    writer = RunEvents(config, folder)
    writer.rows(record)
    assert images(folder) == {}
    writer.finished(record, make_verdict(config, record))
    writer.close()
    return images(folder).get("precision/heatmap", [])


def test_it_is_written_once_at_the_end_with_its_size(tmp_path: Path) -> None:
    record = make_run([[BFLOAT16] * 45, [BFLOAT16] * 45])
    ((step, width, height, png),) = written(tmp_path, record)
    assert step == 45
    assert png == heatmap.png(gathered(record))
    with Image.open(io.BytesIO(png)) as image:
        assert image.size == (width, height)


@pytest.mark.parametrize("kind", ["audit=none", "undetermined"])
def test_where_no_dtype_was_read_off_there_is_none(tmp_path: Path, kind: str) -> None:
    record = make_record(make_config())
    complete(record, 45, audited=kind != "audit=none")
    if kind == "undetermined":
        for replica in record.replicas:
            read_off(replica, activations=[0] * 45, gradients=[0] * 45)
    assert written(tmp_path, record) == []


def test_pillow_is_imported_when_a_picture_is_drawn_and_not_before() -> None:
    program = (
        "import sys; from report_factory import *; import trainer.report.observer; from trainer.report import heatmap; "
        "from trainer.report.dtypes import heat_map; record = make_record(make_config()); complete(record, 5); "
        "before = 'PIL' in sys.modules; heatmap.png(heat_map(record)); "
        "print(before, 'PIL' in sys.modules, 'matplotlib' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, env=environment, check=True
    )
    assert done.stdout.split() == ["False", "True", "False"]

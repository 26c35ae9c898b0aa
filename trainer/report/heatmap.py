"""The precision of a run as a picture: a row for each replica, steps from left to right.

A row's colour is the dtype read off the activations. Black above it marks what was off: activations or a gradient that
were computed in another dtype than was asked for. Where gradients were ever computed in another dtype than activations,
they are a narrow band of their own below.

Pillow is imported when a picture is drawn and not before.
"""

from __future__ import annotations

import io
import textwrap
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trainer.audit.records import DTYPES
from trainer.report.dtypes import HeatMap

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw

Pixels = NDArray[np.uint8]

# Okabe and Ito's colours, which colour-blind readers can tell apart; each is lighter than the one before it, too.
COLOURS = {"float32": "#0072B2", "float16": "#009E73", "bfloat16": "#E69F00", "undetermined": "#D9D9D9"}
OFF, PAPER, INK = "#000000", "#FFFFFF", "#222222"
PIXELS_WIDE, LEFT, RIGHT, MARGIN = 1020, 100, 120, 14
# All rows together, and one row.
PIXELS_HIGH, LEAST_HIGH, MOST_HIGH = 640, 16, 64
GAP, LEAST_BAND = 2, 3
TITLE_SIZE, TEXT_SIZE, LINE = 36, 27, 38
CHARACTERS = 74
TICKS = 6


def png(what: HeatMap) -> bytes:
    """The picture as a PNG file."""
    from PIL import Image, ImageDraw

    lines = [what.title, *textwrap.wrap(what.caption, CHARACTERS)]
    # Below them come the legend and the heads of the columns at both sides.
    top = MARGIN + LINE * (len(lines) + 2) + LINE // 2
    rows = _rows(what)
    bottom = top + len(rows)
    canvas = np.full((bottom + 2 * LINE + MARGIN, PIXELS_WIDE, 3), _rgb(PAPER), np.uint8)
    canvas[top:bottom, LEFT : LEFT + rows.shape[1]] = rows
    image = Image.fromarray(canvas)
    draw = ImageDraw.Draw(image)
    _write(draw, lines)
    _legend(draw, top - 2 * LINE)
    _sides(draw, what, top)
    _steps(draw, what, bottom)
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


def _rows(what: HeatMap) -> Pixels:
    """Every replica's bands, one below the other."""
    dtypes = np.array([*(_rgb(COLOURS[dtype]) for dtype in DTYPES), _rgb(PAPER)], np.uint8)  # NOT_DONE is the last
    high = pixels_per_row(len(what.off))
    narrow = max(LEAST_BAND, high // 5)
    bands = [(np.array([_rgb(PAPER), _rgb(OFF)], np.uint8)[what.off.astype(np.intp)], narrow)]
    if what.gradients is None:
        bands.append((dtypes[what.activations], high - GAP - narrow))
    else:
        bands.append((dtypes[what.activations], high - GAP - 2 * narrow))
        bands.append((dtypes[what.gradients], narrow))
    canvas = np.full((len(what.off), high, what.off.shape[1], 3), _rgb(PAPER), np.uint8)
    top = 0
    for colours, pixels in bands:
        canvas[:, top : top + pixels] = colours[:, np.newaxis]
        top += pixels
    wide: Pixels = np.repeat(canvas.reshape(-1, *canvas.shape[2:]), pixels_per_column(what.off.shape[1]), axis=1)
    return wide


def pixels_per_row(replicas: int) -> int:
    return min(max(PIXELS_HIGH // replicas, LEAST_HIGH), MOST_HIGH)


def pixels_per_column(columns: int) -> int:
    return (PIXELS_WIDE - LEFT - RIGHT) // columns


def _write(draw: ImageDraw, lines: list[str]) -> None:
    """The title and the caption below it."""
    for line, text in enumerate(lines):
        size = TEXT_SIZE if line else TITLE_SIZE
        draw.text((MARGIN, MARGIN + LINE * (line + 1)), text, INK, _font(size), anchor="ls")


def _legend(draw: ImageDraw, y: int) -> None:
    x, box, font = MARGIN, TEXT_SIZE, _font(TEXT_SIZE)
    for colour, text in (*((COLOURS[dtype], dtype) for dtype in COLOURS), (OFF, "off: not as asked")):
        draw.rectangle((x, y, x + box, y + box), colour)
        draw.text((x + box + 8, y + box // 2), text, INK, font, anchor="lm")
        x += int(box + 28 + font.getlength(text))


def _sides(draw: ImageDraw, what: HeatMap, top: int) -> None:
    """Each replica's number on the left, and how many of its steps were off on the right."""
    font, right = _font(TEXT_SIZE - 5), PIXELS_WIDE - MARGIN
    draw.text((LEFT - 8, top - 6), "replica", INK, font, anchor="rs")
    draw.text((right, top - 6), "steps off", INK, font, anchor="rs")
    for replica, steps in enumerate(what.steps_off):
        y = top + (replica + 0.5) * pixels_per_row(len(what.off))
        draw.text((LEFT - 8, y), str(replica), INK, font, anchor="rm")
        draw.text((right, y), f"{steps:,}", INK, font, anchor="rm")


def _steps(draw: ImageDraw, what: HeatMap, bottom: int) -> None:
    columns = what.off.shape[1]
    font, wide = _font(TEXT_SIZE - 2), pixels_per_column(columns)
    for step in range(0, what.steps, _between_ticks(what.steps)):
        x = LEFT + (step // what.steps_per_column + 0.5) * wide
        draw.line((x, bottom, x, bottom + 5), INK)
        draw.text((x, bottom + 8), f"{step:,}", INK, font, anchor="ma")
    draw.text((LEFT + columns * wide / 2, bottom + 8 + LINE), "step", INK, font, anchor="ma")


def _between_ticks(steps: int) -> int:
    """1, 2 or 5 times a power of ten."""
    power = 1
    while True:
        for each in (power, 2 * power, 5 * power):
            if steps <= each * TICKS:
                return each
        power *= 10


def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _rgb(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour[1:]))

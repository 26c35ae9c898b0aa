"""Where in a tensor updates were lost: every element of the shared variables, with `audit=full`.

An element is off where its final value is not its initial value plus all that was added to it; more than rounding is
counted only. The picture has a map for each of the weights that are off most: the first dimensions as one, against the
last, the longer of the two from left to right. Where there are more elements than pixels, a pixel shows the one that is
off most.

Pillow is imported when a picture is drawn and not before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.audit.conservation import deviations
from trainer.audit.records import RunRecord
from trainer.report.grid import INK, LINE, MARGIN, PAPER, PIXELS_WIDE, TEXT_SIZE, TITLE_SIZE, file_of, font_of

MOST_VARIABLES = 4
# A map's size in pixels, at most, and how wide an element is at most.
WIDE, HIGH, ELEMENT = 600, 160, 24
BAR_WIDE, STEPS = 26, 5
KEPT, LIGHTEST, DARKEST = "#D9D9D9", "#F6C667", "#5A1E00"


@dataclass(frozen=True)
class Map:
    """One variable.

    Attributes:
        off: float64 [rows, columns], how far each element is off; 0 where that is rounding.
        count: elements that are off in some copy.
    """

    name: str
    shape: tuple[int, ...]
    off: NDArray[np.float64]
    count: int


def maps(record: RunRecord) -> list[Map]:
    """The weights with the most elements off; the largest one where none is; nothing without `audit=full`."""
    found = deviations(record)
    if found is None:
        return []
    every = []
    for segment, off, lost, _ in found:
        if segment.kind == "weight":
            worst = np.where(lost, np.nan_to_num(off, nan=np.inf), 0.0).max(axis=0)
            every.append(Map(segment.name, segment.shape, _rows(worst, segment.shape), int(lost.any(axis=0).sum())))
    hurt = sorted((each for each in every if each.count), key=lambda each: -each.count)[:MOST_VARIABLES]
    return hurt or sorted(every, key=lambda each: -each.off.size)[:1]


def _rows(values: NDArray[np.float64], shape: tuple[int, ...]) -> NDArray[np.float64]:
    """A matrix of the elements, no higher than wide; what has one dimension in rows that a picture has room for."""
    if len(shape) > 1:
        matrix = values.reshape(-1, shape[-1])
        return matrix if matrix.shape[1] >= matrix.shape[0] else matrix.T
    wide = max(1, min(len(values), WIDE // 4))
    filled: NDArray[np.float64] = np.pad(values, (0, -len(values) % wide), constant_values=np.nan).reshape(-1, wide)
    return filled


def png(what: Sequence[Map]) -> bytes:
    """The maps one below the other as one PNG file."""
    from PIL import Image, ImageDraw

    drawn = [_pixels(each) for each in what]
    size = sum(math.prod(each.shape) for each in what)
    heads = [
        (TITLE_SIZE, f"elements that lost updates: {sum(each.count for each in what):,} of {size:,}"),
        (TEXT_SIZE, "Final value against initial value plus all that was added."),
    ]
    top = MARGIN + LINE * (len(heads) + 1)
    high = top + sum(LINE * 2 + len(pixels) + LINE for pixels in drawn) + MARGIN
    image = Image.new("RGB", (PIXELS_WIDE, high), PAPER)
    draw = ImageDraw.Draw(image)
    for line, (size, text) in enumerate(heads):
        draw.text((MARGIN, MARGIN + line * LINE + LINE // 2), text, INK, font_of(size), anchor="lm")
    _legend(draw, MARGIN + LINE * len(heads))
    for each, pixels in zip(what, drawn, strict=True):
        shape = "x".join(str(length) for length in each.shape) or "1"
        said = f"{each.name} ({shape}): {each.count:,} of {math.prod(each.shape):,} off"
        draw.text((MARGIN, top + LINE // 2), said, INK, font_of(TEXT_SIZE), anchor="lm")
        largest = _largest(each.off)
        axes = f"the longer side to the right; darkest: off by {largest:.2g}" if each.count else "all within rounding"
        draw.text((MARGIN, top + LINE + LINE // 2), axes, INK, font_of(TEXT_SIZE - 3), anchor="lm")
        image.paste(Image.fromarray(pixels), (MARGIN, top + 2 * LINE))
        draw.rectangle(
            (MARGIN - 1, top + 2 * LINE - 1, MARGIN + pixels.shape[1], top + 2 * LINE + len(pixels)), outline=INK
        )
        top += 3 * LINE + len(pixels)
    return file_of(image)


def _pixels(what: Map) -> NDArray[np.uint8]:
    """uint8 [height, width, 3]."""
    off = _most(_most(what.off, 0, HIGH), 1, WIDE)
    largest = _largest(off)
    # By magnitude: what is off is off by anything from a rounding to the whole value.
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.clip(1 + np.log10(off / largest) / STEPS, 0, 1) if largest else np.zeros_like(off)
    scale = np.array([_rgb(LIGHTEST), _rgb(DARKEST)], np.float64)
    share[np.isinf(off)] = 1
    colours = scale[0] + np.nan_to_num(share)[..., np.newaxis] * (scale[1] - scale[0])
    colours[off == 0], colours[np.isnan(off)] = _rgb(KEPT), _rgb(PAPER)
    high, wide = (max(1, min(ELEMENT, most // length)) for most, length in zip((HIGH, WIDE), off.shape, strict=True))
    pixels: NDArray[np.uint8] = colours.astype(np.uint8).repeat(high, axis=0).repeat(wide, axis=1)
    return pixels


def _largest(off: NDArray[np.float64]) -> float:
    """How far any is off that has a distance."""
    return float(np.max(off, initial=0.0, where=np.isfinite(off)))


def _most(values: NDArray[np.float64], axis: int, pixels: int) -> NDArray[np.float64]:
    """As many along the axis as there are pixels, each the largest of those that it stands for."""
    if values.shape[axis] <= pixels:
        return values
    width = -(-values.shape[axis] // pixels)
    starts = np.arange(0, values.shape[axis], width)
    found: NDArray[np.float64] = np.fmax.reduceat(values, starts, axis=axis)
    return found


def _legend(draw: Any, y: int) -> None:
    x: float = MARGIN
    for colours, text in (((KEPT,), "kept: off by rounding at most"), ((LIGHTEST, DARKEST), "off, little to much")):
        for colour in colours:
            draw.rectangle((x, y + 5, x + BAR_WIDE, y + 5 + TEXT_SIZE - 2), colour)
            x += BAR_WIDE
        draw.text((x + 7, y + LINE // 2), text, INK, font_of(TEXT_SIZE), anchor="lm")
        x += 30 + font_of(TEXT_SIZE).getlength(text)


def _rgb(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour[1:]))

"""A grid of coloured cells with words in them, as a picture: rows and columns with names, a title, a legend.

Drawn twice as wide as TensorBoard's smaller cards, which show every second pixel of it: lines of letters are thick
enough to be read there, too. Other cards are of one height, so a picture is wide rather than high. Colours run from
orange over white to blue, which colour-blind readers can tell apart, and no cell speaks by its colour alone.

Pillow is imported when a picture is drawn and not before.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw

PIXELS_WIDE, MARGIN, GAP = 690, 14, 24
TITLE_SIZE, TEXT_SIZE, SMALLEST, LINE, CELL_HIGH = 26, 21, 11, 29, 40
# What text of these sizes takes of a picture's width, roughly: characters of a title, and of a line.
TITLE_CHARACTERS, CHARACTERS = 50, 62
# Of the width, the most that the names of rows may take.
NAMES = 0.42
PAPER, INK, EDGE = "#FFFFFF", "#222222", "#999999"
BLUE, ORANGE, GREY, LILAC = "#0072B2", "#E69F00", "#D9D9D9", "#CC79A7"


@dataclass(frozen=True)
class Cell:
    text: str
    colour: str = PAPER


@dataclass(frozen=True)
class Grid:
    """What is drawn.

    Attributes:
        across: what the columns are, above their names; down: what the rows are.
        groups: what stands above the columns, each over as many of them; `across` is then told by the caption.
        legend: colours and what they say.
    """

    title: str
    caption: str
    rows: Sequence[str]
    columns: Sequence[str]
    cells: Sequence[Sequence[Cell]]
    legend: Sequence[tuple[str, str]] = ()
    across: str = ""
    down: str = ""
    groups: Sequence[str] = ()


def between(share: float) -> str:
    """The colour of a share from -1, orange, over 0, white, to 1, blue."""
    end = BLUE if share > 0 else ORANGE
    strength = min(abs(share), 1.0)
    return "#" + "".join(f"{round(255 + strength * (part - 255)):02X}" for part in bytes.fromhex(end[1:]))


def png(what: Grid) -> bytes:
    """The grid as a PNG file."""
    from PIL import Image, ImageDraw

    plan = _Plan(what)
    image = Image.new("RGB", (PIXELS_WIDE, plan.high), PAPER)
    plan.draw(ImageDraw.Draw(image))
    return file_of(image)


def file_of(image: Any) -> bytes:
    """A picture as a PNG file of 256 colours, a quarter as long as one of all."""
    content = io.BytesIO()
    image.quantize(256, dither=0).save(content, "PNG", optimize=True)
    return content.getvalue()


class _Plan:
    """Where the parts of a grid stand."""

    def __init__(self, what: Grid) -> None:
        self.what = what
        self.title = textwrap.wrap(what.title, TITLE_CHARACTERS)
        self.caption = textwrap.wrap(what.caption, CHARACTERS)
        font = font_of(TEXT_SIZE)
        widest = max(font.getlength(name) for name in (*what.rows, what.down))
        self.left: int = round(min(widest + 2 * MARGIN, NAMES * PIXELS_WIDE))
        gaps = GAP * max(0, len(what.groups) - 1)
        self.wide: float = (PIXELS_WIDE - self.left - MARGIN - gaps) / max(1, len(what.columns))
        self.heads = [name.split() for name in what.columns]
        self.legend = _lines_of(what.legend)
        lines = len(self.title) + len(self.caption) + len(self.legend)
        heads = max((len(head) for head in self.heads), default=0) + bool(what.across or what.groups)
        self.top = MARGIN + LINE * (lines + heads) + LINE // 2
        self.high = self.top + CELL_HIGH * len(what.rows) + MARGIN

    def left_of(self, column: int) -> float:
        in_group = len(self.what.columns) // max(1, len(self.what.groups))
        return self.left + column * self.wide + GAP * (column // max(1, in_group) if self.what.groups else 0)

    def draw(self, draw: ImageDraw) -> None:
        what, y = self.what, MARGIN
        for size, line in (*((TITLE_SIZE, line) for line in self.title), *((TEXT_SIZE, line) for line in self.caption)):
            draw.text((MARGIN, y + LINE // 2), line, INK, font_of(size), anchor="lm")
            y += LINE
        for entries in self.legend:
            self._legend(draw, entries, y)
            y += LINE
        self._heads(draw, y)
        for row, (name, cells) in enumerate(zip(what.rows, what.cells, strict=True)):
            self._row(draw, self.top + row * CELL_HIGH, name, cells)

    def _heads(self, draw: ImageDraw, y: int) -> None:
        what, font = self.what, font_of(TEXT_SIZE)
        if what.down:
            draw.text((self.left - 8, self.top - 4), what.down, INK, font, anchor="rs")
        above = what.groups or ([what.across] if what.across else [])
        for place, text in enumerate(above):
            first, last = (len(what.columns) * part // len(above) for part in (place, place + 1))
            middle = (self.left_of(first) + self.left_of(last - 1) + self.wide) / 2
            draw.text((middle, y + LINE * 3 // 4), text, INK, font, anchor="mm")
        for column, head in enumerate(self.heads):
            for line, text in enumerate(reversed(head)):
                x = self.left_of(column) + self.wide / 2
                draw.text((x, self.top - 4 - line * LINE), text, INK, _narrow(text, self.wide - 4), anchor="ms")

    def _row(self, draw: ImageDraw, y: int, name: str, cells: Sequence[Cell]) -> None:
        font, middle = font_of(TEXT_SIZE), y + CELL_HIGH // 2
        shown = _end_of(name, self.left - 2 * MARGIN)
        draw.text((self.left - 8, middle), shown, INK, font, anchor="rm")
        for column, cell in enumerate(cells):
            x, end = round(self.left_of(column)), round(self.left_of(column) + self.wide)
            draw.rectangle((x + 1, y + 1, end - 2, y + CELL_HIGH - 2), cell.colour, EDGE)
            font = _narrow(cell.text, self.wide - 6)
            draw.text(((x + end) / 2, middle), cell.text, _readable(cell.colour), font, anchor="mm")

    @staticmethod
    def _legend(draw: ImageDraw, entries: Sequence[tuple[str, str]], y: int) -> None:
        x, box = float(MARGIN), TEXT_SIZE - 2
        for colour, text in entries:
            draw.rectangle((x, y + 5, x + box, y + 5 + box), colour, EDGE)
            draw.text((x + box + 7, y + LINE // 2), text, INK, font_of(TEXT_SIZE), anchor="lm")
            x += box + 25 + font_of(TEXT_SIZE).getlength(text)


def _lines_of(legend: Sequence[tuple[str, str]]) -> list[list[tuple[str, str]]]:
    """The legend's entries, as many in a line as there is room for."""
    lines: list[list[tuple[str, str]]] = []
    x = float(PIXELS_WIDE)
    for colour, text in legend:
        wide = TEXT_SIZE + 25 + font_of(TEXT_SIZE).getlength(text)
        if x + wide > PIXELS_WIDE:
            lines.append([])
            x = MARGIN
        lines[-1].append((colour, text))
        x += wide
    return lines


def _end_of(text: str, wide: float) -> str:
    """As much of the end of a name as there is room for: ends tell names apart."""
    font, shown = font_of(TEXT_SIZE), text
    while len(shown) > 1 and font.getlength(shown if shown == text else f"..{shown}") > wide:
        shown = shown[1:]
    return shown if shown == text else f"..{shown}"


def _narrow(text: str, wide: float) -> Any:
    """A font small enough for the text, as far as it can still be read."""
    size = TEXT_SIZE
    while size > SMALLEST and font_of(size).getlength(text) > wide:
        size -= 1
    return font_of(size)


def _readable(colour: str) -> str:
    red, green, blue = bytes.fromhex(colour[1:])
    return INK if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else PAPER


@cache
def font_of(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)

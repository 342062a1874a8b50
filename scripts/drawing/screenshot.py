"""A terminal's screen as SVG text: cells in, markup out. Knows colours and geometry; runs nothing.

Every run of equal cells is one <text> whose length is given, so that it fills its cells in whatever
monospace font the viewer has. The picture has a background of its own: it reads on any page.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from xml.sax.saxutils import escape, quoteattr

from pyte.screens import Char, Screen

CELL_WIDTH, CELL_HEIGHT, FONT_SIZE = 8.4, 18, 14  # pixels
BASELINE = 13.5  # below the top of a cell
MARGIN, TITLE_HEIGHT = 16, 34
FONTS = "ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace"
PAPER, INK, FRAME, CURSOR = "#161b22", "#d7dde5", "#3d444d", "#8b949e"
# pyte's names; "brown" is what it calls ANSI yellow.
COLORS = {
    "black": "#484f58",
    "red": "#ff7b72",
    "green": "#56d364",
    "brown": "#e3b341",
    "blue": "#6cb6ff",
    "magenta": "#db9cff",
    "cyan": "#4ed0d0",
    "white": "#d7dde5",
    "brightblack": "#8b949e",
    "brightred": "#ffa198",
    "brightgreen": "#aff5b4",
    "brightbrown": "#ffdf7e",
    "brightblue": "#b1d8ff",
    "brightmagenta": "#efd0ff",
    "brightcyan": "#a5f0f0",
    "brightwhite": "#ffffff",
}
_HEX = re.compile("[0-9a-f]{6}")


class FaintScreen(Screen):
    """pyte's screen, which also knows faint text (SGR 2): shown as bright black."""

    def select_graphic_rendition(self, *attrs: int, **kwargs: bool) -> None:
        """SGR; faint comes alone, as the program writes it."""
        super().select_graphic_rendition(*((90,) if attrs == (2,) else attrs), **kwargs)


@dataclass(frozen=True)
class Style:
    """How a run of cells looks; colours as #rrggbb."""

    ink: str
    paper: str
    is_bold: bool = False
    is_underlined: bool = False


@dataclass(frozen=True)
class Run:
    """Characters of one row in one style, from a column on, over so many cells."""

    column: int
    num_cells: int
    text: str
    style: Style


def draw_screen(screen: Screen, title: str) -> str:
    """The whole screen with its cursor, under a line that says what was run."""
    rows = [[screen.buffer[y][x] for x in range(screen.columns)] for y in range(screen.lines)]
    cursor = None if screen.cursor.hidden else (screen.cursor.y, screen.cursor.x)
    return draw_cells(rows, title, cursor)


def draw_cells(
    rows: Sequence[Sequence[Char]], title: str, cursor: tuple[int, int] | None = None
) -> str:
    """SVG of rows of cells, all of one length; `cursor` is (row, column)."""
    width = max(map(len, rows)) * CELL_WIDTH + 2 * MARGIN
    height = len(rows) * CELL_HEIGHT + TITLE_HEIGHT + MARGIN
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}"'
        f' viewBox="0 0 {width:g} {height:g}" role="img" aria-label={quoteattr(title)}>',
        f'<rect x="0.5" y="0.5" width="{width - 1:g}" height="{height - 1:g}" rx="8"'
        f' fill="{PAPER}" stroke="{FRAME}"/>',
        f'<g font-family="{FONTS}" font-size="{FONT_SIZE}" fill="{INK}" xml:space="preserve">',
        f'<text x="{MARGIN}" y="22" fill="{COLORS["brightblack"]}">{escape(title)}</text>',
    ]
    if cursor is not None:
        lines.append(_box(cursor[0], cursor[1], 1, CURSOR))
    for row_idx, row in enumerate(rows):
        for run in runs(row):
            lines += _draw_run(row_idx, run)
    return "\n".join([*lines, "</g>", "</svg>", ""])


def runs(row: Sequence[Char]) -> Iterator[Run]:
    """A row as runs of one style; a wide character, whose second cell is empty, is one by itself.
    Blanks at the ends of a run are left out unless they have a colour."""
    cells = [(x, cell, x + 1 < len(row) and not row[x + 1].data) for x, cell in enumerate(row)]
    solid = [cell for cell in cells if cell[1].data]
    for (style, wide_at), group in groupby(solid, lambda c: (_style(c[1]), c[0] if c[2] else -1)):
        found = list(group)
        text = "".join(cell.data for _, cell, _ in found)
        column = found[0][0]
        if wide_at >= 0:
            yield Run(column, 2, text, style)
            continue
        if style.paper == PAPER and not style.is_underlined:
            column += len(found) - len(text.lstrip(" "))
            text = text.strip(" ")
        if text:
            yield Run(column, len(text), text, style)


def _style(cell: Char) -> Style:
    ink, paper = _color(cell.fg, INK), _color(cell.bg, PAPER)
    if cell.reverse:
        ink, paper = paper, ink
    return Style(ink, paper, cell.bold, cell.underscore)


def _color(name: str, default: str) -> str:
    """#rrggbb of one of pyte's names, of its hex digits, or of "default"."""
    if name == "default":
        return default
    return f"#{name}" if _HEX.fullmatch(name) else COLORS[name]


def _draw_run(row_idx: int, run: Run) -> Iterator[str]:
    style = run.style
    if style.paper != PAPER:
        yield _box(row_idx, run.column, run.num_cells, style.paper)
    if not run.text.strip(" "):
        return
    marks = "" if style.ink == INK else f' fill="{style.ink}"'
    marks += ' font-weight="700"' if style.is_bold else ""
    marks += ' text-decoration="underline"' if style.is_underlined else ""
    x = MARGIN + run.column * CELL_WIDTH
    y = TITLE_HEIGHT + row_idx * CELL_HEIGHT + BASELINE
    yield (
        f'<text x="{x:g}" y="{y:g}" textLength="{run.num_cells * CELL_WIDTH:g}"'
        f' lengthAdjust="spacingAndGlyphs"{marks}>{escape(run.text)}</text>'
    )


def _box(row_idx: int, column: int, num_cells: int, color: str) -> str:
    x, y = MARGIN + column * CELL_WIDTH, TITLE_HEIGHT + row_idx * CELL_HEIGHT
    size = f'width="{num_cells * CELL_WIDTH:g}" height="{CELL_HEIGHT}"'
    return f'<rect x="{x:g}" y="{y:g}" {size} fill="{color}"/>'

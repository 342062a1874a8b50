"""Columns of text. Knows nothing of what stands in them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from kvchat.terminal.show import Fragment

Line = list[Fragment]


def counted(number: int, noun: str) -> str:
    """1 block, 1,024 blocks."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[Line]:
    """Columns two spaces apart; numbers to the right, the header dim."""
    cells = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    is_number = [
        all(re.fullmatch(r"[\d.,%kMx]*( \w+)?", cell) for cell in column)
        for column in zip(*cells[1:], strict=True)
    ] or [False] * len(header)
    lines = []
    for index, row in enumerate(cells):
        parts = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, is_number, strict=True)
        ]
        lines.append([("" if index else "dim", "  ".join(parts).rstrip())])
    return lines

"""What is compared, and the table of it. A pair: kvchat and another, one right after the other."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

HEADER = [
    "sessions x (prompt + reply)",
    "tokens a second",
    "beside",
    "kvchat",
    "it",
    "ratio",
    "pairs",
]
PHASES = ("reading prompts", "writing replies", "replies over all")


class Shape(NamedTuple):
    """So many chats at once, each of a prompt and a reply, in tokens."""

    num_sessions: int
    num_prompt: int
    num_reply: int

    def __str__(self) -> str:
        return f"{self.num_sessions} x ({self.num_prompt} + {self.num_reply})"


class Sample(NamedTuple):
    """Tokens a second of one run, in the order of PHASES; None for what was not measured.

    Prompts are read when the last chat's first token is there; replies are written from then on;
    over all is all replies' tokens over the whole time.
    """

    prompt: float | None
    reply: float | None
    whole: float | None


class Timed(NamedTuple):
    """One run: seconds to the last chat's first token, to the end, and tokens made by then."""

    first_s: float
    whole_s: float
    num_early: int  # of replies, when the last first token came

    def sample(self, shape: Shape) -> Sample:
        """The same as speeds."""
        num_tokens = shape.num_sessions * shape.num_reply
        late_s = self.whole_s - self.first_s
        return Sample(
            shape.num_sessions * shape.num_prompt / self.first_s,
            (num_tokens - self.num_early) / late_s if late_s > 0 else None,
            num_tokens / self.whole_s,
        )


class Missing(Exception):
    """Why a program cannot run this; goes into its row."""


# Runs one repetition of a shape. Raises Missing.
Run = Callable[[Shape, int], Sample]


@dataclass
class Row:
    """kvchat against one other program in one shape."""

    shape: Shape
    other: str
    pairs: list[tuple[Sample, Sample]] = field(default_factory=list)
    missing: str = ""

    def cells(self) -> list[list[str]]:
        """A line for each phase that both were measured in; one where there is none."""
        lines = []
        for phase, name in enumerate(PHASES):
            pairs = [(a, b) for ours, others in self.pairs if (a := ours[phase]) is not None
                     and (b := others[phase]) is not None]  # fmt: skip
            if pairs:
                lines.append([str(self.shape), name, *_compared(pairs, self.other)])
        beside = f"{self.other}: {self.missing or 'nothing to compare'}"
        return lines or [[str(self.shape), "n/a", beside, "n/a", "n/a", "n/a", "0"]]


def compare(
    shapes: Sequence[Shape],
    ours: Run,
    others: Callable[[Shape], dict[str, Run]],
    num_pairs: int,
    progress: Callable[[str], None],
) -> list[Row]:
    """Pairs for every shape and program; one repetition before is not counted. Who is first
    alternates from pair to pair."""
    rows = []
    for shape in shapes:
        programs = others(shape)
        found = [Row(shape, name) for name in programs]
        for pair in range(-1, num_pairs):
            progress(f"{shape}, pair {pair + 1} of {num_pairs}")
            for row in found:
                _add_pair(row, ours, programs[row.other], pair)
        rows += found
    return rows


def markdown(rows: Sequence[Row]) -> list[str]:
    """The table's lines."""
    lines = [HEADER, *(cells for row in rows for cells in row.cells())]
    text = ["| " + " | ".join(cells) + " |" for cells in lines]
    return [text[0], "|:---|:---|:---|---:|---:|:---|---:|", *text[1:]]


def _add_pair(row: Row, ours: Run, other: Run, pair: int) -> None:
    if row.missing:
        return
    try:
        if pair % 2:
            theirs = other(row.shape, pair)
            mine = ours(row.shape, pair)
        else:
            mine = ours(row.shape, pair)
            theirs = other(row.shape, pair)
    except Missing as missing:
        row.missing = str(missing)
        return
    if pair >= 0:
        row.pairs.append((mine, theirs))


def _compared(pairs: list[tuple[float, float]], other: str) -> list[str]:
    ratios = sorted(ours / others for ours, others in pairs)
    ours, others = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratio = f"{statistics.median(ratios):.2f}x ({ratios[0]:.2f}-{ratios[-1]:.2f})"
    return [other, _speed(ours), _speed(others), ratio, str(len(pairs))]


def _speed(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"

"""The pool map shows every held block, whatever the pool's size, in at most 16 rows."""

import pytest

from kvchat.config import KVSpec, SchedulerConfig
from kvchat.engine.build import EngineFacts
from kvchat.terminal import views

COLUMNS = 20


def _draw(owners, names):
    facts = EngineFacts(
        device="cpu",
        dtype="float32",
        spec=KVSpec(1, 1, 8, 16, "float32"),
        scheduler=SchedulerConfig(num_blocks=len(owners)),
    )
    lines = views.pool_lines(owners, names, facts, COLUMNS)
    return ["".join(text for _, text in line) for line in lines]


def test_a_large_pool_draws_what_is_held_and_counts_the_rest():
    owners = ["null", 7, 7, "shared", "cached", 7, *["free"] * 100_000]

    lines = _draw(owners, {7: "chat-1"})

    assert lines[0] == "AA*=A" + "." * 15
    assert lines[-1] == "a cell is 1 x 1.0 KiB, 16 tokens a block; 99,985 more are free"


def test_a_small_pool_is_drawn_whole():
    lines = _draw(["null", 1, *["free"] * 29], {1: "a"})

    assert lines[:2] == ["A" + "." * 19, "." * 10]
    assert "more are free" not in lines[-1]


@pytest.mark.parametrize("extent", [1, 19, 20, 21, 239, 240, 241, 999, 4_800, 5_000])
def test_the_map_keeps_to_16_rows_and_loses_no_block(extent):
    owners = ["null", *[1] * extent, *["free"] * (5_000 - extent)]

    lines = _draw(owners, {1: "a"})

    drawn = [line for line in lines if set(line) <= {"A", "a", "."}]
    per_cell = int(lines[-1].split()[3])
    hidden = (
        int(lines[-1].rpartition("; ")[2].split()[0].replace(",", "")) if ";" in lines[-1] else 0
    )
    num_cells = sum(map(len, drawn))
    assert len(lines) <= 16
    assert "".join(drawn).lower().count("a") == -(-extent // per_cell)
    assert per_cell * (num_cells - 1) < 5_000 - hidden <= per_cell * num_cells

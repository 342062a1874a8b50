"""What compression is for: chats that grow on where a native pool is full."""

from __future__ import annotations

import pytest

from kvchat.bench.capacity import MODES, Capacity, format_capacity, measure_capacity
from kvchat.bench.plot import draw_capacity
from kvchat.config import KVSpec


@pytest.mark.parametrize("chat_tokens", [2048, 8192])
def test_a_pool_of_the_same_bytes_serves_more_turns_before_anybody_gives_way(chat_tokens):
    modes = ("native", "auto", "auto4")

    native, auto, auto4 = (measure_capacity(m, chat_tokens, turns_per_chat=8) for m in modes)

    print(format_capacity([native, auto, auto4]))
    assert native.num_turns == 8 * 8  # each of the eight chats as long as was said
    assert auto4.num_blocks < auto.num_blocks < native.num_blocks
    assert auto.num_turns >= 1.8 * native.num_turns
    assert auto4.num_turns >= 3 * native.num_turns


def test_the_report_is_a_markdown_table():
    rows = [Capacity("native", 2048, 1025, 256, 16456), Capacity("auto", 2048, 1009, 478, 30664)]

    assert format_capacity(rows).splitlines()[2:] == [
        "| 2,048 | native | 1,025 | 256 | 16,456 | 1.00 |",
        "| 2,048 | auto | 1,009 | 478 | 30,664 | 1.87 |",
    ]


def test_what_is_held_is_told_after_each_turn():
    spec = KVSpec(num_layers=2, num_kv_heads=1, head_dim=64, block_size=16, dtype="bfloat16")

    found = measure_capacity("auto", 256, spec, turns_per_chat=4)

    assert len(found.held) == found.num_turns
    tokens, sizes = zip(*found.held, strict=True)
    assert tokens == tuple(8 + 64 * (turn + 1) for turn in range(found.num_turns))
    assert max(sizes) <= found.pool_bytes


def test_memory_against_turns_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "memory.svg"
    found = [measure_capacity(mode, 512, turns_per_chat=4) for mode in MODES]

    draw_capacity(found, path)

    svg = path.read_text()
    for c in found:
        assert f">{c.num_turns} turns<" in svg
    assert "the same tokens, all native" in svg

"""What compression is for: chats that grow on where a native pool is full."""

from __future__ import annotations

import pytest

from kvchat.bench.capacity import Capacity, format_capacity, measure_capacity


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

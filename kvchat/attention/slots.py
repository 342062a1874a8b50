"""Where a step's new tokens stand and where their K and V go. Plain numbers, shared by backends."""

from __future__ import annotations

from kvchat.attention import AttentionBatch
from kvchat.kv.layout import BLOCK_ID_MASK


def plan_positions(batch: AttentionBatch) -> list[int]:
    """[num_tokens] positions of the new tokens in their sequences, in row order."""
    return [
        position
        for num_new, seq_len in zip(batch.query_lens, batch.seq_lens, strict=True)
        for position in range(seq_len - num_new, seq_len)
    ]


def plan_slots(batch: AttentionBatch, block_size: int) -> list[int]:
    """[num_tokens] slots (block_id * block_size + offset) of the new tokens, in row order.

    New tokens are always written to native blocks, whose entries are their ids.
    """
    slots = [
        table[position // block_size] * block_size + position % block_size
        for num_new, seq_len, table in zip(
            batch.query_lens, batch.seq_lens, batch.block_tables, strict=True
        )
        for position in range(seq_len - num_new, seq_len)
    ]
    assert min(slots) >= block_size, f"slot {min(slots)} lies in the null block"
    last_id = max(slots) // block_size
    assert last_id <= BLOCK_ID_MASK, f"entry {last_id:#x} is of a compressed block"
    return slots

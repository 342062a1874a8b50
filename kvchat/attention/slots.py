"""Where a step's new tokens stand and where their K and V go. Plain numbers, shared by backends."""

from __future__ import annotations

import numpy as np

from kvchat.attention import AttentionBatch
from kvchat.config import DTYPE_BYTES
from kvchat.kv.layout import BLOCK_ID_MASK, CODEC_SHIFT, K_GROUP, BlockLayout, Codec, v_group


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


def stored_bytes(layout: BlockLayout, table: np.ndarray, skipped: int, last_tokens: int) -> int:
    """Bytes of one layer and kv head that hold the entries in `table`, scales included.

    table: int32, the end of a sequence's, whose first stands `skipped` entries after the
    sequence's; the last holds last_tokens.
    """
    block_size, dim = layout.spec.block_size, layout.spec.head_dim
    codecs = table >> CODEC_SHIFT
    is_int4 = codecs == Codec.INT4
    num_native, num_int8, num_int4 = (int((codecs == codec).sum()) * block_size for codec in Codec)
    if codecs[-1] == Codec.NATIVE:
        num_native -= block_size - last_tokens
    size = 2 * num_native * dim * DTYPE_BYTES[layout.spec.dtype] + 2 * num_int8 * (dim + 2)
    if num_int4:
        positions = (skipped + np.flatnonzero(is_int4)) * block_size
        num_groups = np.unique(positions // K_GROUP).size
        size += num_int4 * (dim + 2 * dim // v_group(dim)) + num_groups * (3 * dim + 2)
    return size

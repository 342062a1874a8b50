"""What holds of a block pool between any two calls, asserted. Slow: for tests and failures."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvchat.config import NULL_BLOCK_ID
from kvchat.kv.layout import Codec, block_ids, pack_entry, unpack_entry
from kvchat.kv.prefix import is_same

if TYPE_CHECKING:
    from kvchat.kv.block_pool import BlockPool, Sequence


def check_blocks(pool: BlockPool) -> None:
    """Every block is in one place, and what is findable is sealed, live or cached."""
    recycled, cached = pool._recycled, pool._cached
    untouched = range(pool._num_touched, pool.num_blocks)
    live = [block_id for block_id, num_refs in enumerate(pool._ref_counts) if num_refs]
    places = [NULL_BLOCK_ID, *recycled, *untouched, *cached, *live]
    assert sorted(places) == list(range(pool.num_blocks)), (
        f"null, {recycled=}, {untouched=}, {cached=}, {live=}: not every block once"
    )
    assert pool.num_held == len(live), f"{pool.num_held=} {live=}"
    num_spare = pool.num_usable - len(live)
    assert pool.num_free == max(0, num_spare - pool.num_reserved), f"{pool.num_free=} {num_spare=}"
    sealed = pool._index.check(pool._codecs)
    assert cached.keys() <= sealed, f"{cached=} not all in {sealed=}"
    assert sealed.isdisjoint((*recycled, *untouched)), f"{sealed=}, {recycled=}"


def check_sequences(pool: BlockPool, sequences: list[Sequence]) -> None:
    """The live sequences are these: their tables are sound and explain every reference."""
    num_refs = [0] * pool.num_blocks
    for seq in sequences:
        _check_counts(pool, seq)
        _check_spans(pool, seq)
        _check_text(pool, seq)
        for block_id in block_ids(seq.table):
            num_refs[block_id] += 1
    assert num_refs == pool._ref_counts, f"named {num_refs} times, {pool._ref_counts=}"


def _check_counts(pool: BlockPool, seq: Sequence) -> None:
    assert len(seq.table) == -(-seq.num_tokens // pool.block_size), f"{seq=}"
    assert seq.num_sealed * pool.block_size <= seq.num_tokens, f"{seq=}"
    assert seq.num_blocks == len(block_ids(seq.table)), f"{seq=}"


def _check_spans(pool: BlockPool, seq: Sequence) -> None:
    """Compressed blocks stand whole, aligned and sealed."""
    table, idx = seq.table, 0
    while idx < len(table):
        block_id, codec, _ = unpack_entry(table[idx])
        num_entries = pool.span_blocks[codec]
        span = [pack_entry(block_id, codec, i) for i in range(num_entries)]
        assert table[idx : idx + num_entries] == span, f"{idx=} is not {span=}: {seq=}"
        assert idx % num_entries == 0, f"{span=} at {idx=}: {seq=}"
        assert codec == pool._codecs[block_id], f"{block_id=} is {pool._codecs[block_id]!r}: {seq=}"
        idx += num_entries
        assert codec == Codec.NATIVE or idx <= seq.num_sealed, f"{span=} is not sealed: {seq=}"


def _check_text(pool: BlockPool, seq: Sequence) -> None:
    """The keys of what is sealed are those of the sequence's own text."""
    prefix, table = seq.prefix, seq.table
    for idx in reversed(range(seq.num_sealed)):
        assert prefix is not None, f"prefix shorter than {seq.num_sealed} entries"
        block_id, codec, span_idx = unpack_entry(table[idx])
        if span_idx == pool.span_blocks[codec] - 1:
            held = pool._prefixes[block_id]
            assert held is None or is_same(held, prefix), f"{block_id=} holds another text"
        prefix = prefix.parent
    assert prefix is None, f"prefix longer than {seq.num_sealed} entries"

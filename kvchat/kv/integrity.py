"""What must hold of a block pool, asserted. Knows its insides; changes nothing."""

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
        assert len(seq.table) == -(-seq.num_tokens // pool.block_size), f"{seq=}"
        assert seq.num_sealed * pool.block_size <= seq.num_tokens, f"{seq=}"
        ids_by_end = _check_spans(pool, seq)
        assert seq.num_blocks == len(ids_by_end), f"{seq=}"
        _check_text(pool, seq, ids_by_end)
        for block_id in ids_by_end.values():
            num_refs[block_id] += 1
    assert num_refs == pool._ref_counts, f"named {num_refs} times, {pool._ref_counts=}"


def check_span(pool: BlockPool, holders: list[Sequence], start: int, codec: Codec) -> None:
    """The span of entries from `start` may become one block of `codec`; these are its holders."""
    end = start + pool.span_blocks[codec]
    span = holders[0].table[start:end]
    assert start % pool.span_blocks[codec] == 0, f"a span of {codec!r} at {start}"
    codecs = {pool.codec(block_id) for block_id in block_ids(span)}
    assert len(codecs) == 1 and max(codecs) < codec, f"{span=} of {codecs} to {codec!r}"
    for seq in holders:
        assert seq.num_sealed >= end and seq.table[start:end] == span, f"{span=} {end=} {seq=}"
    for block_id in block_ids(span):
        assert pool.ref_count(block_id) == len(holders), f"{block_id=} has other holders"


def _check_spans(pool: BlockPool, seq: Sequence) -> dict[int, int]:
    """Compressed blocks stand whole, aligned and sealed. Blocks by the index of the next entry."""
    table, end = seq.table, 0
    ids_by_end: dict[int, int] = {}
    while end < len(table):
        start = end
        block_id, codec, span_idx = unpack_entry(table[start])
        assert span_idx == 0, f"{start=} is the middle of a span: {seq=}"
        assert codec == pool._codecs[block_id], f"{block_id=} is {pool._codecs[block_id]!r}: {seq=}"
        end += pool.span_blocks[codec]
        ids_by_end[end] = block_id
        if codec != Codec.NATIVE:
            span = [pack_entry(block_id, codec, i) for i in range(end - start)]
            assert table[start:end] == span, f"{start=} is not {span=}: {seq=}"
            assert start % len(span) == 0 and end <= seq.num_sealed, f"{start=} {span=} {seq=}"
    return ids_by_end


def _check_text(pool: BlockPool, seq: Sequence, ids_by_end: dict[int, int]) -> None:
    """The keys of what is sealed are those of the sequence's own text."""
    prefix = seq.prefix
    for end in range(seq.num_sealed, 0, -1):
        assert prefix is not None, f"prefix shorter than {seq.num_sealed} entries"
        if end in ids_by_end:
            held = pool._prefixes[ids_by_end[end]]
            assert held is None or is_same(held, prefix), f"{ids_by_end[end]} holds another text"
        prefix = prefix.parent
    assert prefix is None, f"prefix longer than {seq.num_sealed} entries"

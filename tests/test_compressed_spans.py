"""Compressed spans in the block pool, by exact ids: who is rewritten, what is found and kept."""

from __future__ import annotations

import pytest

from kvchat.attention import AttentionBatch
from kvchat.attention.slots import plan_slots
from kvchat.kv.block_pool import BlockPool, CompressSpan, CopyBlock, Sequence
from kvchat.kv.layout import Codec, block_ids, pack_entry

NATIVE, INT8, INT4 = Codec.NATIVE, Codec.INT8, Codec.INT4
FP16, FP32 = (1, 2, 4), (1, 4, 8)  # span_blocks
TEXT = [*range(1, 41)]  # ten blocks of four


def make_pool(num_blocks: int = 20, span_blocks: tuple[int, ...] = FP16, **kwargs) -> BlockPool:
    return BlockPool(num_blocks, 4, span_blocks=span_blocks, **kwargs)


def computed(pool: BlockPool, token_ids: list[int]) -> Sequence:
    """A sequence over token_ids, all of them computed and its full blocks sealed."""
    seq = pool.alloc(token_ids)
    assert pool.append(seq, len(token_ids) - seq.num_tokens) is not None
    pool.seal(seq, token_ids, len(token_ids))
    return seq


def compress(pool: BlockPool, seq: Sequence, start: int, codec: Codec, *others: Sequence):
    holders = pool.holders(seq, start, pool.span_blocks[codec], [seq, *others])
    assert holders is not None
    return pool.compress(holders, start, codec)


def span(block_id: int, codec: Codec, num_entries: int) -> list[int]:
    return [pack_entry(block_id, codec, idx) for idx in range(num_entries)]


# Compression


def test_two_native_blocks_become_one_int8_block_and_are_free_at_once():
    pool = make_pool(8)
    seq = computed(pool, TEXT[:17])
    assert (seq.table, seq.num_blocks, pool.num_free) == ([1, 2, 3, 4, 5], 5, 2)

    op = compress(pool, seq, 2, INT8)

    assert op == CompressSpan(srcs=(3, 4), src_codec=NATIVE, dst=6, codec=INT8)
    assert seq.table == [1, 2, *span(6, INT8, 2), 5]
    assert (seq.num_tokens, seq.num_sealed, seq.num_blocks) == (17, 4, 4)
    assert pool.map() == ["null", 1, 1, "free", "free", 1, 1, "free"]
    assert [pool.codec(block_id) for block_id in (1, 6)] == [NATIVE, INT8]
    assert (pool.num_free, pool.num_held) == (3, 4)
    assert pool.append(seq, 8) == []
    assert seq.table[5:] == [3, 4]  # native again
    assert pool.codec(3) == NATIVE
    pool.check_integrity([seq])


@pytest.mark.parametrize("span_blocks", [FP16, FP32])
def test_a_span_goes_down_the_ladder_in_one_step_or_in_two(span_blocks):
    _, num_8, num_4 = span_blocks
    for is_direct in (True, False):
        pool = make_pool(20, span_blocks)
        seq = computed(pool, TEXT[: 4 * num_4 + 1])
        if not is_direct:
            for start in range(0, num_4, num_8):
                compress(pool, seq, start, INT8)

        op = compress(pool, seq, 0, INT4)

        assert (len(op.srcs), op.codec) == ((num_4, INT4) if is_direct else (num_4 // num_8, INT4))
        assert op.src_codec == (NATIVE if is_direct else INT8)
        assert seq.table == [*span(op.dst, INT4, num_4), num_4 + 1]
        assert (seq.num_blocks, pool.num_held) == (2, 2)
        assert pool.match(TEXT[: 4 * num_4 + 1]) == 4 * num_4
        pool.check_integrity([seq])


def test_the_counters_tell_spans_and_freed_blocks_by_codecs():
    pool = make_pool()
    seq = computed(pool, TEXT)
    for start in (0, 2):
        compress(pool, seq, start, INT8)
    compress(pool, seq, 0, INT4)
    compress(pool, seq, 4, INT4)

    kinds = {(NATIVE, INT8): 2, (INT8, INT4): 1, (NATIVE, INT4): 1}
    assert pool.counters.num_compressions == kinds
    assert pool.counters.num_blocks_freed == {**kinds, (NATIVE, INT4): 3}
    assert (seq.num_blocks, pool.num_held) == (4, 4)


def test_every_holder_is_rewritten_and_holds_the_block():
    pool = make_pool()
    parent = computed(pool, TEXT[:18])
    child = pool.fork(parent, 18)
    other = pool.alloc(TEXT[:13])  # three blocks, by the index
    assert pool.holders(parent, 0, 2, [child, parent, other]) == [child, parent, other]

    op = compress(pool, parent, 0, INT8, child, other)

    assert op == CompressSpan((1, 2), NATIVE, 6, INT8)
    assert parent.table == child.table == [*span(6, INT8, 2), 3, 4, 5]
    assert other.table == [*span(6, INT8, 2), 3]
    assert (parent.num_blocks, child.num_blocks, other.num_blocks) == (4, 4, 2)
    assert [pool.ref_count(block_id) for block_id in (1, 2, 6)] == [0, 0, 3]
    pool.check_integrity([parent, child, other])
    pool.free(parent)
    pool.free(child)
    pool.free(other)
    assert (pool.num_held, pool.num_free) == (0, 19)
    pool.check_integrity([])


@pytest.mark.parametrize("num_tokens", [4, 5, 7])
def test_a_span_is_not_compressed_while_somebody_holds_a_part_of_it(num_tokens):
    pool = make_pool()
    parent = computed(pool, TEXT[:17])
    child = pool.fork(parent, num_tokens)  # one block, or one and an open tail in the second

    assert pool.holders(parent, 0, 2, [parent, child]) is None
    assert pool.holders(child, 0, 2, [parent, child]) is None
    assert pool.holders(parent, 2, 2, [parent, child]) == [parent]
    assert pool.holders(parent, 0, 4, [parent, child]) is None
    assert pool.append(child, 9 - num_tokens) is not None
    pool.free(child)
    assert pool.holders(parent, 0, 4, [parent]) == [parent]


def test_a_holder_that_was_not_named_is_missed_by_its_reference():
    pool = make_pool()
    parent = computed(pool, TEXT[:17])
    child = pool.fork(parent, 17)

    assert pool.holders(parent, 0, 2, [parent]) is None
    with pytest.raises(AssertionError):
        pool.compress([parent], 0, INT8)
    pool.check_integrity([parent, child])


def test_a_span_that_is_not_sealed_or_not_there_has_no_holders():
    pool = make_pool()
    seq = pool.alloc(TEXT)
    pool.append(seq, 17)
    pool.seal(seq, TEXT, 15)  # three blocks

    assert pool.holders(seq, 0, 2, [seq]) == [seq]
    assert pool.holders(seq, 2, 2, [seq]) is None
    assert pool.holders(seq, 4, 2, [seq]) is None
    assert pool.holders(seq, 8, 2, [seq]) is None


def test_what_may_not_be_compressed_asserts():
    pool = make_pool()
    seq = computed(pool, TEXT)
    compress(pool, seq, 0, INT8)
    compress(pool, seq, 4, INT4)
    before = (pool.map(), list(seq.table))

    for start, codec in [(3, INT8), (2, INT4), (0, INT4), (0, INT8), (4, INT8), (4, INT4)]:
        # not aligned, twice; of two codecs; of the target's; to a better one; of the target's
        with pytest.raises(AssertionError):
            pool.compress([seq], start, codec)
    with pytest.raises(AssertionError):
        pool.holders(seq, 3, 2, [seq])
    pool.truncate(seq, 38)
    with pytest.raises(AssertionError):
        pool.compress([seq], 8, INT8)  # its last block is an open tail now
    assert (pool.map(), seq.table) == before
    pool.check_integrity([seq])


# A full pool and its reserve


def test_a_full_pool_compresses_with_its_reserve_and_gives_it_back():
    pool = make_pool(7, num_reserved=1)
    seq = computed(pool, TEXT[:20])
    assert (pool.num_usable, pool.num_held, pool.num_free) == (6, 5, 0)
    assert pool.append(seq, 1) is None

    assert compress(pool, seq, 0, INT8) == CompressSpan((1, 2), NATIVE, 6, INT8)

    assert pool.num_free == 1
    assert pool.append(seq, 1) == []
    assert (seq.table, pool.num_free) == ([*span(6, INT8, 2), 3, 4, 5, 1], 0)
    assert compress(pool, seq, 2, INT8) == CompressSpan((3, 4), NATIVE, 2, INT8)
    pool.check_integrity([seq])


def test_a_full_pool_without_a_reserve_cannot_compress_and_nothing_changes():
    pool = make_pool(6)
    seq = computed(pool, TEXT[:20])
    before = (pool.map(), list(seq.table), seq.num_blocks, pool.match(TEXT[:21]))

    assert compress(pool, seq, 0, INT8) is None

    assert (pool.map(), seq.table, seq.num_blocks, pool.match(TEXT[:21])) == before
    assert pool.counters.num_compressions == {}
    pool.check_integrity([seq])


def test_a_copy_on_write_may_take_the_reserve_and_what_goes_with_it_may_not():
    pool = make_pool(6, num_reserved=1)
    parent = computed(pool, TEXT[:14])
    child = pool.fork(parent, 14)
    assert pool.num_free == 0

    assert pool.append(child, 3) is None  # a copy and a block
    assert pool.append(child, 2) == [CopyBlock(4, 5)]

    assert (pool.num_free, pool.num_held) == (0, 5)
    assert compress(pool, parent, 0, INT8, child) is None  # the reserve is in use
    pool.free(child)
    assert pool.num_free == 0  # the reserve is filled up first
    assert compress(pool, parent, 0, INT8) is not None
    assert pool.num_free == 1


def test_compressing_evicts_when_only_cached_blocks_are_left():
    pool = make_pool(8)
    pool.free(computed(pool, [*[99] * 4, *[98] * 4]))  # 1 and 2 are cached
    seq = computed(pool, TEXT[:20])
    assert pool.map() == ["null", "cached", "cached", 1, 1, 1, 1, 1]

    op = compress(pool, seq, 0, INT8)

    assert op == CompressSpan((3, 4), NATIVE, 2, INT8)
    assert pool.counters.num_evictions == 1
    pool.check_integrity([seq])


# The prefix index


def test_what_is_compressed_is_found_and_its_sources_and_descendants_as_they_are():
    pool = make_pool()
    seq = computed(pool, TEXT[:26])
    compress(pool, seq, 0, INT4)
    assert pool.map()[:8] == ["null", "free", "free", "free", "free", 1, 1, 1]

    again = pool.alloc(TEXT[:26])

    assert (again.table, again.num_tokens) == ([*span(8, INT4, 4), 5, 6], 24)
    assert (again.num_sealed, again.num_blocks) == (6, 3)
    assert pool.ref_count(8) == 2
    pool.free(seq)
    pool.free(again)
    assert pool.num_cached == 3
    assert pool.match(TEXT[:26]) == 24
    pool.check_integrity([])


@pytest.mark.parametrize("num_tokens, matched", [(17, 16), (16, 8), (13, 8), (9, 8), (8, 0)])
def test_a_compressed_block_is_found_only_wholly_inside_the_usable_prefix(num_tokens, matched):
    pool = make_pool()
    seq = computed(pool, TEXT[:17])
    compress(pool, seq, 0, INT8)
    compress(pool, seq, 2, INT8)

    assert pool.match(TEXT[:num_tokens]) == matched


def test_native_is_found_first_then_int8_then_int4():
    pool = make_pool()
    text = TEXT[:17]
    seq = computed(pool, text)
    compress(pool, seq, 0, INT4)
    other = computed(pool, text[:16])  # a last token is left over, so the INT4 block is too long
    assert (seq.table, other.table) == ([*span(6, INT4, 4), 5], [1, 2, 3, 4])

    assert pool.match(text) == 16
    found = []
    for start, codec in [(2, INT8), (0, INT8), (0, INT4)]:
        hit = pool.alloc(text)
        found.append(list(hit.table))
        pool.free(hit)
        compress(pool, other, start, codec)

    assert found == [
        [1, 2, 3, 4],
        [1, 2, *span(7, INT8, 2)],
        [*span(3, INT8, 2), *span(7, INT8, 2)],
    ]
    assert pool.alloc(text).table == span(6, INT4, 4)  # the first to be sealed so
    pool.check_integrity()


def test_a_short_native_prefix_does_not_hide_a_compressed_one_that_reaches_farther():
    pool = make_pool()
    seq = computed(pool, TEXT[:25])
    compress(pool, seq, 0, INT4)
    compress(pool, seq, 4, INT8)
    short = computed(pool, TEXT[:12])  # three native blocks
    assert seq.table == [*span(8, INT4, 4), *span(1, INT8, 2), 7]
    assert short.table == [5, 6, 2]

    assert pool.alloc(TEXT[:13]).table == [5, 6, 2]
    assert pool.alloc(TEXT[:17]).table == span(8, INT4, 4)
    assert pool.alloc(TEXT[:25]).table == [*span(8, INT4, 4), *span(1, INT8, 2)]


def test_descendants_are_found_again_behind_a_prefix_that_is_computed_anew():
    pool = make_pool()
    seq = computed(pool, TEXT[:21])
    compress(pool, seq, 0, INT4)
    pool.unseal(pool.fork(seq, 16))  # only the INT4 block loses its key
    assert pool.match(TEXT[:21]) == 0

    again = computed(pool, TEXT[:17])
    assert pool.match(TEXT[:21]) == 20
    compress(pool, again, 0, INT8)

    assert pool.alloc(TEXT[:21]).table == [*again.table[:4], 5]


def test_a_second_equal_compressed_block_has_no_key():
    pool = make_pool()
    first = computed(pool, TEXT[:9])
    compress(pool, first, 0, INT8)
    second = computed(pool, TEXT[:8])
    assert (first.table, second.table) == ([*span(4, INT8, 2), 3], [1, 2])

    assert compress(pool, second, 0, INT8) == CompressSpan((1, 2), NATIVE, 5, INT8)

    assert pool.alloc(TEXT[:9]).table == span(4, INT8, 2)
    pool.free(second)
    assert pool.map()[5] == "free"


def test_the_key_of_an_equal_block_that_is_evicted_for_it_is_free():
    pool = make_pool(6)
    first = computed(pool, TEXT[:8])
    compress(pool, first, 0, INT8)
    pool.free(first)  # block 3 is cached as INT8
    second = computed(pool, TEXT[:8])
    filler = pool.alloc([])
    pool.append(filler, 8)
    assert pool.map() == ["null", 1, 1, "cached", 1, 1]

    assert compress(pool, second, 0, INT8) == CompressSpan((1, 2), NATIVE, 3, INT8)

    assert pool.alloc(TEXT[:9]).table == span(3, INT8, 2)


def test_what_was_unsealed_is_not_found_again_as_a_compressed_block():
    pool = make_pool()
    seq = computed(pool, TEXT[:17])
    pool.unseal(seq)
    compress(pool, seq, 0, INT8)
    compress(pool, seq, 2, INT8)
    compress(pool, seq, 0, INT4)

    assert pool.match(TEXT[:17]) == 0
    pool.free(seq)
    assert pool.num_cached == 0


def test_unseal_takes_the_key_of_a_compressed_block():
    pool = make_pool()
    seq = computed(pool, TEXT[:17])
    compress(pool, seq, 0, INT8)
    pool.unseal(seq)

    assert pool.match(TEXT[:17]) == 0
    pool.check_integrity([seq])


@pytest.mark.parametrize("is_freed_first", [False, True])
def test_a_block_that_was_not_encoded_is_not_found_again(is_freed_first):
    pool = make_pool()
    seq = computed(pool, TEXT[:17])
    child = pool.fork(seq, 17)
    op = compress(pool, seq, 0, INT8, child)

    for holder in (seq, child) if is_freed_first else ():
        pool.free(holder)
    pool.distrust(op)
    for holder in () if is_freed_first else (seq, child):
        pool.free(holder)

    assert pool.match(TEXT[:17]) == 0
    assert pool.map()[:7] == ["null", "free", "free", "cached", "cached", "free", "free"]
    pool.distrust(op)  # once more is no harm
    pool.check_integrity([])


# Forks and truncation


@pytest.mark.parametrize(
    "num_tokens, num_kept", [(0, 0), (1, 0), (15, 0), (16, 16), (17, 16), (23, 16), (24, 24)]
)
def test_a_compressed_span_is_kept_whole_or_not_at_all(num_tokens, num_kept):
    pool = make_pool()
    seq = computed(pool, TEXT[:30])  # INT4 of 16 tokens, INT8 of 8, two native blocks
    compress(pool, seq, 0, INT4)
    compress(pool, seq, 4, INT8)
    whole = list(seq.table)

    child = pool.fork(seq, num_tokens)
    assert (child.num_tokens, child.num_sealed) == (num_kept, num_kept // 4)
    assert child.table == whole[: num_kept // 4]
    pool.check_integrity([seq, child])
    assert pool.num_kept(seq, num_tokens) == num_kept
    assert pool.truncate(seq, num_tokens) == num_kept

    assert (seq.table, seq.num_tokens, seq.num_sealed) == (child.table, num_kept, num_kept // 4)
    assert seq.num_blocks == child.num_blocks == {0: 0, 16: 1, 24: 2}[num_kept]
    pool.check_integrity([seq, child])
    assert pool.append(seq, 3) == []  # nothing of a span is copied: the tail is a block of its own
    assert (len(seq.table), seq.table[-1]) == (num_kept // 4 + 1, block_ids(seq.table)[-1])


def test_behind_the_compressed_spans_fork_and_truncate_are_what_they_were():
    pool = make_pool()
    seq = computed(pool, TEXT[:30])
    compress(pool, seq, 0, INT4)

    child = pool.fork(seq, 27)
    assert (child.num_tokens, child.num_blocks) == (27, 4)
    assert pool.truncate(seq, 30) == 30
    assert pool.truncate(seq, 22) == 22
    assert (seq.num_blocks, seq.num_sealed) == (3, 5)
    assert pool.append(seq, 2) == [CopyBlock(6, 8)]
    assert pool.append(child, 1) == [CopyBlock(7, 1)]
    assert (seq.num_blocks, child.num_blocks) == (3, 4)
    pool.check_integrity([seq, child])


def test_a_span_cut_by_an_undo_is_recomputed_natively_and_keyed_beside_the_compressed_one():
    pool = make_pool()
    seq = computed(pool, TEXT[:17])
    compress(pool, seq, 0, INT8)
    assert pool.truncate(seq, 6) == 0

    pool.append(seq, 8)
    pool.seal(seq, TEXT, 8)

    assert seq.table == [5, 1]
    assert pool.map()[:7] == ["null", 1, "free", "cached", "cached", 1, "cached"]
    assert pool.alloc(TEXT[:17]).table == [5, 1, 3, 4]


def test_fork_inside_another_sessions_window_shares_as_one_made_long_after():
    """The native window is shared; once it leaves it, it is compressed in both at once."""
    pool = make_pool()
    parent = computed(pool, TEXT[:26])
    compress(pool, parent, 0, INT8)
    child = pool.fork(parent, 18)
    assert pool.num_held == 6

    assert pool.holders(parent, 4, 2, [parent, child]) is None  # the child's open tail
    assert pool.append(child, 2) == [CopyBlock(5, 1)]
    assert pool.holders(parent, 4, 2, [parent, child]) == [parent]
    assert compress(pool, parent, 2, INT8, child) == CompressSpan((3, 4), NATIVE, 2, INT8)

    assert parent.table == [*span(8, INT8, 2), *span(2, INT8, 2), 5, 6, 7]
    assert child.table == [*span(8, INT8, 2), *span(2, INT8, 2), 1]
    pool.check_integrity([parent, child])


# The rest


def test_check_integrity_sees_a_broken_span():
    def broken(harm):
        pool = make_pool()
        seq = computed(pool, TEXT[:26])
        compress(pool, seq, 0, INT8)
        compress(pool, seq, 2, INT8)
        pool.check_integrity([seq])
        harm(pool, seq)
        with pytest.raises(AssertionError):
            pool.check_integrity([seq])

    # The table is [8, 8, 1, 1, 5, 6, 7] by blocks, 8 and 1 are INT8.
    broken(lambda pool, seq: seq.table.__setitem__(slice(0, 2), seq.table[1::-1]))
    broken(lambda pool, seq: seq.table.__setitem__(1, seq.table[3]))
    broken(lambda pool, seq: seq.table.__setitem__(slice(0, 4), [*seq.table[2:4], *seq.table[:2]]))
    broken(lambda pool, seq: seq.table.insert(0, seq.table.pop(4)))
    broken(lambda pool, seq: seq.table.__setitem__(5, pack_entry(seq.table[5], NATIVE, 1)))
    broken(lambda pool, seq: pool._codecs.__setitem__(8, NATIVE))
    broken(lambda pool, seq: pool._codecs.__setitem__(seq.table[5], INT8))
    broken(lambda pool, seq: pool._prefixes.__setitem__(8, None))
    broken(lambda pool, seq: setattr(seq, "num_blocks", 7))
    broken(lambda pool, seq: setattr(seq, "num_sealed", 3))


def test_a_pool_refuses_spans_that_do_not_nest_and_a_reserve_without_a_block_beside_it():
    for bad in (
        {"span_blocks": (2, 4)},
        {"span_blocks": (1, 4, 6)},
        {"span_blocks": (1, 32)},
        {"num_reserved": 19},
    ):
        with pytest.raises(AssertionError):
            BlockPool(20, 4, **bad)


def test_new_tokens_are_never_written_to_a_compressed_block():
    table = [*span(3, INT8, 2), 5]

    assert plan_slots(AttentionBatch([2], [10], [table]), 4) == [20, 21]
    with pytest.raises(AssertionError, match="compressed"):
        plan_slots(AttentionBatch([3], [10], [table]), 4)

"""The block pool, by exact ids: who holds what, what is shared, what is evicted and when."""

from __future__ import annotations

import gc
import hashlib
import random
import struct
import subprocess
import sys
import time

import pytest

from kvchat.kv import block_pool
from kvchat.kv.block_pool import BlockPool, CopyBlock, Sequence
from kvchat.kv.layout import Codec, pack_entry, unpack_entry
from kvchat.kv.prefix import Prefix, PrefixIndex

A, B, C = [1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]


def computed(pool: BlockPool, token_ids: list[int]) -> Sequence:
    """A sequence over token_ids, all of them computed and its full blocks sealed."""
    seq = pool.alloc(token_ids)
    assert pool.append(seq, len(token_ids) - seq.num_tokens) is not None
    pool.seal(seq, token_ids, len(token_ids))
    return seq


def snapshot(pool: BlockPool, seq: Sequence) -> tuple[object, ...]:
    return pool.map(), list(seq.table), seq.num_tokens, seq.num_sealed, str(pool.counters)


# Allocation and the free queue


def test_blocks_are_handed_out_from_one_and_never_the_null_block():
    pool = BlockPool(num_blocks=6, block_size=4)
    seq = pool.alloc([1])

    assert (seq.table, seq.num_tokens, pool.num_free, pool.num_usable) == ([], 0, 5, 5)
    assert pool.append(seq, 20) == []

    assert (seq.table, seq.num_tokens, pool.num_free) == ([1, 2, 3, 4, 5], 20, 0)
    assert pool.map() == ["null", 1, 1, 1, 1, 1]
    assert pool.ref_count(0) == 0
    pool.check_integrity([seq])


@pytest.mark.parametrize("num_tokens, num_blocks", [(1, 1), (3, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_append_takes_a_block_only_when_the_tail_is_full(num_tokens, num_blocks):
    at_once, one_by_one = BlockPool(6, 4), BlockPool(6, 4)
    seq, slow = at_once.alloc([]), one_by_one.alloc([])

    assert at_once.append(seq, num_tokens) == []
    for _ in range(num_tokens):
        assert one_by_one.append(slow, 1) == []

    assert seq.table == slow.table == list(range(1, num_blocks + 1))
    assert at_once.num_free == one_by_one.num_free == 5 - num_blocks


def test_a_pool_that_cannot_answers_none_and_changes_nothing():
    pool = BlockPool(6, 4)
    held, seq = computed(pool, [*A, 5]), computed(pool, [*B, 1, 2])
    forked = pool.fork(seq, 6)
    before = snapshot(pool, seq)

    assert pool.append(seq, 7) is None  # a copy of the tail and two blocks; one is free

    assert snapshot(pool, seq) == before
    pool.check_integrity([held, seq, forked])
    assert pool.append(seq, 1) == [CopyBlock(4, 5)]
    assert pool.append(forked, 2) == []  # alone on block 4 now
    assert pool.append(forked, 1) is None
    pool.check_integrity([held, seq, forked])


def test_free_order_is_recycled_then_untouched_then_cached_oldest_first():
    pool = BlockPool(8, 4)
    older, newer = computed(pool, [*A, *B, 1]), computed(pool, [*C, 1, 2])  # 1 2 3, 4 5
    pool.free(older)
    pool.free(newer)
    assert pool.map() == ["null", "cached", "cached", "free", "cached", "free", "free", "free"]

    seq = pool.alloc([])
    assert pool.append(seq, 28) == []

    # recycled 5 and 3, untouched 6 and 7, then cached: the older text first and its end before
    # its beginning
    assert seq.table == [5, 3, 6, 7, 2, 1, 4]
    assert pool.counters.num_evictions == 3
    assert pool.match([*A, 1]) == pool.match([*C, 1]) == 0


def test_a_hit_renews_a_cached_prefix():
    pool = BlockPool(5, 4)
    for token_ids in ([*A, 1], [*B, 1]):
        pool.free(computed(pool, token_ids))  # A is in block 1, B in 2, where A's tail was
    assert pool.map() == ["null", "cached", "cached", "free", "free"]

    pool.free(pool.alloc([*A, 1]))
    seq = pool.alloc([])
    pool.append(seq, 12)

    assert seq.table == [3, 4, 2]  # B's block, though it was computed later
    assert (pool.match([*A, 1]), pool.match([*B, 1])) == (4, 0)


def test_untouched_blocks_stay_untouched_while_freed_ones_can_serve():
    pool = BlockPool(100, 4)
    for _ in range(50):
        seq = pool.alloc([])
        pool.append(seq, 10)
        assert sorted(seq.table) == [1, 2, 3]
        pool.free(seq)

    assert pool.map().count("free") == 99


def test_double_free_and_use_after_free_assert():
    pool = BlockPool(6, 4)
    seq = computed(pool, [*A, 5])
    pool.free(seq)

    for use in (
        lambda: pool.free(seq),
        lambda: pool.append(seq, 1),
        lambda: pool.truncate(seq, 0),
        lambda: pool.fork(seq, 0),
    ):
        with pytest.raises(AssertionError):
            use()
    pool.check_integrity([])
    assert pool.num_free == 5


# The prefix index


def test_equal_prefixes_share_their_sealed_blocks():
    pool = BlockPool(9, 4)
    first = computed(pool, [*A, *B, 1, 2])
    assert pool.match([*A, *B, 9]) == 8

    second = pool.alloc([*A, *B, 9, 9])

    assert (second.table, second.num_tokens, second.num_sealed) == ([1, 2], 8, 2)
    assert [pool.ref_count(block_id) for block_id in (1, 2, 3)] == [2, 2, 1]
    pool.append(second, 2)
    assert second.table == [1, 2, 4]
    pool.free(first)
    assert [pool.ref_count(block_id) for block_id in (1, 2)] == [1, 1]
    pool.check_integrity([second])


def test_a_block_is_hit_only_behind_its_own_prefix():
    pool = BlockPool(9, 4)
    computed(pool, [*A, *B, 1])

    assert pool.match([*B, 1]) == 0
    assert pool.match([*C, *B, 1]) == 0
    assert pool.match([*A, *C, 1]) == 4
    assert pool.match([]) == pool.match([1]) == 0


@pytest.mark.parametrize("num_tokens, matched", [(12, 8), (13, 12), (9, 8), (8, 4), (5, 4), (4, 0)])
def test_a_total_hit_leaves_the_last_token_to_compute(num_tokens, matched):
    pool = BlockPool(9, 4)
    token_ids = [*A, *B, *C, 13]
    computed(pool, token_ids)

    assert pool.alloc(token_ids[:num_tokens]).num_tokens == matched


def test_only_full_and_computed_and_known_blocks_are_sealed():
    pool = BlockPool(9, 4)
    token_ids = [*A, *B, *C]
    seq = pool.alloc(token_ids)
    pool.append(seq, 12)

    for num_known, num_computed, num_sealed in [(12, 3, 0), (12, 7, 1), (7, 8, 1), (8, 9, 2)]:
        pool.seal(seq, token_ids[:num_known], num_computed)
        assert seq.num_sealed == num_sealed
    assert pool.match([*token_ids, 1]) == 8
    pool.seal(seq, token_ids, 8)  # never backwards
    assert seq.num_sealed == 2
    pool.truncate(seq, 11)
    with pytest.raises(AssertionError):
        pool.seal(seq, token_ids, 12)


def test_of_two_equal_blocks_the_first_keeps_the_key():
    pool = BlockPool(9, 4)
    token_ids = [*A, *B, 1]
    first, second = pool.alloc(token_ids), pool.alloc(token_ids)
    pool.append(first, 9)
    pool.append(second, 9)

    pool.seal(first, token_ids, 9)
    pool.seal(second, token_ids, 9)

    assert (first.table, second.table) == ([1, 2, 3], [4, 5, 6])
    assert first.prefix is second.prefix
    pool.free(second)
    assert pool.map() == ["null", 1, 1, 1, *["free"] * 5]
    assert pool.alloc(token_ids).table == [1, 2]


def test_descendants_are_found_again_after_their_evicted_prefix_is_recomputed():
    pool = BlockPool(8, 4)
    first, second = pool.alloc([*A, *B, 1]), pool.alloc([*A, *B, 1])
    pool.append(first, 4)
    pool.append(second, 8)
    pool.seal(first, A, 4)
    pool.seal(second, [*A, *B], 8)  # block 2 is an unsealed copy of block 1, block 3 has the key
    pool.free(first)
    filler = pool.alloc([])
    pool.append(filler, 20)
    assert pool.match([*A, *B, 1]) == 0  # block 1 was evicted
    pool.free(filler)

    again = computed(pool, [*A, 1])

    assert pool.match([*A, *B, 1]) == 8
    pool.check_integrity([second, again])


def test_fingerprint_salt_and_field_borders_make_other_keys():
    pools = [
        BlockPool(4, 4, b"model", b"salt"),
        BlockPool(4, 4, b"models", b"alt"),
        BlockPool(4, 4, b"modelsalt"),
        BlockPool(4, 4, b"", b"modelsalt"),
    ]
    keys = {computed(pool, A).prefix.hash for pool in pools}

    assert len(keys) == 4
    assert computed(BlockPool(9, 4, b"model", b"salt"), A).prefix.hash in keys


def test_the_hash_is_sha256_over_tagged_and_length_prefixed_fields():
    def field(tag, value):
        return tag + struct.pack("<Q", len(value)) + value

    def link(parent_hash, *token_ids):
        fields = [(b"F", b"model"), (b"S", b"salt"), (b"P", parent_hash)]
        fields.append((b"T", struct.pack("<2i", *token_ids)))
        return hashlib.sha256(b"".join(field(*f) for f in fields)).digest()

    seq = computed(BlockPool(4, 2, b"model", b"salt"), [1, 2, 3, 2**31 - 1])

    assert seq.prefix.hash == link(link(b"", 1, 2), 3, 2**31 - 1)


def test_unseal_takes_the_keys_of_shared_blocks_too_and_nobody_hits_them_again():
    pool = BlockPool(9, 4)
    first = computed(pool, [*A, *B, 1])
    second = pool.alloc([*A, 9])
    pool.unseal(first)

    assert pool.match([*A, *B, 1]) == 0
    assert (first.table, second.table) == ([1, 2, 3], [1])  # who holds them goes on
    pool.check_integrity([first, second])
    pool.free(first)
    pool.free(second)
    assert (pool.num_cached, pool.num_free) == (0, 8)
    assert pool.counters.num_evictions == 0


class WeakHash(PrefixIndex):
    """Every hash is one of 256: only the comparison of token ids stands against a wrong hit."""

    num_refused = 0

    def hash(self, parent_hash: bytes, packed_ids: bytes) -> bytes:
        return super().hash(parent_hash, packed_ids)[:1]

    def lookup(self, prefix: Prefix, codec: Codec) -> tuple[int, Prefix] | None:
        found = super().lookup(prefix, codec)
        self.num_refused += found is None and (prefix.hash, codec) in self._ids
        return found


def test_an_8_bit_hash_gives_no_wrong_hit_in_100_000_look_ups(monkeypatch):
    monkeypatch.setattr(block_pool, "PrefixIndex", WeakHash)
    pool, rng = BlockPool(64, 2), random.Random(1)
    written: dict[int, tuple[int, ...]] = {}  # block -> the text up to its end
    num_wrong = num_lookups = num_hits = 0
    while num_lookups < 100_000:
        token_ids = rng.choices(range(5), k=rng.randrange(3, 12))
        num_lookups += (len(token_ids) - 1) // 2
        seq = pool.alloc(token_ids)
        for idx, block_id in enumerate(seq.table):
            num_wrong += written[block_id] != tuple(token_ids[: 2 * idx + 2])
        num_matched = len(seq.table)
        num_hits += num_matched
        pool.append(seq, len(token_ids) - seq.num_tokens)
        for idx in range(num_matched, len(seq.table)):
            written[seq.table[idx]] = tuple(token_ids[: 2 * idx + 2])
        pool.seal(seq, token_ids, len(token_ids))
        pool.free(seq)

    assert num_wrong == 0
    assert num_hits > 10_000 and pool._index.num_refused > 10_000
    pool.check_integrity([])


def test_a_colliding_block_of_another_parent_is_refused():
    """Equal hash and equal ids of the block itself are not enough."""
    pool = BlockPool(9, 4)
    pool._index.hash = lambda parent_hash, packed_ids: packed_ids  # the parent is left out
    first = computed(pool, [*A, *C, 1])
    pool.free(first)
    other = computed(pool, [*B, 1])

    assert pool.match([*A, *C, 1]) == 8
    assert pool.match([*B, *C, 1]) == 4
    pool.check_integrity([other])


# Sharing and copy-on-write


def test_fork_shares_every_block_and_whoever_writes_first_copies_the_tail():
    pool = BlockPool(9, 4)
    parent = computed(pool, [*A, *B, 1, 2])
    child = pool.fork(parent, 10)
    assert (child.table, child.num_tokens, child.num_sealed) == ([1, 2, 3], 10, 2)
    assert [pool.ref_count(block_id) for block_id in (1, 2, 3)] == [2, 2, 2]

    assert pool.append(parent, 1) == [CopyBlock(src=3, dst=4)]
    assert pool.append(child, 1) == []

    assert (parent.table, child.table) == ([1, 2, 4], [1, 2, 3])
    assert [pool.ref_count(block_id) for block_id in (1, 2, 3, 4)] == [2, 2, 1, 1]
    assert pool.counters.num_copies == 1
    pool.check_integrity([parent, child])


@pytest.mark.parametrize(
    "num_tokens, table, num_sealed",
    [(0, [], 0), (3, [1], 0), (4, [1], 1), (5, [1, 2], 1), (8, [1, 2], 2), (9, [1, 2, 3], 2)],
)
def test_fork_of_a_part_shares_its_blocks_only(num_tokens, table, num_sealed):
    pool = BlockPool(9, 4)
    parent = computed(pool, [*A, *B, 1, 2])

    child = pool.fork(parent, num_tokens)

    assert (child.table, child.num_tokens, child.num_sealed) == (table, num_tokens, num_sealed)
    is_partial = num_tokens % 4 > 0
    assert pool.append(child, 1) == ([CopyBlock(table[-1], 4)] if is_partial else [])
    pool.check_integrity([parent, child])
    with pytest.raises(AssertionError):
        pool.fork(parent, 11)


def test_a_forks_tail_is_written_in_place_once_it_is_alone():
    pool = BlockPool(9, 4)
    parent = computed(pool, [*A, 5, 6])
    child = pool.fork(parent, 6)
    pool.free(parent)

    assert pool.append(child, 2) == []
    pool.seal(child, [*A, 5, 6, 9, 9], 8)

    assert child.table == [1, 2]
    assert pool.match([*A, 5, 6, 9, 9, 0]) == 8


def test_a_copy_and_new_blocks_come_from_one_append():
    pool = BlockPool(9, 4)
    parent = computed(pool, [*A, 5])
    child = pool.fork(parent, 5)

    assert pool.append(child, 8) == [CopyBlock(2, 3)]
    assert child.table == [1, 3, 4, 5]


def test_truncate_gives_back_the_rest_and_keeps_sealed_blocks_cached():
    pool = BlockPool(9, 4)
    seq = computed(pool, [*A, *B, *C, 1])

    pool.truncate(seq, 4)

    assert (seq.table, seq.num_tokens, seq.num_sealed) == ([1], 4, 1)
    assert pool.map() == ["null", 1, "cached", "cached", *["free"] * 5]
    assert pool.append(seq, 1) == []  # at a block's border nothing is copied
    pool.seal(seq, [*A, 13], 5)
    assert pool.alloc([*A, *B, *C, 1]).table == [1, 2, 3]


def test_truncate_into_a_sealed_block_copies_it_on_the_next_append():
    pool = BlockPool(9, 4)
    seq = computed(pool, [*A, *B, 1])

    pool.truncate(seq, 6)
    assert (seq.table, seq.num_tokens, seq.num_sealed) == ([1, 2], 6, 1)
    assert pool.append(seq, 2) == [CopyBlock(2, 3)]
    pool.seal(seq, [*A, 5, 6, 0, 0], 8)

    assert seq.table == [1, 3]
    assert pool.map()[:4] == ["null", 1, "cached", 1]
    assert (pool.match([*A, *B, 1]), pool.match([*A, 5, 6, 0, 0, 1])) == (8, 8)
    pool.check_integrity([seq])


def test_a_full_pool_evicts_a_sequences_own_sealed_tail_in_place():
    pool = BlockPool(3, 4)
    seq = computed(pool, [*A, *B])
    pool.truncate(seq, 6)

    assert pool.append(seq, 3) is None
    assert pool.append(seq, 2) == []

    assert seq.table == [1, 2]
    assert pool.match([*A, *B, 1]) == 4
    assert (pool.counters.num_copies, pool.counters.num_evictions) == (0, 1)
    pool.check_integrity([seq])


def test_a_sealed_tail_is_copied_before_its_block_is_taken_for_the_next_slots():
    pool = BlockPool(4, 4)
    seq = computed(pool, [*A, *B])
    pool.truncate(seq, 6)

    assert pool.append(seq, 3) == [CopyBlock(2, 3)]  # the copy runs first, then 2 is written

    assert seq.table == [1, 3, 2]
    pool.check_integrity([seq])


def test_a_lone_sequence_can_always_fill_the_pool_after_an_undo():
    for num_kept in range(13):
        pool = BlockPool(4, 4)
        seq = computed(pool, [*A, *B, *C])
        pool.truncate(seq, num_kept)
        if num_kept < 12:
            assert pool.append(seq, 12 - num_kept) is not None
        assert len(seq.table) == 3
        pool.check_integrity([seq])


# The rest


def test_check_integrity_sees_a_lost_a_doubled_and_a_misnamed_block():
    def broken(harm):
        pool = BlockPool(9, 4)
        seq = computed(pool, [*A, *B, 1])
        pool.free(computed(pool, [*C, 1]))
        pool.check_integrity([seq])
        harm(pool, seq)
        with pytest.raises(AssertionError):
            pool.check_integrity([seq])

    broken(lambda pool, seq: pool._recycled.pop())
    broken(lambda pool, seq: pool._recycled.append(1))
    broken(lambda pool, seq: pool._recycled.append(0))
    broken(lambda pool, seq: pool._cached.clear())
    broken(lambda pool, seq: pool._index._ids.popitem())
    broken(lambda pool, seq: pool._prefixes.__setitem__(1, None))
    broken(lambda pool, seq: seq.table.pop())
    broken(lambda pool, seq: seq.table.__setitem__(2, 0))
    broken(lambda pool, seq: seq.table.insert(0, seq.table.pop(1)))
    broken(lambda pool, seq: pool._ref_counts.__setitem__(1, 2))
    broken(lambda pool, seq: setattr(seq, "num_sealed", 1))
    broken(lambda pool, seq: setattr(seq, "num_tokens", 8))
    broken(lambda pool, seq: setattr(seq, "prefix", None))


def test_a_native_entry_is_its_block_id_and_entries_are_int32():
    assert pack_entry(12345, Codec.NATIVE, 0) == 12345
    for codec, span_idx in [(Codec.NATIVE, 0), (Codec.INT8, 1), (Codec.INT4, 3), (Codec.INT4, 7)]:
        entry = pack_entry(2**24 - 1, codec, span_idx)
        assert unpack_entry(entry) == (2**24 - 1, codec, span_idx)
        assert entry < 2**31


def test_the_pool_imports_no_torch():
    code = "import sys, kvchat.kv.block_pool; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_chain_of_200_000_prefixes_is_dropped_without_recursion():
    pool = BlockPool(200_001, 1)
    token_ids = [7] * 200_000
    seq = computed(pool, token_ids)
    pool.free(seq)
    filler = pool.alloc([])
    pool.append(filler, 200_000)  # evicts them all

    assert pool.match(token_ids) == 0
    assert pool.counters.num_evictions == 200_000


def seconds_per_block(num_blocks: int) -> float:
    """Of taking and freeing one block of a pool whose blocks have all been sealed once."""
    pool = BlockPool(num_blocks, 1)
    token_ids = list(range(num_blocks - 1))
    pool.free(computed(pool, token_ids))
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(200):
            seq = pool.alloc([0, 1])  # out of the middle of the cached queue
            pool.append(seq, 1)
            pool.free(seq)
        best = min(best, time.perf_counter() - start)
    return best / 200


def test_allocating_and_freeing_cost_the_same_in_a_pool_100_times_as_large():
    gc.disable()
    try:
        small, large = seconds_per_block(1_000), seconds_per_block(100_000)
    finally:
        gc.enable()
    assert large < 4 * small, f"{small * 1e6:.2f} us at 1,000 blocks, {large * 1e6:.2f} at 100,000"

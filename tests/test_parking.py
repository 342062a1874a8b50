"""Parking, by exact ids: which slot takes which block, what comes back where, who owns what."""

from __future__ import annotations

import pytest

from kvchat.kv.block_ops import ParkBlock, RestoreBlock
from kvchat.kv.block_pool import BlockPool, Sequence
from kvchat.kv.layout import Codec, pack_entry
from kvchat.kv.parking import HostArena, Parked, ParkedBlock

NATIVE, INT8, INT4 = Codec.NATIVE, Codec.INT8, Codec.INT4
TEXT = [*range(1, 41)]  # ten blocks of four


class House:
    """A pool of blocks of four tokens and an arena beside it."""

    def __init__(self, num_blocks: int = 20, num_slots: int = 12, num_reserved: int = 0) -> None:
        self.pool = BlockPool(num_blocks, 4, span_blocks=(1, 2, 4), num_reserved=num_reserved)
        self.arena = HostArena(num_slots, self.pool)

    def computed(self, token_ids: list[int]) -> Sequence:
        """A sequence over token_ids, all of them computed and its full blocks sealed."""
        seq = self.pool.alloc(token_ids)
        assert self.pool.append(seq, len(token_ids) - seq.num_tokens) is not None
        self.pool.seal(seq, token_ids, len(token_ids))
        return seq

    def compress(self, seq: Sequence, start: int, codec: Codec) -> None:
        holders = self.pool.holders(seq, start, self.pool.span_blocks[codec], [seq])
        assert holders and self.pool.compress(holders, start, codec)

    def park(self, seq: Sequence, token_ids: list[int]) -> tuple[Parked, list]:
        ops = []
        parked = self.arena.park(seq, token_ids, ops)
        self.pool.free(seq)
        return parked, ops

    def resume(self, parked: Parked, token_ids: list[int]) -> tuple[Sequence, list]:
        """Behind what the pool finds of a prompt that goes on after token_ids."""
        ops, seq = [], self.pool.alloc([*token_ids, 999])
        self.arena.resume(parked, self.arena.missing(parked, seq), seq, ops)
        return seq, ops

    def take_all(self) -> Sequence:
        """Let nothing stay cached; the blocks are still to be had."""
        seq = self.pool.alloc([])
        assert self.pool.append(seq, self.pool.num_free * 4) == []
        self.pool.free(seq)
        return seq


def span(block_id: int, codec: Codec, num_entries: int) -> list[int]:
    return [pack_entry(block_id, codec, idx) for idx in range(num_entries)]


def test_every_block_is_copied_once_and_then_free_on_the_device():
    house = House()
    seq = house.computed(TEXT[:18])
    house.compress(seq, 2, INT8)  # blocks 3, 4 -> 6
    assert seq.table == [1, 2, *span(6, INT8, 2), 5]

    parked, ops = house.park(seq, TEXT[:18])

    assert ops == [ParkBlock(1, 0), ParkBlock(2, 1), ParkBlock(6, 2), ParkBlock(5, 3)]
    assert parked.blocks == [
        ParkedBlock(0, NATIVE, 0, True),
        ParkedBlock(1, NATIVE, 1, True),
        ParkedBlock(2, INT8, 2, True),
        ParkedBlock(3, NATIVE, 4, False),
    ]
    assert (house.pool.num_held, house.pool.num_cached, house.arena.num_free) == (0, 3, 8)
    counters = house.arena.counters
    assert (counters.num_parks, counters.num_parked_blocks) == (1, 4)
    house.arena.check_integrity([parked])
    house.pool.check_integrity([])


def test_what_is_still_cached_is_not_copied_back():
    house = House()
    seq = house.computed(TEXT[:18])
    house.compress(seq, 2, INT8)
    parked, _ = house.park(seq, TEXT[:18])

    seq, ops = house.resume(parked, TEXT[:18])

    assert seq.table[:4] == [1, 2, *span(6, INT8, 2)]
    assert ops == [RestoreBlock(3, seq.table[4])]
    assert (seq.num_tokens, seq.num_sealed, seq.num_blocks) == (18, 4, 4)
    assert house.arena.num_free == 12
    house.arena.check_integrity([])
    house.pool.check_integrity([seq])


def test_all_codecs_come_back_with_their_tail_and_are_found_under_their_own_keys():
    house = House()
    seq = house.computed(TEXT[:35])
    house.compress(seq, 0, INT4)
    house.compress(seq, 4, INT8)
    parked, _ = house.park(seq, TEXT[:35])
    house.take_all()
    assert house.pool.match([*TEXT, 1]) == 0

    seq, ops = house.resume(parked, TEXT[:35])

    ids = [op.dst for op in ops]
    assert [op.slot for op in ops] == [0, 1, 2, 3, 4]
    assert seq.table == [*span(ids[0], INT4, 4), *span(ids[1], INT8, 2), *ids[2:]]
    assert (seq.num_tokens, seq.num_sealed, seq.num_blocks) == (35, 8, 5)
    assert [house.pool.codec(block_id) for block_id in ids] == [INT4, INT8, NATIVE, NATIVE, NATIVE]
    house.pool.check_integrity([seq])
    house.pool.free(seq)
    assert house.pool.alloc([*TEXT[:33], 1]).table == [
        *span(ids[0], INT4, 4),
        *span(ids[1], INT8, 2),
        ids[2],
        ids[3],
    ]
    counters = house.arena.counters
    assert (counters.num_resumes, counters.num_restored_blocks) == (1, 5)


def test_the_restored_tail_is_written_on_without_a_copy():
    house = House()
    parked, _ = house.park(house.computed(TEXT[:6]), TEXT[:6])
    house.take_all()

    seq, _ = house.resume(parked, TEXT[:6])

    assert house.pool.append(seq, 3) == []
    assert (seq.num_tokens, len(seq.table)) == (9, 3)
    house.pool.seal(seq, TEXT[:9], 9)
    assert house.pool.match([*TEXT[:9], 1]) == 8


def test_a_hit_that_ends_inside_a_parked_span_goes_back_to_its_start():
    house = House()
    seq = house.computed(TEXT[:17])
    house.compress(seq, 0, INT8)
    house.compress(seq, 2, INT8)
    parked, _ = house.park(seq, TEXT[:17])
    house.take_all()
    other = house.computed(TEXT[:13])  # native: all of the first span and half of the second

    seq, ops = house.resume(parked, TEXT[:17])

    assert seq.table[:2] == other.table[:2]
    assert seq.table[2:] == [*span(ops[0].dst, INT8, 2), ops[1].dst]
    assert [op.slot for op in ops] == [1, 2]
    house.pool.check_integrity([seq, other])


def test_what_others_have_compressed_meanwhile_is_restored_as_it_was():
    house = House()
    one = house.computed(TEXT[:33])
    other = house.pool.fork(one, 16)  # the other five blocks are one's alone
    parked, _ = house.park(one, TEXT[:33])
    house.compress(other, 2, INT8)

    seq, ops = house.resume(parked, TEXT[:33])

    assert seq.table[:2] == other.table[:2]
    assert seq.table[2:] == [op.dst for op in ops]
    assert [op.slot for op in ops] == [2, 3, 4, 5, 6, 7, 8]
    house.pool.check_integrity([seq, other])


def test_a_block_without_a_key_gets_none_when_it_is_restored():
    house = House()
    seq = house.computed(TEXT[:9])
    house.pool.unseal(seq)
    parked, _ = house.park(seq, TEXT[:9])

    seq, _ = house.resume(parked, TEXT[:9])

    assert (seq.num_tokens, seq.num_sealed) == (9, 2)
    house.pool.seal(seq, TEXT[:9], 9)
    assert house.pool.match(TEXT[:12]) == 0
    house.pool.check_integrity([seq])


def test_a_key_that_another_has_meanwhile_stays_with_it():
    house = House()
    seq = house.computed(TEXT[:9])
    parked, _ = house.park(seq, TEXT[:9])
    seq = house.pool.alloc([])  # as if nothing had been found
    house.arena.resume(parked, parked.blocks, seq, [])

    assert seq.num_sealed == 2 and seq.table[:2] != [1, 2]
    other = house.pool.alloc(TEXT[:9])
    assert other.table == [1, 2]
    house.pool.check_integrity([seq, other])


@pytest.mark.parametrize(
    "num_tokens, num_kept, num_free",
    [(17, 17, 8), (16, 16, 9), (15, 8, 10), (9, 8, 10), (5, 5, 10)],
)
def test_a_cut_keeps_whole_spans_and_gives_the_other_slots_back(num_tokens, num_kept, num_free):
    house = House()
    seq = house.computed(TEXT[:18])
    house.compress(seq, 2, INT8)
    parked, _ = house.park(seq, TEXT[:18])
    assert house.arena.num_kept(parked, num_tokens) == num_kept

    house.arena.trim(parked, num_tokens)

    assert (parked.token_ids, house.arena.num_free) == (TEXT[:num_kept], num_free)
    house.arena.check_integrity([parked])
    house.take_all()
    seq, _ = house.resume(parked, TEXT[:num_kept])
    assert (seq.num_tokens, seq.num_sealed) == (num_kept, num_kept // 4)
    house.pool.check_integrity([seq])


def test_a_fork_shares_slots_until_both_are_gone():
    house = House()
    parked, _ = house.park(house.computed(TEXT[:18]), TEXT[:18])

    child = house.arena.fork(parked, 10)

    assert [block.slot for block in child.blocks] == [0, 1, 2]
    assert (child.token_ids, house.arena.num_free) == (TEXT[:10], 7)
    house.arena.check_integrity([parked, child])
    house.arena.release(parked)
    assert house.arena.num_free == 9
    house.arena.check_integrity([child])
    house.take_all()
    seq, ops = house.resume(child, TEXT[:10])
    assert [op.slot for op in ops] == [0, 1, 2]
    assert (seq.num_tokens, house.arena.num_free) == (10, 12)


def test_it_is_parked_whole_or_not_and_only_where_that_frees_something():
    house = House(num_slots=4)
    long, short = house.computed(TEXT[:18]), house.computed([7] * 13)
    assert not house.arena.can_park(long)
    assert house.arena.can_park(short)

    twin = house.pool.fork(short, 13)

    assert not house.arena.can_park(short)
    house.pool.free(twin)
    house.park(short, [7] * 13)
    assert house.arena.num_free == 0


def test_the_first_ones_whose_slots_are_enough_have_to_leave():
    house = House(num_blocks=40, num_slots=9)
    one, _ = house.park(house.computed(TEXT[:13]), TEXT[:13])  # four slots
    child = house.arena.fork(one, 8)  # two of these
    two, _ = house.park(house.computed([7] * 10), [7] * 10)  # three
    parked = [one, child, two]

    def num_leaving(num_blocks: int, records: list[Parked]) -> int | None:
        return house.arena.num_leaving(Sequence(num_blocks=num_blocks), records)

    assert house.arena.num_free == 2
    found = [num_leaving(num_blocks, parked) for num_blocks in range(1, 11)]
    assert found == [0, 0, 1, 1, 2, 2, 3, 3, 3, None]
    assert [num_leaving(num, [child, one]) for num in (3, 6, 7)] == [2, 2, None]
    assert num_leaving(5, [two, one]) == 1
    house.arena.check_integrity(parked)
    for count, record in enumerate(parked, 1):
        house.arena.release(record)
        assert num_leaving(house.arena.num_free, parked[count:]) == 0


@pytest.mark.parametrize("num_shared, is_parked", [(8, True), (12, False), (16, False)])
def test_what_shares_more_than_half_of_its_blocks_is_not_parked(num_shared, is_parked):
    house = House()
    seq = house.computed(TEXT[:16])
    twin = house.pool.fork(seq, num_shared)

    assert house.arena.num_own(seq) == 4 - num_shared // 4
    assert house.arena.can_park(seq) == is_parked
    house.pool.free(twin)
    assert house.arena.can_park(seq)


def test_no_block_is_adopted_from_the_reserve():
    house = House(num_blocks=4, num_reserved=1)
    seq = house.pool.alloc([])

    taken = [house.pool.adopt(seq, NATIVE, TEXT, True) for _ in range(3)]

    assert taken == [1, 2, None]
    assert (seq.num_tokens, seq.num_sealed) == (8, 2)
    house.pool.check_integrity([seq])


def test_a_slot_is_not_given_back_twice():
    house = House()
    parked, _ = house.park(house.computed(TEXT[:5]), TEXT[:5])
    twin = Parked(parked.token_ids, parked.blocks)

    house.arena.release(parked)

    with pytest.raises(AssertionError, match="given back twice"):
        house.arena.release(twin)

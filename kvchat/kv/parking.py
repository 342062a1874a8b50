"""What idle sessions hold in host memory: which slot has which of their blocks. No tensors.

A slot takes one block of any codec, as it is. A parked session owns slots and no device blocks;
several that were forked from one another share slots, and each counts its own reference.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from kvchat.kv.block_ops import BlockOp, ParkBlock, RestoreBlock
from kvchat.kv.block_pool import BlockPool, Sequence
from kvchat.kv.layout import Codec, block_ids, unpack_entry


class ParkedBlock(NamedTuple):
    """A slot, and what it has: the block of `codec` that stood in a table from entry `start`."""

    slot: int
    codec: Codec
    start: int
    is_findable: bool  # the block had a key


@dataclass(slots=True, eq=False)
class Parked:
    """A session's computed tokens, and the slots with their K and V. Only the arena changes it."""

    token_ids: list[int]
    blocks: list[ParkedBlock]


@dataclass(slots=True)
class ParkingCounters:
    """Counted since the start."""

    num_parks: int = 0  # sessions
    num_displaced: int = 0  # of which left the arena for one that was used later
    num_resumes: int = 0  # of which something was restored
    num_parked_blocks: int = 0
    num_restored_blocks: int = 0


class HostArena:
    """`num_slots` slots beside the pool, which has the blocks that are parked and restored."""

    def __init__(self, num_slots: int, pool: BlockPool) -> None:
        self.num_slots = num_slots
        self.counters = ParkingCounters()
        self._pool = pool
        self._ref_counts = [0] * num_slots
        self._free = [*reversed(range(num_slots))]

    @property
    def num_free(self) -> int:
        """Slots that can be taken."""
        return len(self._free)

    def has_room(self, seq: Sequence) -> bool:
        """There are slots for all of its blocks."""
        return seq.num_blocks <= len(self._free)

    def num_leaving(self, seq: Sequence, parked: Iterable[Parked]) -> int | None:
        """How many of these, from the first on, would have to be released to make room for seq;
        None if all were too few. What they share with others frees no slot."""
        num_leaving, num_free = 0, len(self._free)
        num_refs = Counter[int]()
        for record in parked:
            if num_free >= seq.num_blocks:
                break
            for block in record.blocks:
                num_refs[block.slot] += 1
                num_free += num_refs[block.slot] == self._ref_counts[block.slot]
            num_leaving += 1
        return num_leaving if num_free >= seq.num_blocks else None

    def num_own(self, seq: Sequence) -> int:
        """Blocks that nobody else holds: what parking it would free."""
        return [*map(self._pool.ref_count, block_ids(seq.table))].count(1)

    def can_park(self, seq: Sequence) -> bool:
        """There are slots for all of its blocks, and at least half of these would be free then.

        Slots are not shared with those who keep the blocks: a session that shares more of them
        with others would take many slots and free few blocks, and so it is not parked."""
        return self.has_room(seq) and 2 * self.num_own(seq) >= seq.num_blocks

    def park(self, seq: Sequence, token_ids: list[int], ops: list[BlockOp]) -> Parked:
        """Take slots for all blocks of seq, which holds exactly token_ids; it is to be freed then.

        The copies are added to ops, and must be done before the blocks are written again.
        """
        assert seq.num_tokens == len(token_ids) and self.can_park(seq), f"{seq=}"
        parked = Parked(token_ids, [])
        for start, entry in enumerate(seq.table):
            block_id, codec, span_idx = unpack_entry(entry)
            if span_idx:
                continue
            slot = self._free.pop()
            self._ref_counts[slot] = 1
            is_findable = self._pool.is_findable(block_id)
            parked.blocks.append(ParkedBlock(slot, codec, start, is_findable))
            ops.append(ParkBlock(block_id, slot))
        self.counters.num_parks += 1
        self.counters.num_parked_blocks += len(parked.blocks)
        return parked

    def num_kept(self, parked: Parked, num_tokens: int) -> int:
        """What fork and trim make of num_tokens: a compressed span is kept whole or not."""
        size = self._pool.block_size
        for block in parked.blocks:
            start = block.start * size
            end = start + self._pool.span_blocks[block.codec] * size
            if block.codec != Codec.NATIVE and start < num_tokens < end:
                return start
        return min(num_tokens, len(parked.token_ids))

    def fork(self, parked: Parked, num_tokens: int) -> Parked:
        """A second record over the first num_tokens, as far as they are kept; it shares slots."""
        num_tokens = self.num_kept(parked, num_tokens)
        num_entries = -(-num_tokens // self._pool.block_size)
        blocks = [block for block in parked.blocks if block.start < num_entries]
        for block in blocks:
            self._ref_counts[block.slot] += 1
        return Parked(parked.token_ids[:num_tokens], blocks)

    def trim(self, parked: Parked, num_tokens: int) -> None:
        """Give back what is not kept of the first num_tokens."""
        kept = self.fork(parked, num_tokens)
        self.release(parked)
        parked.token_ids, parked.blocks = kept.token_ids, kept.blocks

    def release(self, parked: Parked) -> None:
        """Give back all slots."""
        for block in reversed(parked.blocks):
            num_refs = self._ref_counts[block.slot] - 1
            assert num_refs >= 0, f"slot {block.slot} given back twice"
            self._ref_counts[block.slot] = num_refs
            if not num_refs:
                self._free.append(block.slot)
        parked.token_ids, parked.blocks = [], []

    def missing(self, parked: Parked, seq: Sequence) -> list[ParkedBlock]:
        """The blocks that must be restored behind seq, a prefix found in the pool, which is cut
        where it holds a block less well than it was parked, or only a part of it."""
        num_found = 0
        for block in parked.blocks:
            end = block.start + self._pool.span_blocks[block.codec]
            found = seq.table[block.start : end]
            is_whole = block.start + len(found) == end
            if not is_whole or any(unpack_entry(entry)[1] > block.codec for entry in found):
                self._pool.truncate(seq, block.start * self._pool.block_size)
                break
            num_found += 1
        return parked.blocks[num_found:]

    def resume(
        self, parked: Parked, missing: list[ParkedBlock], seq: Sequence, ops: list[BlockOp]
    ) -> None:
        """Restore what is `missing` behind seq into free blocks, which the caller knows to be
        there, and give back all slots. The copies added to ops must be done before any is read."""
        for block in missing:
            dst = self._pool.adopt(seq, block.codec, parked.token_ids, block.is_findable)
            assert dst is not None, f"{len(missing)} blocks to restore, {seq=}"
            ops.append(RestoreBlock(block.slot, dst))
        self.counters.num_resumes += bool(missing)
        self.counters.num_restored_blocks += len(missing)
        self.release(parked)

    def check_integrity(self, parked: list[Parked]) -> None:
        """Assert that every slot is free or explained by these, all that there are."""
        num_refs = [0] * self.num_slots
        for record in parked:
            end = 0
            for block in record.blocks:
                num_refs[block.slot] += 1
                assert block.start == end, f"a gap before {block}: {record}"
                end += self._pool.span_blocks[block.codec]
            num_entries = -(-len(record.token_ids) // self._pool.block_size)
            assert end == num_entries, f"{end} entries in {record}"
        assert num_refs == self._ref_counts, f"named {num_refs} times, {self._ref_counts=}"
        free = [slot for slot, num in enumerate(num_refs) if not num]
        assert sorted(self._free) == free, f"{self._free=} {free=}"

"""Who owns which block. Knows token ids and block ids; never tensors, requests or sessions.

A block is in exactly one place, and moves along these arrows only:

    untouched --take--> live --last reference gone, no key--> recycled --take--> live
                        live --last reference gone, sealed--> cached   --hit---> live
                                                              cached   --evict-> live (key lost)

Free blocks are taken in this order: recycled (the memory is warm and nothing is lost), untouched
(so memory in use grows only with the chats), cached (oldest first: a prefix is forgotten). The
queue of cached blocks is the prefix cache. Block 0, the null block, is in none of these places.
The last num_reserved free blocks are taken only to copy a tail on write and to compress, so that
both work in a full pool.

A sequence's positions, with sealed = num_sealed * block_size:

    [0, sealed)             hashed: other sequences may hit these blocks; never written again.
                            Whole spans of these may be compressed into one block
    [sealed, num_tokens)    claimed: this sequence writes them, if nobody shares the block; native
    [num_tokens, capacity)  room in the tail block, capacity = len(table) * block_size
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Literal

from kvchat.config import NULL_BLOCK_ID
from kvchat.kv.block_ops import BlockOp, CompressSpan, CopyBlock, RestoreBlock
from kvchat.kv.counters import PoolCounters
from kvchat.kv.integrity import check_blocks, check_sequences, check_span
from kvchat.kv.layout import (
    BLOCK_ID_BITS,
    SPAN_INDEX_BITS,
    Codec,
    block_ids,
    pack_entry,
    unpack_entry,
)
from kvchat.kv.prefix import Prefix, PrefixIndex

BlockState = int | Literal["null", "free", "cached"]  # an int is a live block's ref_count


@dataclass(slots=True, eq=False)
class Sequence:
    """One run of positions and the blocks that hold it. Only the pool changes it."""

    table: list[int] = field(default_factory=list)  # one packed entry per block_size positions
    num_tokens: int = 0  # slots claimed
    num_blocks: int = 0  # that the table names: a compressed one has several entries
    num_sealed: int = 0  # leading entries whose hash is known
    prefix: Prefix | None = None  # of those entries
    is_freed: bool = False


class BlockPool:
    """Blocks 1 .. num_blocks-1: reference counts, the free queue and the prefix index.

    `fingerprint` and `salt` are kv/prefix's. `span_blocks` are, by codec, the native blocks whose
    tokens one block of it holds (kv/layout).
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        fingerprint: bytes = b"",
        salt: bytes = b"",
        span_blocks: tuple[int, ...] = (1,),
        num_reserved: int = 0,
    ) -> None:
        assert 1 < num_blocks <= 1 << BLOCK_ID_BITS, f"num_blocks {num_blocks}"
        assert block_size > 0, f"block_size {block_size}"
        assert span_blocks[0] == 1 and span_blocks[-1] <= 1 << SPAN_INDEX_BITS, f"{span_blocks=}"
        assert not any(b % a for a, b in pairwise(span_blocks)), f"{span_blocks=} do not nest"
        assert 0 <= num_reserved < num_blocks - 1, f"{num_reserved=} of {num_blocks}"
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.span_blocks = span_blocks
        self.num_reserved = num_reserved
        self.counters = PoolCounters()
        self._ref_counts = [0] * num_blocks
        self._codecs = [Codec.NATIVE] * num_blocks
        self._index = PrefixIndex(num_blocks, block_size, span_blocks, fingerprint, salt)
        self._prefixes = self._index.prefixes  # of sealed blocks
        self._recycled: list[int] = []
        self._num_touched = 1  # blocks below this id have been taken at least once; 0 is null
        self._cached: OrderedDict[int, None] = OrderedDict()  # oldest first

    @property
    def num_usable(self) -> int:
        """Blocks that sequences can hold: all but the null block."""
        return self.num_blocks - 1

    @property
    def num_free(self) -> int:
        """Blocks that can be taken now, cached ones included and the reserve not."""
        return max(0, self._num_unheld - self.num_reserved)

    @property
    def num_held(self) -> int:
        """Blocks that sequences hold."""
        return self.num_usable - self._num_unheld

    @property
    def num_cached(self) -> int:
        """Of the blocks that nobody holds, those that a later prefix may hit."""
        return len(self._cached)

    def ref_count(self, block_id: int) -> int:
        """How many sequences hold this block."""
        return self._ref_counts[block_id]

    def codec(self, block_id: int) -> Codec:
        """How a live or cached block stores its tokens."""
        return self._codecs[block_id]

    def is_findable(self, block_id: int) -> bool:
        """Whether the block has a key, so that whoever has its text may share it."""
        return self._prefixes[block_id] is not None

    def map(self) -> list[BlockState]:
        """The state of every block, by id."""
        states: list[BlockState] = [n or "free" for n in self._ref_counts]
        for block_id in self._cached:
            states[block_id] = "cached"
        states[NULL_BLOCK_ID] = "null"
        return states

    def match(self, token_ids: list[int]) -> int:
        """How many leading tokens alloc would find computed."""
        return len(self._index.find(token_ids)[0]) * self.block_size

    def alloc(self, token_ids: list[int]) -> Sequence:
        """A sequence that shares the longest sealed prefix of token_ids; takes no new block.

        Its num_tokens is what need not be computed: whole blocks, and never all of token_ids,
        because the last token's logits are wanted.
        """
        table, prefix = self._index.find(token_ids)
        held_ids = block_ids(table)
        for block_id in held_ids:
            if not self._ref_counts[block_id]:
                del self._cached[block_id]
            self._ref_counts[block_id] += 1
        num_tokens = len(table) * self.block_size
        return Sequence(table, num_tokens, len(held_ids), len(table), prefix)

    def append(self, seq: Sequence, num_tokens: int) -> list[BlockOp] | None:
        """Claim slots for num_tokens >= 1 more, or None, nothing changed, when the pool cannot.

        The copies returned must be done before the slots are written.
        """
        table = seq.table
        end = seq.num_tokens + num_tokens
        # The common case, once per session and step: room in a tail that is ours alone.
        if end <= len(table) * self.block_size and self._is_writable(table[-1]):
            seq.num_tokens = end
            return []
        return self._grow(seq, end)

    def seal(self, seq: Sequence, token_ids: list[int], num_computed: int) -> None:
        """Key the blocks that are full, known and computed; token_ids count from position 0.

        When two sequences computed equal blocks the first keeps the key and the second stays
        unsealed: tables never change for it.
        """
        num_full = min(num_computed, len(token_ids)) // self.block_size
        if num_full <= seq.num_sealed:
            return
        assert num_full * self.block_size <= seq.num_tokens, f"{num_computed} > {seq.num_tokens}"
        for idx in range(seq.num_sealed, num_full):
            prefix = self._index.extend(seq.prefix, token_ids, idx)
            first = self._index.lookup(prefix, Codec.NATIVE)
            seq.prefix = first[1] if first else prefix
            self._index.add(seq.table[idx], prefix, Codec.NATIVE)
        seq.num_sealed = num_full

    def unseal(self, seq: Sequence) -> None:
        """Take the keys of all blocks of seq: what they hold is not to be trusted any more."""
        for block_id in block_ids(seq.table):
            self._forget(block_id)

    def fork(self, seq: Sequence, num_tokens: int) -> Sequence:
        """A second sequence over seq's first num_tokens positions, sharing all of their blocks.

        Whoever first writes into the shared tail gets a copy of it. Of a compressed span that is
        cut nothing is shared: the child's num_tokens says how many positions it has.
        """
        num_tokens = self.num_kept(seq, num_tokens)
        child = replace(seq, table=seq.table[: self._num_entries_for(num_tokens)])
        self._cut(child, num_tokens)
        held_ids = block_ids(child.table)
        for block_id in held_ids:
            self._ref_counts[block_id] += 1
        child.num_blocks = len(held_ids)
        return child

    def truncate(self, seq: Sequence, num_tokens: int) -> int:
        """Give back the positions from num_tokens on; sealed blocks given back stay cached.

        A tail that is now a part of a sealed block is copied before it is written again. Of a
        compressed span that is cut nothing is kept: returns how many positions were.
        """
        num_tokens = self.num_kept(seq, num_tokens)
        self._cut(seq, num_tokens)
        num_kept = self._num_entries_for(num_tokens)
        dropped = block_ids(seq.table[num_kept:])
        del seq.table[num_kept:]
        seq.num_blocks -= len(dropped)
        self._release(dropped)
        return num_tokens

    def free(self, seq: Sequence) -> None:
        """Give back all of a sequence, once. Its sealed blocks stay cached until evicted."""
        self.truncate(seq, 0)
        seq.is_freed = True

    def num_kept(self, seq: Sequence, num_tokens: int) -> int:
        """What fork and truncate make of num_tokens: a compressed span is kept whole or not."""
        idx = num_tokens // self.block_size
        if idx >= len(seq.table):
            return num_tokens
        _, codec, span_idx = unpack_entry(seq.table[idx])
        return num_tokens if codec == Codec.NATIVE else (idx - span_idx) * self.block_size

    def holders(
        self, seq: Sequence, start: int, num_entries: int, sequences: Iterable[Sequence]
    ) -> list[Sequence] | None:
        """Those of `sequences`, all live ones, that hold the span of entries from `start` as seq
        does, seq included: whom `compress` wants.

        None when somebody has not sealed all of the span or holds only some of its blocks (then
        compressing would free nothing). The span starts at a multiple of its num_entries.
        """
        end = start + num_entries
        assert start % num_entries == 0, f"entries [{start}, {end}) are no span"
        span = seq.table[start:end]
        num_refs = {self._ref_counts[block_id] for block_id in block_ids(span)}
        if num_refs == {1}:
            sequences = (seq,)  # nobody else is to be looked for
        found = [s for s in sequences if s.num_sealed >= end and s.table[start:end] == span]
        return found if num_refs == {len(found)} else None

    def compress(self, holders: list[Sequence], start: int, codec: Codec) -> CompressSpan | None:
        """Let one block of `codec` stand for the span of sealed entries from `start` in the tables
        of its `holders`; None, nothing changed, when not even the reserve has a block.

        The sources are free at once and their keys forgotten: what is found is what is stored. The
        block is sealed if all of them were, unless another has the key. The span returned must be
        encoded after the block operations before it, and before anything is written.
        """
        num_entries = self.span_blocks[codec]
        end = start + num_entries
        span = holders[0].table[start:end]
        srcs = block_ids(span)
        src_codec = self._codecs[srcs[0]]
        check_span(self, holders, start, codec)
        if not self._num_unheld:
            return None
        dst = self._take()
        is_sealed = all(self._prefixes[src] is not None for src in srcs)
        prefix = self._prefixes[srcs[-1]]
        for src in reversed(srcs):
            self._forget(src)
            self._ref_counts[src] = 0
            self._recycled.append(src)
        self._ref_counts[dst] = len(holders)
        self._codecs[dst] = codec
        if prefix is not None and is_sealed:
            self._index.add(dst, prefix, codec)
        for seq in holders:
            seq.table[start:end] = [pack_entry(dst, codec, i) for i in range(num_entries)]
            seq.num_blocks -= len(srcs) - 1
        self.counters.count_compression(src_codec, codec, len(srcs) - 1)
        return CompressSpan(tuple(srcs), src_codec, dst, codec)

    def adopt(
        self, seq: Sequence, codec: Codec, token_ids: list[int], is_findable: bool
    ) -> int | None:
        """Take a block of `codec` for the tokens (counted from position 0) behind seq's whole
        blocks; None when none is free. Only a native one may be left with room. The caller fills it
        with what another block held. A full one is sealed, and keyed if it is to be findable.
        """
        start, num_entries = len(seq.table), self.span_blocks[codec]
        capacity = (start + num_entries) * self.block_size
        end = min(capacity, len(token_ids))
        is_full = end == capacity
        assert seq.num_sealed == start and start % num_entries == 0, f"{codec!r} after {seq=}"
        assert end > seq.num_tokens and (is_full or codec == Codec.NATIVE), f"{end=} {codec!r}"
        if not self.num_free:
            return None
        block_id = self._take()
        self._codecs[block_id] = codec
        seq.table += [pack_entry(block_id, codec, i) for i in range(num_entries)]
        seq.num_tokens, seq.num_blocks = end, seq.num_blocks + 1
        if is_full:
            for idx in range(start, start + num_entries):
                seq.prefix = prefix = self._index.extend(seq.prefix, token_ids, idx)
            seq.num_sealed += num_entries
            if first := self._index.lookup(prefix, codec):
                seq.prefix = first[1]
            elif is_findable:
                self._index.add(block_id, prefix, codec)
        return block_id

    def distrust(self, op: CompressSpan | RestoreBlock) -> None:
        """Take the key of a block that was not written after all; its holders are to be freed."""
        self._forget(op.dst)
        if op.dst in self._cached:
            del self._cached[op.dst]
            self._recycled.append(op.dst)

    def check_integrity(self, sequences: list[Sequence] | None = None) -> None:
        """Assert what holds between any two calls; given all live sequences, who owns what, too."""
        check_blocks(self)
        if sequences is not None:
            check_sequences(self, sequences)

    @property
    def _num_unheld(self) -> int:
        """Blocks that can be taken, the reserve included."""
        return len(self._recycled) + self.num_blocks - self._num_touched + len(self._cached)

    def _num_entries_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _cut(self, seq: Sequence, num_tokens: int) -> None:
        """Shorten what seq counts as claimed and sealed; its table is the caller's to cut."""
        assert not seq.is_freed and 0 <= num_tokens <= seq.num_tokens, f"{num_tokens} of {seq=}"
        seq.num_tokens = num_tokens
        while seq.num_sealed * self.block_size > num_tokens:
            assert seq.prefix is not None, f"{seq=}"
            seq.num_sealed, seq.prefix = seq.num_sealed - 1, seq.prefix.parent

    def _is_writable(self, block_id: int) -> bool:
        return self._ref_counts[block_id] == 1 and self._prefixes[block_id] is None

    def _grow(self, seq: Sequence, end: int) -> list[BlockOp] | None:
        """Append's slow path: new blocks, and a copy of a partial tail that is shared or sealed."""
        assert not seq.is_freed and end > seq.num_tokens, f"{end=} {seq.num_tokens=}"
        table = seq.table
        is_copied = seq.num_tokens % self.block_size > 0 and not self._is_writable(table[-1])
        num_new = self._num_entries_for(end) - len(table)
        num_returned = is_copied and self._ref_counts[table[-1]] == 1
        # The copy may come from the reserve.
        if num_new > self.num_free or num_new + is_copied > self._num_unheld + num_returned:
            return None
        ops: list[BlockOp] = []
        if is_copied:
            # Released first: when nothing else is free, our own sealed tail is evicted in place.
            old_id = table.pop()
            self._release([old_id])
            table.append(self._take())
            if table[-1] != old_id:
                ops.append(CopyBlock(old_id, table[-1]))
                self.counters.num_copies += 1
        for _ in range(num_new):
            table.append(self._take())
        seq.num_blocks += num_new
        seq.num_tokens = end
        return ops

    def _take(self) -> int:
        """A block off the free queue, with one reference. The caller knows that there is one."""
        if self._recycled:
            block_id = self._recycled.pop()
        elif self._num_touched < self.num_blocks:
            block_id = self._num_touched
            self._num_touched += 1
        else:
            block_id, _ = self._cached.popitem(last=False)
            self._forget(block_id)
            self.counters.num_evictions += 1
        self._ref_counts[block_id] = 1
        self._codecs[block_id] = Codec.NATIVE
        return block_id

    def _release(self, block_ids: list[int]) -> None:
        """One reference less on each; tails go first, so that a cached prefix outlives its ends."""
        for block_id in reversed(block_ids):
            num_refs = self._ref_counts[block_id] - 1
            assert num_refs >= 0, f"block {block_id} freed twice"
            self._ref_counts[block_id] = num_refs
            if num_refs:
                continue
            if self._prefixes[block_id] is None:
                self._recycled.append(block_id)
            else:
                self._cached[block_id] = None

    def _forget(self, block_id: int) -> None:
        """Take a block's key, if it has one."""
        if self.is_findable(block_id):
            self._index.forget(block_id, self._codecs[block_id])

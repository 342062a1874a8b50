"""Who owns which block. Knows token ids and block ids; never tensors, requests or sessions.

A block is in exactly one place, and moves along these arrows only:

    untouched --take--> live --last reference gone, no key--> recycled --take--> live
                        live --last reference gone, sealed--> cached   --hit---> live
                                                              cached   --evict-> live (key lost)

Free blocks are taken in this order: recycled (the memory is warm and nothing is lost), untouched
(so memory in use grows only with the chats), cached (oldest first: a prefix is forgotten). The
queue of cached blocks is the prefix cache. Block 0, the null block, is in none of these places.

A sequence's positions, with sealed = num_sealed * block_size:

    [0, sealed)             hashed: other sequences may hit these blocks; never written again
    [sealed, num_tokens)    claimed: this sequence writes them, if nobody shares the block
    [num_tokens, capacity)  room in the tail block, capacity = len(table) * block_size
"""

from __future__ import annotations

import hashlib
import struct
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from typing import Literal

from kvchat.config import NULL_BLOCK_ID
from kvchat.kv.layout import BLOCK_ID_BITS, Codec


@dataclass(frozen=True, slots=True)
class CopyBlock:
    """Copy all of block `src` to block `dst`, before anything is written in this step."""

    src: int
    dst: int


@dataclass(frozen=True, slots=True)
class CompressSpan:
    """Encode the tokens of blocks `srcs`, in order of position, into block `dst`.

    All srcs are of codec `src_codec`; dst is none of them and becomes one of `codec`.
    """

    srcs: tuple[int, ...]
    src_codec: Codec
    dst: int
    codec: Codec


BlockOp = CopyBlock | CompressSpan  # what the tensors' owner must do, in order of emission
BlockState = int | Literal["null", "free", "cached"]  # an int is a live block's ref_count


@dataclass(slots=True, eq=False)
class Prefix:
    """All token ids from position 0 to a block's end: one block more than `parent` has."""

    parent: Prefix | None = field(repr=False)
    token_ids: bytes  # this block's own, int32 little endian
    hash: bytes


@dataclass(slots=True, eq=False)
class Sequence:
    """One run of positions and the blocks that hold it. Only the pool changes it."""

    table: list[int] = field(default_factory=list)  # one entry per block_size positions
    num_tokens: int = 0  # slots claimed
    num_sealed: int = 0  # leading blocks whose hash is known
    prefix: Prefix | None = None  # of those blocks
    is_freed: bool = False


@dataclass(slots=True)
class PoolCounters:
    """Blocks counted since the start."""

    num_evictions: int = 0  # cached ones taken, which lost their key
    num_copies: int = 0  # copied because a tail was shared or sealed


class BlockPool:
    """Blocks 1 .. num_blocks-1: reference counts, the free queue and the prefix index.

    `fingerprint` (model and KV format) and `salt` go into every hash, so that blocks of another
    model or of a private pool have other keys.
    """

    def __init__(
        self, num_blocks: int, block_size: int, fingerprint: bytes = b"", salt: bytes = b""
    ) -> None:
        assert 1 < num_blocks <= 1 << BLOCK_ID_BITS, f"num_blocks {num_blocks}"
        assert block_size > 0, f"block_size {block_size}"
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.counters = PoolCounters()
        self._ref_counts = [0] * num_blocks
        self._prefixes: list[Prefix | None] = [None] * num_blocks  # of sealed blocks
        self._index: dict[tuple[bytes, Codec], int] = {}  # key of a sealed block -> its id
        self._recycled: list[int] = []
        self._num_touched = 1  # blocks below this id have been taken at least once; 0 is null
        self._cached: OrderedDict[int, None] = OrderedDict()  # oldest first
        self._pack_ids = struct.Struct(f"<{block_size}i").pack
        self._hasher = hashlib.sha256(_field(b"F", fingerprint) + _field(b"S", salt))

    @property
    def num_usable(self) -> int:
        """Blocks that sequences can hold: all but the null block."""
        return self.num_blocks - 1

    @property
    def num_free(self) -> int:
        """Blocks that can be taken now, cached ones included."""
        return len(self._recycled) + self.num_blocks - self._num_touched + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Of the free blocks, those that a later prefix may hit."""
        return len(self._cached)

    def ref_count(self, block_id: int) -> int:
        """How many sequences hold this block."""
        return self._ref_counts[block_id]

    def map(self) -> list[BlockState]:
        """The state of every block, by id."""
        states: list[BlockState] = [n or "free" for n in self._ref_counts]
        for block_id in self._cached:
            states[block_id] = "cached"
        states[NULL_BLOCK_ID] = "null"
        return states

    def match(self, token_ids: list[int]) -> int:
        """How many leading tokens alloc would find computed."""
        return len(self._find(token_ids)[0]) * self.block_size

    def alloc(self, token_ids: list[int]) -> Sequence:
        """A sequence that shares the longest sealed prefix of token_ids; takes no new block.

        Its num_tokens is what need not be computed: whole blocks, and never all of token_ids,
        because the last token's logits are wanted.
        """
        table, prefix = self._find(token_ids)
        for block_id in table:
            if not self._ref_counts[block_id]:
                del self._cached[block_id]
            self._ref_counts[block_id] += 1
        return Sequence(table, len(table) * self.block_size, len(table), prefix)

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
            prefix = self._extend(seq.prefix, token_ids, idx)
            first_id = self._lookup(prefix)
            seq.prefix = prefix if first_id is None else self._prefixes[first_id]
            if (key := (prefix.hash, Codec.NATIVE)) not in self._index:
                self._index[key] = seq.table[idx]
                self._prefixes[seq.table[idx]] = prefix
        seq.num_sealed = num_full

    def unseal(self, seq: Sequence) -> None:
        """Take the keys of all blocks of seq: what they hold is not to be trusted any more."""
        for block_id in seq.table:
            if self._prefixes[block_id] is not None:
                self._forget(block_id)

    def fork(self, seq: Sequence, num_tokens: int) -> Sequence:
        """A second sequence over seq's first num_tokens positions, sharing all of their blocks.

        Whoever first writes into the shared tail gets a copy of it.
        """
        child = replace(seq, table=seq.table[: self._num_blocks_for(num_tokens)])
        self._cut(child, num_tokens)
        for block_id in child.table:
            self._ref_counts[block_id] += 1
        return child

    def truncate(self, seq: Sequence, num_tokens: int) -> None:
        """Give back the positions from num_tokens on; sealed blocks given back stay cached.

        A tail that is now a part of a sealed block is copied before it is written again.
        """
        self._cut(seq, num_tokens)
        num_kept = self._num_blocks_for(num_tokens)
        dropped = seq.table[num_kept:]
        del seq.table[num_kept:]
        self._release(dropped)

    def free(self, seq: Sequence) -> None:
        """Give back all of a sequence, once. Its sealed blocks stay cached until evicted."""
        self.truncate(seq, 0)
        seq.is_freed = True

    def check_integrity(self, sequences: list[Sequence] | None = None) -> None:
        """Assert what holds between any two calls; given all live sequences, who owns what, too."""
        refs, untouched = self._ref_counts, range(self._num_touched, self.num_blocks)
        live = [block_id for block_id, n in enumerate(refs) if n]
        places = [NULL_BLOCK_ID, *self._recycled, *untouched, *self._cached, *live]
        assert sorted(places) == list(range(self.num_blocks)), (
            f"null, {self._recycled=}, {untouched=}, {self._cached=}, {live=}: not every block once"
        )
        keys = {(p.hash, Codec.NATIVE): i for i, p in enumerate(self._prefixes) if p}
        assert keys == self._index, f"{self._index=} is not that of the sealed blocks {keys}"
        sealed = set(keys.values())
        assert self._cached.keys() <= sealed, f"{self._cached=} not all in {sealed=}"
        assert sealed.isdisjoint((*self._recycled, *untouched)), f"{sealed=}, {self._recycled=}"
        if sequences is None:
            return
        counts = [0] * self.num_blocks
        for seq in sequences:
            self._check_sequence(seq)
            for block_id in seq.table:
                counts[block_id] += 1
        assert counts == refs, f"blocks are named {counts} times, {refs=}"

    def _check_sequence(self, seq: Sequence) -> None:
        assert len(seq.table) == self._num_blocks_for(seq.num_tokens), f"{seq=}"
        assert seq.num_sealed * self.block_size <= seq.num_tokens, f"{seq=}"
        prefix = seq.prefix
        for block_id in reversed(seq.table[: seq.num_sealed]):
            assert prefix is not None, f"prefix shorter than {seq.num_sealed} blocks"
            held = self._prefixes[block_id]
            assert held is None or _is_same(held, prefix), f"block {block_id} holds another text"
            prefix = prefix.parent
        assert prefix is None, f"prefix longer than {seq.num_sealed} blocks"

    def _num_blocks_for(self, num_tokens: int) -> int:
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
        num_new = self._num_blocks_for(end) - len(table) + is_copied
        num_returned = is_copied and self._ref_counts[table[-1]] == 1
        if num_new > self.num_free + num_returned:
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
        while len(table) * self.block_size < end:
            table.append(self._take())
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
        """Take a sealed block's key."""
        prefix = self._prefixes[block_id]
        assert prefix is not None, f"block {block_id} has no key"
        del self._index[prefix.hash, Codec.NATIVE]
        self._prefixes[block_id] = None

    def _find(self, token_ids: list[int]) -> tuple[list[int], Prefix | None]:
        """The sealed blocks of the longest prefix that leaves a token over, and that prefix."""
        table: list[int] = []
        prefix: Prefix | None = None
        for idx in range((len(token_ids) - 1) // self.block_size):
            block_id = self._lookup(self._extend(prefix, token_ids, idx))
            if block_id is None:
                break
            table.append(block_id)
            prefix = self._prefixes[block_id]
        return table, prefix

    def _lookup(self, prefix: Prefix) -> int | None:
        """The block sealed with exactly these token ids; an equal hash alone is not believed."""
        block_id = self._index.get((prefix.hash, Codec.NATIVE))
        if block_id is None or not _is_same(self._prefixes[block_id], prefix):
            return None
        return block_id

    def _extend(self, parent: Prefix | None, token_ids: list[int], idx: int) -> Prefix:
        """`parent` and the ids of block `idx` after it."""
        start = idx * self.block_size
        packed = self._pack_ids(*token_ids[start : start + self.block_size])
        return Prefix(parent, packed, self._hash(parent.hash if parent else b"", packed))

    def _hash(self, parent_hash: bytes, packed_ids: bytes) -> bytes:
        """sha256(fingerprint, salt, parent hash, token ids), each tagged and length-prefixed."""
        hasher = self._hasher.copy()
        hasher.update(_field(b"P", parent_hash) + _field(b"T", packed_ids))
        return hasher.digest()


def _field(tag: bytes, value: bytes) -> bytes:
    return tag + len(value).to_bytes(8, "little") + value


def _is_same(a: Prefix | None, b: Prefix | None) -> bool:
    """Equal token ids all the way; one step when the parents are the same object, as most are."""
    while a is not b:
        if a is None or b is None or a.token_ids != b.token_ids:
            return False
        a, b = a.parent, b.parent
    return True

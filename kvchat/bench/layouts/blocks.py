"""A list of equal pieces a chat: contiguous chunks off a heap, or blocks of the real pool."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kvchat.bench.layouts import WORD_BYTES, Words
from kvchat.bench.layouts.heap import Heap
from kvchat.config import KVPolicy
from kvchat.kv.block_pool import BlockPool, CompressSpan, Sequence
from kvchat.kv.layout import BlockLayout, Codec, block_ids

_STEP_TOKENS = 512  # a longer prompt comes in steps, and spans are compressed between them
_NUM_RESERVED = 2  # blocks that serve only compression


@dataclass(slots=True)
class _Chunked:
    offsets: list[int] = field(default_factory=list)  # words
    num_tokens: int = 0


class ChunksLayout:
    """A chat takes a contiguous chunk of chunk_tokens whenever the last one is full (the
    textbook's ChunkedKV)."""

    is_fixed = False
    num_copied = 0

    def __init__(self, num_words: int, chunk_tokens: int) -> None:
        self.name = f"chunks of {chunk_tokens}"
        self._chunk = chunk_tokens
        self._words = np.zeros(num_words, np.uint64)
        self._heap = Heap(num_words)
        self._chats: dict[int, _Chunked] = {}

    @property
    def free_bytes(self) -> int:
        return self._heap.num_free * WORD_BYTES

    @property
    def num_slots(self) -> int:
        return self._heap.size - self._heap.num_free

    def open(self, chat_id: int, words: Words) -> bool:
        self._chats[chat_id] = _Chunked()
        if self.append(chat_id, words):
            return True
        self.close(chat_id)
        return False

    def append(self, chat_id: int, words: Words) -> bool:
        chat, at = self._chats[chat_id], 0
        while chat.num_tokens + len(words) > len(chat.offsets) * self._chunk:
            offset = self._heap.take(self._chunk)
            if offset is None:
                return False
            chat.offsets.append(offset)
        while at < len(words):
            inside = chat.num_tokens % self._chunk
            part = words[at : at + self._chunk - inside]
            start = chat.offsets[chat.num_tokens // self._chunk] + inside
            self._words[start : start + len(part)] = part
            chat.num_tokens += len(part)
            at += len(part)
        return True

    def close(self, chat_id: int) -> None:
        for offset in self._chats.pop(chat_id).offsets:
            self._heap.give(offset)

    def read(self, chat_id: int) -> Iterator[Words]:
        chat = self._chats[chat_id]
        for idx, offset in enumerate(chat.offsets):
            num_used = min(self._chunk, max(0, chat.num_tokens - idx * self._chunk))
            yield self._words[offset : offset + num_used]

    def num_scanned(self) -> int:
        return sum(chat.num_tokens for chat in self._chats.values())

    def check(self) -> None:
        self._heap.check()
        held = sum(len(chat.offsets) for chat in self._chats.values()) * self._chunk
        assert self._heap.num_free + held == self._heap.size, f"{self._chats}"


@dataclass(slots=True)
class _Paged:
    seq: Sequence
    token_ids: list[int]
    num_tokens: int  # of whole appends
    next_span: int = 0  # where the next position lies that may be compressed; 0: not begun


class PagedLayout:
    """Blocks of kvchat's own pool; with a codec below native every span that has left the window
    is compressed at once, all but the sinks."""

    is_fixed = False

    def __init__(self, layout: BlockLayout, num_bytes: int, max_tokens: int) -> None:
        """num_bytes: of the pool, as `layout` counts them; the null block is paid for."""
        spec, codec = layout.spec, layout.lowest
        self.name = (
            f"paged, {codec.name.lower()}" if codec else f"paged, blocks of {spec.block_size}"
        )
        self.num_copied = 0
        num_blocks = num_bytes // layout.bytes_per_block
        self._codec, self._block_size = codec, spec.block_size
        self._span = layout.span_tokens(codec)
        self._policy = KVPolicy(codec.name.lower(), span_blocks=layout.span_blocks)
        self._pool = BlockPool(
            num_blocks,
            spec.block_size,
            span_blocks=layout.span_blocks,
            num_reserved=_NUM_RESERVED if codec else 0,
        )
        self._memory = np.zeros((num_blocks, spec.block_size * WORD_BYTES), np.uint8)
        # A compressed block keeps of each word what a codec keeps of K and V: so many bits.
        spans = dict(zip(Codec, layout.span_blocks, strict=False))
        self._kept = {codec: np.dtype(f"u{WORD_BYTES // n}") for codec, n in spans.items()}
        self._words = self._memory.view(np.uint64)  # [num_blocks, block_size]
        self._flat = self._words.reshape(-1)
        self._numbers = list(range(max_tokens))
        self._chats: dict[int, _Paged] = {}

    @property
    def free_bytes(self) -> int:
        return self._pool.num_free * self._memory.shape[1]

    @property
    def num_slots(self) -> int:
        return sum(len(chat.seq.table) for chat in self._chats.values()) * self._block_size

    def open(self, chat_id: int, words: Words) -> bool:
        token_ids = [chat_id, *self._numbers[1:]]  # no two chats have a prefix in common
        self._chats[chat_id] = _Paged(self._pool.alloc(token_ids[:1]), token_ids, 0)
        if self.append(chat_id, words):
            return True
        self.close(chat_id)
        return False

    def append(self, chat_id: int, words: Words) -> bool:
        chat = self._chats[chat_id]
        step = _STEP_TOKENS if self._codec else len(words)
        at = chat.seq.num_tokens - chat.num_tokens  # steps that a former call came to
        while at < len(words):
            if not self._claim(chat.seq, words[at : at + step]):
                return False
            if self._codec:
                self._compress(chat)
            at += step
        chat.num_tokens += len(words)
        return True

    def close(self, chat_id: int) -> None:
        self._pool.free(self._chats.pop(chat_id).seq)

    def read(self, chat_id: int) -> Iterator[npt.NDArray[np.generic]]:
        seq = self._chats[chat_id].seq
        left = seq.num_tokens
        for block_id in block_ids(seq.table):
            kept = self._memory[block_id].view(self._kept[self._pool.codec(block_id)])
            yield kept[:left]
            left -= len(kept)

    def num_scanned(self) -> int:
        return sum(chat.seq.num_tokens for chat in self._chats.values())

    def check(self) -> None:
        self._pool.check_integrity([chat.seq for chat in self._chats.values()])

    def _claim(self, seq: Sequence, words: Words) -> bool:
        """Claim slots in the tail, which is native, and write."""
        at, size = seq.num_tokens, self._block_size
        ops = self._pool.append(seq, len(words))
        if ops is None:
            return False
        assert not ops, f"{ops}: nothing here is shared"
        if len(words) == 1:
            self._flat[seq.table[at // size] * size + at % size] = words[0]
            return True
        done = 0
        while done < len(words):
            inside = (at + done) % size
            part = words[done : done + size - inside]
            block_id = seq.table[(at + done) // size]
            self._words[block_id, inside : inside + len(part)] = part
            done += len(part)
        return True

    def _compress(self, chat: _Paged) -> None:
        """Compress what has left the window; what finds no block is left for the next time."""
        seq = chat.seq
        start, end = self._policy.compressible(seq.num_tokens, self._codec, self._block_size)
        start = max(start, chat.next_span)
        if start >= end:
            return
        self._pool.seal(seq, chat.token_ids, seq.num_tokens)
        for at in range(start, end, self._span):
            op = self._pool.compress([seq], at // self._block_size, self._codec)
            if op is None:
                return
            self._encode(op)
            chat.next_span = at + self._span

    def _encode(self, op: CompressSpan) -> None:
        words = self._words[list(op.srcs)].reshape(-1)
        kept = self._kept[op.codec]
        self._memory[op.dst].view(kept)[:] = words.astype(kept)
        self.num_copied += words.nbytes

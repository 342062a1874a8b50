"""One contiguous piece a chat: reserved at full length, or moved whenever it grows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from kvchat.bench.layouts import WORD_BYTES, Words
from kvchat.bench.layouts.heap import Heap


@dataclass(slots=True)
class _Reserved:
    offset: int  # words
    num_tokens: int


class StaticLayout:
    """Every chat reserves max_tokens when it comes (transformers' StaticCache).

    Attention then goes over the whole reservation, masked: its length is part of the shape.
    """

    name = "contiguous, full length"
    is_fixed = True
    num_copied = 0

    def __init__(self, num_words: int, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._words = np.zeros(num_words, np.uint64)
        self._heap = Heap(num_words)
        self._chats: dict[int, _Reserved] = {}

    @property
    def free_bytes(self) -> int:
        return self._heap.num_free * WORD_BYTES

    @property
    def num_slots(self) -> int:
        return len(self._chats) * self._max_tokens

    def open(self, chat_id: int, words: Words) -> bool:
        offset = self._heap.take(self._max_tokens)
        if offset is None:
            return False
        self._chats[chat_id] = _Reserved(offset, 0)
        return self.append(chat_id, words)

    def append(self, chat_id: int, words: Words) -> bool:
        chat = self._chats[chat_id]
        end = chat.num_tokens + len(words)
        if end > self._max_tokens:
            return False
        self._words[chat.offset + chat.num_tokens : chat.offset + end] = words
        chat.num_tokens = end
        return True

    def close(self, chat_id: int) -> None:
        self._heap.give(self._chats.pop(chat_id).offset)

    def read(self, chat_id: int) -> Iterator[Words]:
        chat = self._chats[chat_id]
        yield self._words[chat.offset : chat.offset + chat.num_tokens]

    def num_scanned(self) -> int:
        return self._max_tokens * len(self._chats)

    def check(self) -> None:
        self._heap.check()
        assert self._heap.num_free + self.num_slots == self._heap.size, f"{self._chats}"


NUM_PIECES = 4
_PIECE = np.uint16  # WORD_BYTES / NUM_PIECES


@dataclass(slots=True)
class _Grown:
    offsets: list[int]  # of the pieces, in their unit
    lengths: list[int]  # of the pieces, in tokens: num_tokens, or more in the midst of a growth
    num_tokens: int


class DynamicLayout:
    """Every growth takes a longer piece, copies, and gives the old one back (transformers'
    DynamicCache, which concatenates).

    A model has two tensors a layer, grown one after another; here a chat has NUM_PIECES, so that
    old and new stand side by side for a quarter of it only. For a model with more layers that is
    still too much by less than an eighth of the chat.
    """

    name = "contiguous, grown by copying"
    is_fixed = False

    def __init__(self, num_words: int) -> None:
        self._num_units_copied = 0
        self._units = np.zeros(num_words * NUM_PIECES, _PIECE)
        self._heap = Heap(num_words * NUM_PIECES)
        self._chats: dict[int, _Grown] = {}

    @property
    def num_copied(self) -> int:
        return self._num_units_copied * self._units.itemsize

    @property
    def free_bytes(self) -> int:
        return self._heap.num_free * self._units.itemsize

    @property
    def num_slots(self) -> int:
        return (self._heap.size - self._heap.num_free) // NUM_PIECES

    def open(self, chat_id: int, words: Words) -> bool:
        self._chats[chat_id] = _Grown([0] * NUM_PIECES, [0] * NUM_PIECES, 0)
        if self.append(chat_id, words):
            return True
        self.close(chat_id)
        return False

    def append(self, chat_id: int, words: Words) -> bool:
        chat = self._chats[chat_id]
        old, new = chat.num_tokens, chat.num_tokens + len(words)
        pieces = words.view(_PIECE).reshape(-1, NUM_PIECES)
        for idx in range(NUM_PIECES):
            if chat.lengths[idx] < new and not self._grow(chat, idx, new):
                return False
            start = chat.offsets[idx] + old
            self._units[start : start + len(words)] = pieces[:, idx]
        chat.num_tokens = new
        return True

    def _grow(self, chat: _Grown, idx: int, new: int) -> bool:
        """Move a piece to an extent of `new` tokens."""
        offset, before, old = self._heap.take(new), chat.offsets[idx], chat.lengths[idx]
        if offset is None:
            return False
        if old:
            self._units[offset : offset + old] = self._units[before : before + old]
            self._heap.give(before)
            self._num_units_copied += old
        chat.offsets[idx], chat.lengths[idx] = offset, new
        return True

    def close(self, chat_id: int) -> None:
        chat = self._chats.pop(chat_id)
        for offset, length in zip(chat.offsets, chat.lengths, strict=True):
            if length:
                self._heap.give(offset)

    def read(self, chat_id: int) -> Iterator[Words]:
        chat = self._chats[chat_id]
        pieces = [self._units[at : at + chat.num_tokens] for at in chat.offsets]
        yield np.stack(pieces, axis=1).view(np.uint64)[:, 0]

    def num_scanned(self) -> int:
        return sum(chat.num_tokens for chat in self._chats.values())

    def check(self) -> None:
        self._heap.check()
        held = sum(sum(chat.lengths) for chat in self._chats.values())
        assert self._heap.num_free + held == self._heap.size, f"{self._chats}"

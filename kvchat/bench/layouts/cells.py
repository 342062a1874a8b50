"""One buffer made at the start (llama.cpp): cut into equal slots, or shared cell by cell."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from kvchat.bench.layouts import WORD_BYTES, Words

_PADDING = 256  # llama.cpp's attention goes over a multiple of so many cells
_FREE = -1
_LOOK = 64  # cells looked at in one go
Cells = npt.NDArray[np.int64]


def _padded(num_cells: int, size: int) -> int:
    return min(size, -(-num_cells // _PADDING) * _PADDING)


class SlotsLayout:
    """num_parts equal slots; a chat has one of them until it leaves, and no more than it."""

    is_fixed = True
    num_copied = 0

    def __init__(self, num_words: int, num_parts: int) -> None:
        self.name = f"{num_parts} equal slots"
        self._size = num_words // num_parts  # tokens of a slot; what is left over is nobody's
        self._words = np.zeros((num_parts, self._size), np.uint64)
        self._free = list(range(num_parts))  # the longest unused first
        self._held: dict[int, int] = {}  # chat -> slot
        self._lengths: dict[int, int] = {}

    @property
    def free_bytes(self) -> int:
        return len(self._free) * self._size * WORD_BYTES

    @property
    def num_slots(self) -> int:
        return len(self._held) * self._size

    def open(self, chat_id: int, words: Words) -> bool:
        if not self._free or len(words) > self._size:
            return False
        self._held[chat_id] = self._free.pop(0)
        self._lengths[chat_id] = 0
        return self.append(chat_id, words)

    def append(self, chat_id: int, words: Words) -> bool:
        start = self._lengths[chat_id]
        end = start + len(words)
        if end > self._size:
            return False
        self._words[self._held[chat_id], start:end] = words
        self._lengths[chat_id] = end
        return True

    def close(self, chat_id: int) -> None:
        del self._lengths[chat_id]
        self._free.append(self._held.pop(chat_id))

    def read(self, chat_id: int) -> Iterator[Words]:
        yield self._words[self._held[chat_id], : self._lengths[chat_id]]

    def num_scanned(self) -> int:
        return sum(_padded(length, self._size) for length in self._lengths.values())

    def check(self) -> None:
        parts = sorted([*self._free, *self._held.values()])
        assert parts == list(range(len(self._words))), f"{self._free} {self._held}"
        assert self._held.keys() == self._lengths.keys(), f"{self._held} {self._lengths}"


class UnifiedLayout:
    """One buffer of cells for all chats; each cell says whose it is and of which position.

    Tokens go to the next free cells from a moving head, in any order, so nothing is reserved and
    nothing fragments; but attention goes over all cells up to the last one in use, masked.
    """

    name = "one buffer of cells"
    is_fixed = False
    num_copied = 0

    def __init__(self, num_words: int) -> None:
        self._words = np.zeros(num_words, np.uint64)
        self._owners = np.full(num_words, _FREE, np.int32)
        self._positions = np.zeros(num_words, np.int32)
        self._head = 0
        self._lengths: dict[int, int] = {}
        self._num_used = 0

    @property
    def free_bytes(self) -> int:
        return (len(self._words) - self._num_used) * WORD_BYTES

    @property
    def num_slots(self) -> int:
        return self._num_used

    def open(self, chat_id: int, words: Words) -> bool:
        self._lengths[chat_id] = 0
        if self.append(chat_id, words):
            return True
        del self._lengths[chat_id]
        return False

    def append(self, chat_id: int, words: Words) -> bool:
        num_new, start = len(words), self._lengths[chat_id]
        if self._num_used + num_new > len(self._words):
            return False
        if self._head > self._num_used + 2 * num_new:
            self._head = 0  # many free cells before it
        cells = self._find(num_new)
        self._words[cells] = words
        self._owners[cells] = chat_id
        self._positions[cells] = np.arange(start, start + num_new)
        self._head = int(cells[-1]) + 1
        self._lengths[chat_id] = start + num_new
        self._num_used += num_new
        return True

    def close(self, chat_id: int) -> None:
        cells = np.flatnonzero(self._owners == chat_id)
        self._owners[cells] = _FREE
        self._head = min(self._head, int(cells[0]))
        self._num_used -= len(cells)
        del self._lengths[chat_id]

    def read(self, chat_id: int) -> Iterator[Words]:
        cells = np.flatnonzero(self._owners == chat_id)
        yield self._words[cells[self._positions[cells].argsort()]]

    def num_scanned(self) -> int:
        used = np.flatnonzero(self._owners != _FREE)
        end = int(used[-1]) + 1 if len(used) else 0
        return _padded(end, len(self._words)) * len(self._lengths)

    def check(self) -> None:
        owners, counts = np.unique(self._owners[self._owners != _FREE], return_counts=True)
        held = dict(zip(owners.tolist(), counts.tolist(), strict=True))
        assert held == self._lengths, f"{held} {self._lengths}"
        assert sum(held.values()) == self._num_used, f"{held} {self._num_used}"
        for chat_id, length in self._lengths.items():
            positions = np.sort(self._positions[self._owners == chat_id])
            assert (positions == np.arange(length)).all(), f"chat {chat_id}: {positions}"

    def _find(self, num_new: int) -> Cells:
        """The next free cells from the head on, round the end. There are enough."""
        size, at, found, num_found = len(self._owners), self._head, [], 0
        while num_found < num_new:
            at = 0 if at >= size else at
            end = min(size, at + max(_LOOK, num_new))
            free = np.flatnonzero(self._owners[at:end] == _FREE)[: num_new - num_found] + at
            found.append(free)
            num_found, at = num_found + len(free), end
        return found[0] if len(found) == 1 else np.concatenate(found)

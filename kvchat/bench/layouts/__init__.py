"""Ways of keeping many chats' KV in the same bytes, each a real allocator, under one trace.

Every layout is given the same arena of bytes. One word of WORD_BYTES stands for all K and V of a
token, so offsets, copies and overlaps are real while the arena stays small.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import numpy.typing as npt

WORD_BYTES = 8  # of the arena, for one token in native form
Words = npt.NDArray[np.uint64]


class Layout(Protocol):
    """One way of keeping chats. Chats are named by a number; their words are what is stored."""

    name: str
    is_fixed: bool  # a chat's room is decided when it comes; no other's leaving gives it more

    @property
    def num_copied(self) -> int:
        """Bytes of the arena moved so far, to grow or to compress."""

    @property
    def free_bytes(self) -> int:
        """Bytes of the arena that no chat holds."""

    @property
    def num_slots(self) -> int:
        """Token slots that chats hold, used or not."""

    def open(self, chat_id: int, words: Words) -> bool:
        """Place a new chat's first words; False, nothing held, when it cannot."""

    def append(self, chat_id: int, words: Words) -> bool:
        """Place more words after the others. When False, the same call may be made again after
        others have left, or the chat closed; of what is not placed it may hold some room."""

    def close(self, chat_id: int) -> None:
        """Give back all that the chat holds."""

    def read(self, chat_id: int) -> Iterator[npt.NDArray[np.generic]]:
        """What is stored, in order of position: uint64, or of compressed words the low bits."""

    def num_scanned(self) -> int:
        """Token slots that attention goes over for one new token of each chat, masked or not."""

    def check(self) -> None:
        """Assert that no two chats overlap and that every byte is somebody's or free."""

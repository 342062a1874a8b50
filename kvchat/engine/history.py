"""What was compressed when, by session: the last few entries, for /kv."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from kvchat.kv.ladder import Compression
from kvchat.kv.layout import Codec

MAX_ENTRIES = 16  # of a session
JOIN_S = 10.0  # neighbouring spans that are compressed within this time are one entry


class Compressed(NamedTuple):
    """Positions [start, end) of a session that went from one codec to another, at_s seconds after
    the start of the program; as they stood then."""

    at_s: float
    start: int
    end: int
    src_codec: Codec
    codec: Codec


class History:
    """By session id. `clock` gives seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._started = clock, clock()
        self._entries: dict[int, deque[Compressed]] = {}

    def note(self, compression: Compression) -> None:
        """A span of these sessions was compressed."""
        op, at_s = compression.op, self._clock() - self._started
        new = Compressed(at_s, compression.start, compression.end, op.src_codec, op.codec)
        for session_id in compression.session_ids:
            entries = self._entries.setdefault(session_id, deque(maxlen=MAX_ENTRIES))
            if entries and _is_next(entries[-1], new):
                entries[-1] = entries[-1]._replace(end=new.end)
            else:
                entries.append(new)

    def fork(self, parent_session_id: int, child_session_id: int, num_tokens: int) -> None:
        """The child, whatever it was, shares what was compressed of the first num_tokens."""
        self.forget(child_session_id)
        if parent_session_id in self._entries:
            self._entries[child_session_id] = self._entries[parent_session_id].copy()
            self.trim(child_session_id, num_tokens)

    def trim(self, session_id: int, num_tokens: int) -> None:
        """The session has its first num_tokens only."""
        entries = self._entries.pop(session_id, ())
        kept = [
            entry._replace(end=min(entry.end, num_tokens))
            for entry in entries
            if entry.start < num_tokens
        ]
        if kept:
            self._entries[session_id] = deque(kept, MAX_ENTRIES)

    def forget(self, session_id: int) -> None:
        """The session is closed."""
        self._entries.pop(session_id, None)

    def of(self, session_id: int) -> tuple[Compressed, ...]:
        """Oldest first."""
        return tuple(self._entries.get(session_id, ()))


def _is_next(last: Compressed, new: Compressed) -> bool:
    is_same_kind = last[3:] == new[3:]
    return is_same_kind and last.end == new.start and new.at_s - last.at_s < JOIN_S

"""A reply as it streams: chunks in, whole lines and the unfinished line out. Knows no screen."""

from __future__ import annotations

from collections.abc import Iterable

from kvchat.chat.reply import Chunk, ChunkKind
from kvchat.terminal.show import Fragment
from kvchat.terminal.views import user_lines


class Feed:
    """What of a reply is finished and what is not.

    `lines` waits to be printed; `tail` is the line after it, (style, text), still growing. Empty
    lines are held until something follows, so that a reply does not end in a gap.
    """

    def __init__(self) -> None:
        self.lines: list[list[Fragment]] = []
        self.tail: Fragment = ("", "")
        self._kind: ChunkKind | None = None
        self._num_held = 0

    def take_lines(self) -> list[list[Fragment]]:
        """The finished lines that were not taken yet."""
        lines, self.lines = self.lines, []
        return lines

    def add(self, chunks: Iterable[Chunk]) -> None:
        """Take in output; reasoning, answer and notices never share a line."""
        for chunk in chunks:
            if chunk.kind == "asked":
                self.end()
                self.lines += user_lines(chunk.text)
                continue
            if self._kind not in (None, chunk.kind):
                self._break(is_spaced="reasoning" in (self._kind, chunk.kind))
            self._kind = chunk.kind
            text = f"[{chunk.text}]" if chunk.is_comment else chunk.text
            *whole, rest = (self.tail[1] + text).split("\n")
            for line in whole:
                self._finish_line(line)
            self.tail = (self._style, rest)
            if chunk.is_comment:
                self._break()

    def end(self) -> None:
        """The reply, if any, is over: a blank line parts it from the next."""
        if self._kind is None:
            return
        self._break()
        self._num_held = 0
        self.lines.append([])
        self._kind = None

    @property
    def _style(self) -> str:
        return "" if self._kind == "answer" else "dim"

    def _break(self, is_spaced: bool = False) -> None:
        if self.tail[1]:
            self._finish_line(self.tail[1])
        self.tail = ("", "")
        self._num_held = int(is_spaced)

    def _finish_line(self, text: str) -> None:
        text = text.removesuffix("\r")
        if not text.strip():
            self._num_held += 1
            return
        self.lines += [[]] * self._num_held
        self._num_held = 0
        self.lines.append([(self._style, text)])

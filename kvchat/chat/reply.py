"""One reply being read: token ids in, chunks for the eye out. Knows the tokenizer; never sessions.

ids -> StreamDecoder -> stop strings (text that may begin one is held back)
    -> reasoning and answer (a <think> block at the start is the reasoning)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from kvchat.chat.tokenizer import StreamDecoder

THINK_START, THINK_END = "<think>", "</think>"

ChunkKind = Literal["asked", "answer", "reasoning", "notice", "remark"]


@dataclass(frozen=True, slots=True)
class Chunk:
    """A bit of output: the turn that is asked, the model's answer or reasoning, or a sentence of
    kvchat's own; a notice must be seen, a remark is for those who watch."""

    kind: ChunkKind
    text: str

    @property
    def is_comment(self) -> bool:
        """A whole sentence about the chat, not part of it."""
        return self.kind in ("notice", "remark")


@dataclass(frozen=True)
class ReplyStyle:
    """How a reply is read, as its prompt left things."""

    stop: tuple[str, ...] = ()
    can_think: bool = False
    is_thinking: bool = False  # the prompt itself opened the <think> block
    shows_lead: bool = True  # white space before the answer is shown (text that is continued)
    silent_ids: frozenset[int] = frozenset()  # end-of-turn tokens are no text


class Reply:
    """Reads one reply; `content` and `reasoning` grow with it."""

    def __init__(self, decoder: StreamDecoder, style: ReplyStyle) -> None:
        self.ids: list[int] = []
        self.is_stopped = False  # a stop string was met: the rest is not wanted
        self._parts: dict[ChunkKind, list[str]] = {"answer": [], "reasoning": []}
        self._decoder = decoder
        self._style = style
        self._stop_held = ""
        self._state = "reasoning" if style.is_thinking else "lead" if style.can_think else "answer"
        self._think_held = ""

    @property
    def content(self) -> str:
        """The answer so far."""
        return "".join(self._parts["answer"])

    @property
    def reasoning(self) -> str:
        """The thoughts so far."""
        return "".join(self._parts["reasoning"])

    def feed(self, ids: Sequence[int]) -> list[Chunk]:
        """The chunks these ids complete; nothing after a stop string."""
        if self.is_stopped:
            return []
        self.ids.extend(ids)
        text = self._decoder.feed(i for i in ids if i not in self._style.silent_ids)
        return self._think(self._cut(text), is_last=self.is_stopped)

    def finish(self, is_cut: bool) -> list[Chunk]:
        """What was held back. `is_cut`: the reply was stopped, so half a character is dropped."""
        if self.is_stopped:
            return []
        rest = "" if is_cut else self._decoder.flush()
        rest = self._cut(rest)
        if not self.is_stopped:
            rest, self._stop_held = rest + self._stop_held, ""
        self.is_stopped = True
        return self._think(rest, is_last=True)

    def _cut(self, text: str) -> str:
        """`text` up to a stop string, less what may become one."""
        text = self._stop_held + text
        self._stop_held = ""
        found = [at for at in (text.find(stop) for stop in self._style.stop) if at >= 0]
        if found:
            self.is_stopped = True
            return text[: min(found)]
        held = _overlap(text, self._style.stop)
        self._stop_held = text[len(text) - held :]
        return text[: len(text) - held]

    def _think(self, text: str, is_last: bool) -> list[Chunk]:
        """`text` parted into reasoning and answer, less what may become a tag."""
        text = self._think_held + text
        self._think_held = ""
        chunks: list[Chunk] = []
        if self._state == "lead":
            lead = text.lstrip()
            if THINK_START.startswith(lead) and not is_last:
                self._think_held = text
                return []
            is_thought = lead.startswith(THINK_START)
            text = lead.removeprefix(THINK_START) if is_thought else text
            self._state = "reasoning" if is_thought else "answer"
        if self._state == "reasoning":
            thought, tag, text = text.partition(THINK_END)
            if not tag and not is_last:
                held = _overlap(thought, (THINK_END,))
                self._think_held = thought[len(thought) - held :]
                thought = thought[: len(thought) - held]
            chunks += self._add("reasoning", thought)
            if not tag:
                return chunks
            self._state = "answer"
        return chunks + self._add("answer", text)

    def _add(self, kind: Literal["answer", "reasoning"], text: str) -> list[Chunk]:
        """Keep `text` and say what of it is shown: no white space before reasoning or answer."""
        parts = self._parts[kind]
        if not parts and (kind == "reasoning" or self._parts["reasoning"]):
            text = text.lstrip("\n")  # line breaks that the template puts there itself
        if not text:
            return []
        is_lead = all(part.isspace() for part in parts)
        parts.append(text)
        if is_lead and not (kind == "answer" and self._style.shows_lead):
            text = text.lstrip()
        return [Chunk(kind, text)] if text else []


def _overlap(text: str, words: Sequence[str]) -> int:
    """Length of the longest end of `text` that begins one of `words` without being all of it."""
    longest = max((len(word) for word in words), default=1) - 1
    for size in range(min(longest, len(text)), 0, -1):
        if any(word.startswith(text[-size:]) for word in words):
            return size
    return 0

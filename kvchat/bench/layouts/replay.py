"""Plays one trace against one layout, step by step, and counts. The same rules for all of them.

A step is STEP_S seconds, in which every chat that is being answered gets one token. A chat that
comes is admitted if the layout can place its first prompt now, else it is refused and goes. For a
later prompt or token that cannot be placed, chats that came later are cut short, the last first,
until it can; if there is none, or none could help, the chat itself is. Nobody waits. Before a chat
leaves, all that is stored of it is compared with what was written.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from kvchat.bench.layouts import WORD_BYTES, Layout, Words
from kvchat.bench.trace import TracedChat

STEP_S = 0.05  # 20 tokens a second for each chat
SAMPLE_STEPS = 40  # utilisation is looked at every 2 seconds


@dataclass(frozen=True)
class Sample:
    """The arena at one moment, in tokens."""

    at_s: float
    num_live: int  # tokens of chats
    num_slots: int  # token slots that they hold
    num_scanned: int  # slots that attention would go over for one new token of each chat


@dataclass
class Replay:
    """What became of the chats of a trace in one layout."""

    name: str
    num_admitted: int = 0
    num_refused: int = 0
    num_refused_with_room: int = 0  # though as many bytes as the prompt wants were free in total
    num_cut: int = 0
    num_cut_with_room: int = 0
    num_finished: int = 0
    num_tokens: int = 0  # placed, prompts and replies
    num_verified: int = 0  # tokens compared as their chat left
    num_copied: int = 0  # bytes of the arena
    samples: list[Sample] = field(default_factory=list)

    @property
    def waste(self) -> float:
        """Of the token slots held, over time, those that hold nothing."""
        num_slots = sum(sample.num_slots for sample in self.samples)
        return 1 - sum(sample.num_live for sample in self.samples) / num_slots if num_slots else 0.0

    @property
    def scanned(self) -> float:
        """Slots that attention goes over for each token that it is after."""
        num_live = sum(sample.num_live for sample in self.samples)
        return sum(s.num_scanned for s in self.samples) / num_live if num_live else 1.0

    @property
    def mean_live(self) -> float:
        """Tokens of chats in the arena, on average."""
        return sum(sample.num_live for sample in self.samples) / max(1, len(self.samples))

    @property
    def peak_live(self) -> int:
        """The most tokens at a time, of the moments looked at."""
        return max((sample.num_live for sample in self.samples), default=0)


@dataclass(slots=True)
class _Live:
    chat: TracedChat
    words: Words  # all that it will ever store
    turn_idx: int = 0
    num_tokens: int = 0  # placed
    num_left: int = 0  # of the reply that is being written


def words_of(chat_id: int, num_tokens: int) -> Words:
    """Words that differ by chat and position, in their low bits too."""
    positions = np.arange(num_tokens, dtype=np.uint64)
    start = np.uint64((chat_id + 1) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF)
    return start + positions * np.uint64(0xBF58476D1CE4E5B9)


def replay(chats: list[TracedChat], layout: Layout, num_steps: int) -> Replay:
    """The first num_steps steps of the trace, whatever is still going on then."""
    return _Player(chats, layout).play(num_steps)


def trace_steps(chats: list[TracedChat]) -> int:
    """Steps until the last chat has come."""
    return _step_of(chats[-1].arrival_s) + 1


def _step_of(at_s: float) -> int:
    return int(at_s / STEP_S)


class _Player:
    def __init__(self, chats: list[TracedChat], layout: Layout) -> None:
        self._layout = layout
        self._chats = chats
        self._live: dict[int, _Live] = {}
        self._replying: dict[int, _Live] = {}  # in the order in which the replies began
        self._come: set[int] = set()
        self._result = Replay(layout.name)
        # (step, chat): a prompt is due, the first one or another
        self._due = [(_step_of(chat.arrival_s), idx) for idx, chat in enumerate(chats)]
        heapq.heapify(self._due)

    def play(self, num_steps: int) -> Replay:
        for step in range(num_steps):
            while self._due and self._due[0][0] <= step:
                self._prompt(heapq.heappop(self._due)[1], step)
            for chat_id, live in list(self._replying.items()):
                if chat_id in self._replying:  # nobody cut it meanwhile
                    self._reply(chat_id, live, step)
            if step % SAMPLE_STEPS == 0:
                self._sample(step)
        self._result.num_copied = self._layout.num_copied
        for chat_id in list(self._live):
            self._leave(chat_id)
        return self._result

    def _prompt(self, chat_id: int, step: int) -> None:
        live = self._live.get(chat_id)
        if live is None and chat_id in self._come:
            return  # cut while it was thinking
        self._come.add(chat_id)
        if live is None:
            chat = self._chats[chat_id]
            live = _Live(chat, words_of(chat_id, chat.num_tokens))
            if not self._place(self._layout.open, chat_id, live, chat.turns[0].prompt):
                self._result.num_refused += 1
                self._result.num_refused_with_room += self._has_room(chat.turns[0].prompt)
                return
            self._live[chat_id] = live
            self._result.num_admitted += 1
        elif not self._append(chat_id, live, live.chat.turns[live.turn_idx].prompt):
            return
        live.num_left = live.chat.turns[live.turn_idx].reply
        self._replying[chat_id] = live

    def _reply(self, chat_id: int, live: _Live, step: int) -> None:
        if not self._append(chat_id, live, 1):
            return
        live.num_left -= 1
        if live.num_left:
            return
        del self._replying[chat_id]
        live.turn_idx += 1
        if live.turn_idx == len(live.chat.turns):
            self._result.num_finished += 1
            self._leave(chat_id)
            return
        think = live.chat.turns[live.turn_idx].think_s
        heapq.heappush(self._due, (step + 1 + _step_of(think), chat_id))

    def _append(self, chat_id: int, live: _Live, num_new: int) -> bool:
        while not self._place(self._layout.append, chat_id, live, num_new):
            last = chat_id if self._layout.is_fixed else max(self._live)
            self._result.num_cut += 1
            self._result.num_cut_with_room += self._has_room(num_new)
            self._replying.pop(last, None)
            self._leave(last)
            if last == chat_id:
                return False
        return True

    def _place(
        self, place: Callable[[int, Words], bool], chat_id: int, live: _Live, num_new: int
    ) -> bool:
        end = live.num_tokens + num_new
        if not place(chat_id, live.words[live.num_tokens : end]):
            return False
        live.num_tokens = end
        self._result.num_tokens += num_new
        return True

    def _has_room(self, num_tokens: int) -> bool:
        return self._layout.free_bytes >= num_tokens * WORD_BYTES

    def _leave(self, chat_id: int) -> None:
        """Compare all that is stored, and close."""
        live, at = self._live.pop(chat_id), 0
        for stored in self._layout.read(chat_id):
            # After a failed append a layout may hold more than was counted.
            expected = live.words[at : at + len(stored)].astype(stored.dtype)
            assert (stored == expected).all(), f"{self._layout.name}: chat {chat_id} at {at}"
            at += len(stored)
        assert at >= live.num_tokens, f"{self._layout.name}: {at} of {live.num_tokens} tokens"
        self._result.num_verified += live.num_tokens
        self._layout.close(chat_id)

    def _sample(self, step: int) -> None:
        self._result.samples.append(
            Sample(
                at_s=round(step * STEP_S, 3),
                num_live=sum(live.num_tokens for live in self._live.values()),
                num_slots=self._layout.num_slots,
                num_scanned=self._layout.num_scanned(),
            )
        )

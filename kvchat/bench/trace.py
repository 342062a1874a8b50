"""Recorded chats: who arrives when, says how much, is answered how much. Lengths only, no texts.

The file format is that of docs/traces.md: one chat a line.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from kvchat.errors import UsageError, quoted

_MAX_LINES = 1_000_000
_MAX_TOKENS = 2**27
_MAX_SECONDS = 1e7


@dataclass(frozen=True)
class Turn:
    """One exchange. `think_s`: seconds from the reply before to this prompt, 0 in the first."""

    prompt: int  # tokens
    reply: int
    think_s: float = 0.0


@dataclass(frozen=True)
class TracedChat:
    """One conversation, from `arrival_s` seconds after the start of the trace."""

    arrival_s: float
    turns: tuple[Turn, ...]

    @property
    def num_tokens(self) -> int:
        """Its length at the end."""
        return sum(turn.prompt + turn.reply for turn in self.turns)


@dataclass(frozen=True)
class Mix:
    """What a trace is drawn from: log-normal lengths, geometric turns, Poisson arrivals."""

    num_chats: int = 240
    chats_a_second: float = 0.8
    prompt_median: float = 60.0
    prompt_sigma: float = 1.1  # of the logarithm: the 95th percentile is 6 times the median
    reply_median: float = 110.0
    reply_sigma: float = 0.8
    mean_turns: float = 4.0
    mean_think_s: float = 12.0  # exponential


def generate_trace(mix: Mix, seed: int) -> list[TracedChat]:
    """The same chats for the same mix and seed, on any machine."""
    rng = random.Random(seed)
    at, chats = 0.0, []
    for _ in range(mix.num_chats):
        at += rng.expovariate(mix.chats_a_second)
        num_turns = 1 + int(math.log(1 - rng.random()) / math.log(1 - 1 / mix.mean_turns))
        turns = tuple(
            Turn(
                prompt=_length(rng, mix.prompt_median, mix.prompt_sigma),
                reply=_length(rng, mix.reply_median, mix.reply_sigma),
                think_s=round(rng.expovariate(1 / mix.mean_think_s), 3) if idx else 0.0,
            )
            for idx in range(num_turns)
        )
        chats.append(TracedChat(round(at, 3), turns))
    return chats


def clip_trace(chats: Iterable[TracedChat], max_tokens: int) -> list[TracedChat]:
    """The chats, each ended where it reaches max_tokens; the first prompt leaves room to reply."""
    clipped = []
    for chat in chats:
        left, turns = max_tokens, []
        for turn in chat.turns:
            prompt = min(turn.prompt, left - 1)
            if prompt < 1:
                break
            reply = min(turn.reply, left - prompt)
            turns.append(Turn(prompt, reply, turn.think_s))
            left -= prompt + reply
        clipped.append(TracedChat(chat.arrival_s, tuple(turns)))
    return clipped


def write_trace(path: Path, chats: Iterable[TracedChat]) -> None:
    """One chat a line, as read_trace reads it."""
    try:
        path.write_text("".join(json.dumps(asdict(chat)) + "\n" for chat in chats))
    except OSError as error:
        raise UsageError(f"{quoted(str(path))} cannot be written: {error.strerror}") from None


def read_trace(path: Path) -> list[TracedChat]:
    """The chats of a file, by arrival. UsageError names the line that is no chat."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--trace {quoted(str(path))} cannot be read: {error}") from None
    if len(lines) > _MAX_LINES:
        raise UsageError(f"--trace: {len(lines):,} lines; limit {_MAX_LINES:,}")
    chats = [
        _parse(line, f"{quoted(path.name, 40)} line {number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not chats:
        raise UsageError(f"--trace {quoted(str(path))} has no chats")
    return sorted(chats, key=lambda chat: chat.arrival_s)


def _length(rng: random.Random, median: float, sigma: float) -> int:
    return max(1, round(rng.lognormvariate(math.log(median), sigma)))


def _parse(line: str, where: str) -> TracedChat:
    try:
        found = json.loads(line)
        turns = tuple(
            Turn(turn["prompt"], turn["reply"], turn.get("think_s", 0.0)) for turn in found["turns"]
        )
        chat = TracedChat(found["arrival_s"], turns)
        is_good = bool(turns) and _are_numbers(chat)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        is_good = False
    if not is_good:
        raise UsageError(
            f'{where} is no chat; write {{"arrival_s": 0.5, "turns": [{{"prompt": 20, "reply":'
            ' 30, "think_s": 0}]}'
        )
    return chat


def _are_numbers(chat: TracedChat) -> bool:
    seconds = [chat.arrival_s, *(turn.think_s for turn in chat.turns)]
    lengths = [n for turn in chat.turns for n in (turn.prompt, turn.reply)]
    return all(type(s) in (int, float) and 0 <= s <= _MAX_SECONDS for s in seconds) and all(
        type(n) is int and 1 <= n <= _MAX_TOKENS for n in lengths
    )

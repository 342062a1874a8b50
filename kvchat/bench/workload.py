"""What the sessions of a benchmark say: token ids of every prompt, lengths of every reply, when.

Ids are drawn from the vocabulary by a seed, as llama-bench does: lengths are measured here, no
meaning. No torch.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from kvchat.bench.trace import TracedChat, Turn, clip_trace, read_trace
from kvchat.errors import UsageError, quoted

CLOSED = "closed"
_MAX_SESSIONS = 4096


class Range(NamedTuple):
    """A length in tokens, drawn anew for each turn: low to high, both included."""

    low: int
    high: int

    def __str__(self) -> str:
        return f"{self.low}" if self.low == self.high else f"{self.low}-{self.high}"


_PROMPT, _REPLY = Range(64, 192), Range(8, 16)


@dataclass(frozen=True)
class Workload:
    """Lengths, arrivals and the seed they are drawn from. `rate`: chats a second by a Poisson
    process; None: all are there at the start, and answer as soon as they are answered."""

    sessions: int = 8
    turns: int = 3
    prompt: Range = _PROMPT
    reply: Range = _REPLY
    shared_prefix: int = 128  # tokens that all first prompts begin with
    depth: int = 0  # tokens of each chat that stand in the pool before the clock starts
    rate: float | None = None
    trace: Path | None = None  # lengths and times of this file instead
    seed: int = 0


@dataclass(frozen=True)
class ScriptedTurn:
    """What is said, how long the answer is, and the seconds from the answer before to this."""

    prompt_ids: list[int]
    num_reply: int
    think_s: float


@dataclass(frozen=True)
class Script:
    """One session from its first prompt to its last reply. `depth_ids` are computed untimed."""

    session_id: int
    arrival_s: float
    turns: tuple[ScriptedTurn, ...]
    depth_ids: list[int]

    @property
    def num_tokens(self) -> int:
        """Its length at the end."""
        spoken = sum(len(turn.prompt_ids) + turn.num_reply for turn in self.turns)
        return len(self.depth_ids) + spoken


def parse_range(text: str, flag: str) -> Range:
    """`128` or `64-192`; UsageError for anything else."""
    found = re.fullmatch(r"(\d{1,7})(?:-(\d{1,7}))?", text)
    low, high = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= low <= high:
        raise UsageError(f"{flag} {quoted(text, 40)}: write tokens as 128 or 64-192")
    return Range(low, high)


def parse_arrival(text: str) -> float | None:
    """`closed` is None, `poisson:0.5` is chats a second; UsageError for anything else."""
    if text == CLOSED:
        return None
    found = re.fullmatch(r"poisson:(\d{1,6}(?:\.\d{1,6})?)", text)
    if not found or not float(found[1]):
        raise UsageError(f"--arrival {quoted(text, 40)}: write closed, or poisson:0.5 (a second)")
    return float(found[1])


def make_scripts(workload: Workload, vocab: range, max_tokens: int | None = None) -> list[Script]:
    """One script a session, by arrival; the same for the same workload on any machine. `vocab`:
    ids to draw from. Chats of a trace end at max_tokens."""
    rng = random.Random(workload.seed)
    chats = [*_chats(workload, rng)]
    if workload.trace is not None and max_tokens is not None:
        chats = clip_trace(chats, max_tokens - workload.shared_prefix - workload.depth)
    shared = _ids(random.Random(f"{workload.seed} shared"), vocab, workload.shared_prefix)
    return [_script(i, chat, workload, shared, vocab) for i, chat in enumerate(chats)]


def _chats(workload: Workload, rng: random.Random) -> Iterator[TracedChat]:
    if workload.trace is not None:
        yield from read_trace(workload.trace)[:_MAX_SESSIONS]
        return
    at_s = 0.0
    for _ in range(workload.sessions):
        at_s += rng.expovariate(workload.rate) if workload.rate else 0.0
        turns = tuple(
            Turn(rng.randint(*workload.prompt), rng.randint(*workload.reply))
            for _ in range(workload.turns)
        )
        yield TracedChat(at_s, turns)


def _script(
    session_id: int, chat: TracedChat, workload: Workload, shared: list[int], vocab: range
) -> Script:
    rng = random.Random(f"{workload.seed} {session_id}")
    depth_ids = _ids(rng, vocab, workload.depth)
    if depth_ids:
        depth_ids, shared = shared + depth_ids, []
    turns = []
    for turn in chat.turns:
        prompt_ids = shared + _ids(rng, vocab, turn.prompt)
        turns.append(ScriptedTurn(prompt_ids, turn.reply, turn.think_s))
        shared = []
    return Script(session_id, chat.arrival_s, tuple(turns), depth_ids)


def _ids(rng: random.Random, vocab: range, num_tokens: int) -> list[int]:
    return [rng.randrange(vocab.start, vocab.stop) for _ in range(num_tokens)]

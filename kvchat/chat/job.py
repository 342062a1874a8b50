"""One reply being made: what was asked of the engine, and its tokens as they come back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Protocol

from kvchat.chat.prompt import Span, generated_spans
from kvchat.chat.reply import THINK_START, Chunk, Reply, ReplyStyle
from kvchat.chat.template import ChatFormat
from kvchat.chat.tokenizer import StreamDecoder, Tokenizer
from kvchat.config import SamplingParams
from kvchat.engine.request import Event, Request, Shared
from kvchat.engine.stats import SessionKV


class ChatEngine(Protocol):
    """What conversations ask of an engine (see engine/engine); answers at once, from any thread."""

    def submit(self, request: Request) -> None: ...

    def abort(self, request_id: int) -> Event | None: ...

    def fork(self, parent_session_id: int, child_session_id: int, num_tokens: int) -> Shared: ...

    def trim(self, session_id: int, num_tokens: int) -> int: ...

    def release(self, session_id: int) -> Event | None: ...

    def set_foreground(self, session_id: int | None) -> None: ...

    def set_pinned(self, session_id: int, is_pinned: bool) -> None: ...

    def session_kv(self, session_id: int) -> SessionKV: ...


@dataclass(frozen=True)
class ChatDefaults:
    """What a new session starts with. `seed` None: each draws its own; `think` None: the
    template's way."""

    sampling: SamplingParams
    max_model_len: int
    system: str | None = None
    seed: int | None = None
    think: bool | None = None


@dataclass(frozen=True)
class Desk:
    """What all sessions of a library share."""

    engine: ChatEngine
    tokenizer: Tokenizer
    chat_format: ChatFormat
    defaults: ChatDefaults
    clock: Callable[[], float]
    request_ids: Iterator[int] = field(default_factory=lambda: count(1))


@dataclass(frozen=True)
class ReplyStats:
    """How one reply was made. `num_recomputed_tokens`: of the prompt's history, computed again."""

    num_prompt_tokens: int
    num_cached_tokens: int
    num_recomputed_tokens: int
    num_generated_tokens: int
    ttft_s: float | None  # None: nothing came
    tokens_per_s: float | None  # after the first token; None below two tokens
    finish_reason: str


class Job:
    """A request and its reply so far. `num_known_tokens`: those of the prompt that are history."""

    def __init__(
        self, desk: Desk, request: Request, spans: Sequence[Span], num_known_tokens: int
    ) -> None:
        self.request = request
        self._tokenizer = desk.tokenizer
        self._num_known_tokens = num_known_tokens
        self._num_cached_tokens = 0
        self._asked_at = desk.clock()
        self._first_at: float | None = None
        self._last_at = 0.0
        after_marker = bool(spans) and spans[-1].piece.marker is not None
        self._at_start = not spans or (after_marker and desk.tokenizer.has_inner_prefix)
        prompt_end = "".join(span.piece.text for span in spans[-4:]).rstrip()
        chat_format = desk.chat_format
        style = ReplyStyle(
            stop=(*request.sampling.stop, *chat_format.stop_strings),
            can_think=chat_format.can_think,
            is_thinking=chat_format.can_think and prompt_end.endswith(THINK_START),
            shows_lead=chat_format.is_plain,
            silent_ids=request.sampling.stop_token_ids,
        )
        self.reply = Reply(StreamDecoder(desk.tokenizer, self._at_start), style)

    @property
    def num_tokens(self) -> int:
        """Of the prompt and the reply so far."""
        return self.request.num_prompt_tokens + len(self.reply.ids)

    @property
    def waits_for(self) -> str:
        """Why the reply has not begun, in words; empty when it has."""
        if self._first_at is not None:
            return ""
        num_read, num_prompt = self.request.num_computed_tokens, self.request.num_prompt_tokens
        return self.request.wait_reason or f"reading {num_read:,} of {num_prompt:,} tokens"

    def feed(self, event: Event, at: float) -> list[Chunk]:
        """The chunks that the event's tokens complete; `at` is when they came."""
        self._num_cached_tokens = max(self._num_cached_tokens, event.num_cached_tokens)
        if not event.token_ids:
            return []
        self._first_at = at if self._first_at is None else self._first_at
        self._last_at = at
        return self.reply.feed(event.token_ids)

    def spans(self) -> list[Span]:
        """The reply's tokens with their text."""
        return generated_spans(self._tokenizer, self.reply.ids, self._at_start)

    def stats(self, finish_reason: str) -> ReplyStats:
        """The numbers of this reply."""
        num_tokens, first_at = len(self.reply.ids), self._first_at
        # the newest known token has no K and V yet: the prompt's first pass makes them
        num_recomputed = max(0, self._num_known_tokens - 1 - self._num_cached_tokens)
        elapsed = self._last_at - (first_at or 0.0)
        return ReplyStats(
            num_prompt_tokens=self.request.num_prompt_tokens,
            num_cached_tokens=self._num_cached_tokens,
            num_recomputed_tokens=0 if first_at is None else num_recomputed,
            num_generated_tokens=num_tokens,
            ttft_s=None if first_at is None else first_at - self._asked_at,
            tokens_per_s=(num_tokens - 1) / elapsed if num_tokens > 1 and elapsed > 0 else None,
            finish_reason=finish_reason,
        )

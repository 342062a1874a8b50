"""One conversation: what was said, what is being said, and where in its tree of turns it stands.

Knows the engine's interface, the chat format and the tokenizer; never the terminal. Everything
here is called on one thread, the one that pumps the library.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import count, groupby
from typing import Protocol

from kvchat.chat.messages import Message, as_jsonl, as_markdown
from kvchat.chat.options import Value, parse_switch, sampling_options, set_sampling
from kvchat.chat.prompt import Span, continue_spans, generated_spans
from kvchat.chat.reply import THINK_START, Chunk, Reply, ReplyStyle
from kvchat.chat.template import ChatFormat
from kvchat.chat.tokenizer import StreamDecoder, Tokenizer
from kvchat.chat.turns import TreeRow, Turn, tree_rows
from kvchat.config import SamplingParams
from kvchat.engine.request import Event, Request
from kvchat.errors import CapacityError, KvchatError, UsageError

MAX_TOKEN_BYTES = 512  # no token of the supported families is longer: a cheap first check
MAX_SEED = 1 << 32


class ChatEngine(Protocol):
    """What conversations ask of an engine; all calls answer at once, from any thread."""

    def submit(self, request: Request) -> None: ...

    def abort(self, request_id: int) -> Event | None: ...

    def fork(self, parent_session_id: int, child_session_id: int, num_tokens: int) -> int: ...

    def trim(self, session_id: int, num_tokens: int) -> None: ...

    def release(self, session_id: int) -> Event | None: ...

    def set_foreground(self, session_id: int | None) -> None: ...


@dataclass(frozen=True)
class ChatDefaults:
    """What a new session starts with. `seed` None: each session draws its own."""

    sampling: SamplingParams
    max_model_len: int
    system: str | None = None
    seed: int | None = None
    think: bool | None = None  # None: as the template has it


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


@dataclass(eq=False)
class _Job:
    """The reply being made."""

    request: Request
    turn: Turn
    reply: Reply
    at_start: bool  # the reply's first token begins a text
    num_known_tokens: int  # of the prompt: history, not this turn's text
    asked_at: float
    first_at: float | None = None
    last_at: float = 0.0
    num_cached_tokens: int = 0


class Session:
    """See the module. `settings_of`: a session whose settings and branch counter are taken over."""

    def __init__(
        self, desk: Desk, session_id: int, name: str, settings_of: Session | None = None
    ) -> None:
        self.id = session_id
        self.name = name
        self.queued: list[str] = []
        self.unread = 0  # replies finished since the session was last looked at
        self.last_reply: ReplyStats | None = None
        self._desk = desk
        self._output: list[Chunk] = []
        self._job: _Job | None = None
        self._root = self._leaf = Turn()
        defaults, other = desk.defaults, settings_of
        self.system: str = other.system if other else defaults.system or ""
        self.sampling: SamplingParams = other.sampling if other else defaults.sampling
        self.think: bool | None = other.think if other else defaults.think
        self.seed: int = other.seed if other else _seed_or_random(defaults.seed)
        self._branches: Iterator[int] = other._branches if other else count(1)

    # What can be seen

    @property
    def is_working(self) -> bool:
        """A reply is being made."""
        return self._job is not None

    @property
    def branch(self) -> int:
        """The number the next reply's random stream has, unless it is a second try."""
        return self._leaf.branch

    @property
    def messages(self) -> list[Message]:
        """From the system text to here; a reply being made is there as far as it has come."""
        messages = self._messages(self._leaf)
        if self._job:
            messages.append(
                Message("assistant", self._job.reply.content, self._job.reply.reasoning)
            )
        return messages

    @property
    def max_context(self) -> int:
        """Tokens the conversation may have."""
        return self._desk.defaults.max_model_len

    @property
    def num_context_tokens(self) -> int:
        """Tokens the conversation has now."""
        if self._job is None:
            return self._leaf.num_tokens
        return self._job.request.num_prompt_tokens + len(self._job.reply.ids)

    @property
    def waits_for(self) -> str:
        """Why a reply being made has not begun, in words; empty when it has."""
        if self._job is None or self._job.first_at is not None:
            return ""
        request = self._job.request
        num_read, num_prompt = request.num_computed_tokens, request.num_prompt_tokens
        return request.wait_reason or f"reading {num_read:,} of {num_prompt:,} tokens"

    def take_output(self) -> list[Chunk]:
        """What has come since this was last called; neighbours of one kind are one chunk."""
        output, self._output = self._output, []
        return [
            Chunk(kind, ("\n" if kind == "notice" else "").join(chunk.text for chunk in run))
            for kind, run in groupby(output, key=lambda chunk: chunk.kind)
        ]

    def prompt_view(self) -> tuple[str, list[int]]:
        """The text and ids of all the model has seen and said, markers included."""
        spans = self._leaf.path_spans()
        if self._job:
            spans += self._generated(self._job)
        text = "".join(span.piece.text for span in spans)
        return text, [token_id for span in spans for token_id in span.ids]

    def export_markdown(self) -> str:
        """The conversation for people."""
        return as_markdown(self.name, self.messages)

    def export_jsonl(self) -> str:
        """The conversation for programs: a JSON object a line."""
        return as_jsonl(self.messages)

    def tree(self) -> list[TreeRow]:
        """Every turn, old branches included, depth first."""
        return list(tree_rows(self._root, self._leaf))

    # Talking

    def send(self, text: str) -> None:
        """Ask; while a reply is being made the text waits its turn. Raises UsageError for an empty
        one, CapacityError for one that does not fit; nothing has changed then."""
        text = _clean(text)
        if not text.strip():
            raise UsageError("nothing to send: the text is empty")
        if self.is_working:
            self.queued.append(text)
            return
        self._ask(self._leaf, text)

    def stop(self) -> bool:
        """End the reply being made and keep what was said; False when there was none."""
        if self._job is None:
            return False
        self._desk.engine.abort(self._job.request.request_id)
        self._finish("abort")
        return True

    def drop_queued(self) -> int:
        """Forget what waits to be sent, and how many texts that were."""
        dropped = len(self.queued)
        self.queued.clear()
        return dropped

    def undo(self, num_turns: int = 1) -> int:
        """Step back; the turns stay in the tree. Returns how many it were."""
        self._require_idle()
        steps = 0
        while steps < num_turns and self._leaf.parent is not None:
            self._leaf.parent.last_child = self._leaf
            self._leaf = self._leaf.parent
            steps += 1
        if not steps:
            raise UsageError("nothing to undo: this is the start of the conversation")
        self._desk.engine.trim(self.id, self._leaf.num_tokens)
        return steps

    def redo(self) -> None:
        """Step forward to where undo came from."""
        self._require_idle()
        if self._leaf.last_child is None:
            raise UsageError("nothing to redo")
        self._leaf = self._leaf.last_child

    def regen(self) -> None:
        """Ask the last turn again; the reply so far stays in the tree."""
        self.edit(self._leaf.user)

    def edit(self, text: str) -> None:
        """Ask something else instead of the last turn, which stays in the tree."""
        self._require_idle()
        text = _clean(text)
        if self._leaf.parent is None:
            raise UsageError("there is no turn yet")
        if not text.strip():
            raise UsageError("nothing to send: the text is empty")
        self._ask(self._leaf.parent, text)

    def clear(self) -> None:
        """Start anew; what was said stays in the tree."""
        self.drop_queued()
        self.stop()
        self._leaf = self._root
        self._desk.engine.trim(self.id, 0)

    # Settings

    def set_system(self, text: str) -> None:
        """The system text from the next turn on; the conversation is then computed again."""
        self.system = _clean(text)

    def set_option(self, name: str, text: str) -> None:
        """Set one option from its text. Raises UsageError."""
        if name == "seed":
            self.seed = _parse_seed(text)
        elif name == "think":
            self._set_think(text)
        else:
            self.sampling = set_sampling(self.sampling, name, text)

    def options(self) -> dict[str, Value]:
        """Every option's value by name."""
        return sampling_options(self.sampling) | {"seed": self.seed, "think": self.think}

    def _set_think(self, text: str) -> None:
        if not self._desk.chat_format.has_think_switch:
            raise UsageError("this model's template has no switch for thinking")
        try:
            self.think = parse_switch(text.strip())
        except ValueError:
            raise UsageError("think can be on or off") from None

    # For the library

    @property
    def last_finished(self) -> Turn:
        """The last turn whose reply is whole."""
        if self._job is not None and self._leaf.parent is not None:
            return self._leaf.parent
        return self._leaf

    def fork_from(self, parent: Session) -> None:
        """Take over the parent's conversation up to its last finished turn, on a new branch."""
        turn = parent.last_finished
        self._leaf = turn.copy_path(next(self._branches))
        root = self._leaf
        while root.parent is not None:
            root = root.parent
        self._root = root
        self._desk.engine.fork(parent.id, self.id, turn.num_tokens)

    def apply(self, event: Event, at: float) -> bool:
        """Take in what the engine has made; False when it is not this session's reply any more."""
        job = self._job
        if job is None or event.request_id != job.request.request_id:
            return False
        job.num_cached_tokens = max(job.num_cached_tokens, event.num_cached_tokens)
        if event.token_ids:
            job.first_at = at if job.first_at is None else job.first_at
            job.last_at = at
            self._output += job.reply.feed(event.token_ids)
        if job.reply.is_stopped:
            self._desk.engine.abort(event.request_id)
            self._finish("stop")
        elif event.finish_reason is not None:
            self._finish(event.finish_reason, event.error)
        return True

    # Inside

    def _require_idle(self) -> None:
        if self.is_working:
            raise UsageError("a reply is being made; stop it first (Ctrl-C or /stop)")

    def _messages(self, leaf: Turn) -> list[Message]:
        system = [Message("system", self.system)] if self.system else []
        return system + leaf.messages()

    def _ask(self, parent: Turn, text: str) -> None:
        """Make a turn below `parent` and ask the engine. Nothing changes when it does not fit."""
        self._check_size(text)
        chat_format, old = self._desk.chat_format, parent.path_spans()
        messages = [*self._messages(parent), Message("user", text)]
        pieces = chat_format.pieces(messages, self.think)
        spans, num_kept = continue_spans(self._desk.tokenizer, old, pieces)
        ids = [token_id for span in spans for token_id in span.ids]
        self._check_room(len(ids))
        turn = Turn(parent, text, num_kept=num_kept, spans=spans[num_kept:], num_tokens=len(ids))
        turn.branch = next(self._branches) if parent.children else parent.branch
        num_known = parent.num_tokens if num_kept == len(old) else _num_before(spans, text)
        job = self._job_of(turn, spans, ids, num_known)
        self._desk.engine.submit(job.request)
        parent.add_child(turn)
        self._leaf, self._job = turn, job

    def _job_of(self, turn: Turn, spans: list[Span], ids: list[int], num_known: int) -> _Job:
        desk, chat_format = self._desk, self._desk.chat_format
        stop_ids = self.sampling.stop_token_ids | chat_format.stop_token_ids
        request = Request(
            request_id=next(desk.request_ids),
            session_id=self.id,
            token_ids=ids,
            num_prompt_tokens=len(ids),
            sampling=replace(self.sampling, stop_token_ids=stop_ids),
            seed=self.seed,
            branch=turn.branch,
        )
        last = spans[-1].piece if spans else None
        at_start = (
            desk.tokenizer.has_prefix
            if last is None
            else (last.marker is not None and desk.tokenizer.has_inner_prefix)
        )
        tail = "".join(span.piece.text for span in spans[-4:]).rstrip()
        style = ReplyStyle(
            stop=(*self.sampling.stop, *chat_format.stop_strings),
            can_think=chat_format.can_think,
            is_thinking=chat_format.can_think and tail.endswith(THINK_START),
            shows_lead=chat_format.is_plain,
            silent_ids=stop_ids,
        )
        reply = Reply(StreamDecoder(desk.tokenizer, at_start), style)
        return _Job(request, turn, reply, at_start, num_known, desk.clock())

    def _check_size(self, text: str) -> None:
        if len(text) > self.max_context * MAX_TOKEN_BYTES:
            raise CapacityError(
                f"the text has {len(text):,} characters; the context holds {self.max_context:,} "
                "tokens: send less"
            )

    def _check_room(self, num_tokens: int) -> None:
        """One token must be left for the reply."""
        if num_tokens >= self.max_context:
            raise CapacityError(
                f"the conversation would have {num_tokens:,} tokens, the context holds "
                f"{self.max_context - 1:,} and one for the reply: shorten the text by "
                f"{num_tokens - self.max_context + 1:,} tokens, /undo turns or /clear"
            )

    def _generated(self, job: _Job) -> list[Span]:
        return generated_spans(self._desk.tokenizer, job.reply.ids, job.at_start)

    def _finish(self, reason: str, error: str = "") -> None:
        """The reply has ended: put it in the tree, then ask what waits."""
        job, turn = self._job, self._leaf
        assert job is not None and job.turn is turn, "the leaf moved while a reply was made"
        self._output += job.reply.finish(is_cut=reason in ("abort", "error"))
        lead = self._desk.chat_format.reply_lead
        turn.content = job.reply.content.removeprefix(lead)
        turn.reasoning = job.reply.reasoning.rstrip("\n")
        turn.finish_reason = reason
        turn.spans = turn.spans + self._generated(job)
        turn.num_tokens += len(job.reply.ids)
        self._job = None
        self.last_reply = _stats(job, reason)
        self.unread += 1
        if reason == "error":
            self._notice(error or "the engine could not go on with this reply")
        elif reason == "length" and turn.num_tokens >= self.max_context:
            self._notice(
                f"context full: {turn.num_tokens:,} of {self.max_context:,} tokens; "
                "/undo turns, /clear, or /fork an earlier point"
            )
        if self.queued:
            self._send_queued()

    def _send_queued(self) -> None:
        text = self.queued.pop(0)
        try:
            self._ask(self._leaf, text)
        except KvchatError as problem:
            self._notice(f"not sent: {problem}")

    def _notice(self, text: str) -> None:
        self._output.append(Chunk("notice", text))


def _stats(job: _Job, reason: str) -> ReplyStats:
    num_tokens = len(job.reply.ids)
    elapsed = job.last_at - job.first_at if job.first_at is not None else 0.0
    return ReplyStats(
        num_prompt_tokens=job.request.num_prompt_tokens,
        num_cached_tokens=job.num_cached_tokens,
        # the newest known token has no K and V yet: the prompt's first pass makes them
        num_recomputed_tokens=max(0, job.num_known_tokens - 1 - job.num_cached_tokens),
        num_generated_tokens=num_tokens,
        ttft_s=None if job.first_at is None else job.first_at - job.asked_at,
        tokens_per_s=(num_tokens - 1) / elapsed if num_tokens > 1 and elapsed > 0 else None,
        finish_reason=reason,
    )


def _num_before(spans: list[Span], text: str) -> int:
    """Tokens of the spans that end before the last place where `text` is."""
    end = "".join(span.piece.text for span in spans).rfind(text.strip())
    num_tokens = num_chars = 0
    for span in spans:
        num_chars += len(span.piece.text)
        if num_chars > end:
            break
        num_tokens += len(span.ids)
    return num_tokens


def _clean(text: str) -> str:
    """Text that UTF-8 can hold: bytes a terminal could not read become U+FFFD."""
    return text.encode("utf-8", "replace").decode() if not text.isascii() else text


def _seed_or_random(seed: int | None) -> int:
    return secrets.randbelow(MAX_SEED) if seed is None else seed


def _parse_seed(text: str) -> int:
    """A seed, or -1 for a new random one, as in llama.cpp."""
    try:
        seed = int(text)
    except ValueError:
        seed = -2
    if not -1 <= seed < MAX_SEED:
        raise UsageError(f"seed must be 0 to {MAX_SEED - 1}, or -1 for a random one")
    return _seed_or_random(None if seed == -1 else seed)

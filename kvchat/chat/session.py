"""One conversation: what was said, what is being said, and where in its tree of turns it stands.

Knows the engine's interface, the chat format and the tokenizer; never the terminal. Everything
here is called on one thread, the one that pumps the library.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import count, groupby

from kvchat.chat.job import Desk, Job, ReplyStats
from kvchat.chat.messages import Message
from kvchat.chat.options import (
    Value,
    parse_switch,
    random_seed,
    read_seed,
    sampling_options,
    set_sampling,
)
from kvchat.chat.prompt import continue_spans, num_tokens_before
from kvchat.chat.reply import Chunk
from kvchat.chat.turns import TreeRow, Turn, tree_rows
from kvchat.config import SamplingParams
from kvchat.engine.request import Event, Request
from kvchat.errors import CapacityError, KvchatError, UsageError
from kvchat.kv.layout import Codec

MAX_TOKEN_CHARS = 512  # no token of the supported families is longer: a cheap first check


class Session:
    """See the module. `settings_of`: a session whose settings and branch counter are taken over."""

    def __init__(
        self, desk: Desk, session_id: int, name: str, settings_of: Session | None = None
    ) -> None:
        defaults, other = desk.defaults, settings_of
        self.id = session_id
        self.name = name
        self.queued: list[str] = []
        self.is_pinned = False  # nothing of it is compressed; the library sets it
        self.unread = 0  # replies finished since the session was last looked at
        self.last_reply: ReplyStats | None = None
        self.system: str = other.system if other else _decodable(defaults.system or "")
        self.sampling: SamplingParams = other.sampling if other else defaults.sampling
        self.think: bool | None = other.think if other else defaults.think
        seed = other.seed if other else defaults.seed
        self.seed: int = random_seed() if seed is None else seed
        self._branches: Iterator[int] = other._branches if other else count(1)
        self._told_codec: Codec = other._told_codec if other else Codec.NATIVE  # remarked on
        self._desk = desk
        self._output: list[Chunk] = []
        self._job: Job | None = None
        self._root = self._leaf = Turn()

    # What can be seen

    @property
    def is_working(self) -> bool:
        """A reply is being made."""
        return self._job is not None

    @property
    def waits_for(self) -> str:
        """Why a reply being made has not begun, in words; empty when it has."""
        return self._job.waits_for if self._job else ""

    @property
    def messages(self) -> list[Message]:
        """From the system text to here; a reply being made is there as far as it has come."""
        messages = self._messages(self._leaf)
        if self._job:
            reply = self._job.reply
            messages.append(Message("assistant", reply.content, reply.reasoning))
        return messages

    @property
    def max_context(self) -> int:
        """Tokens the conversation may have."""
        return self._desk.defaults.max_model_len

    @property
    def num_context_tokens(self) -> int:
        """Tokens the conversation has now."""
        return self._job.num_tokens if self._job else self._leaf.num_tokens

    def take_output(self) -> list[Chunk]:
        """What has come since this was last called; neighbours are one chunk, but for comments."""
        output, self._output = self._output, []
        grouped = groupby(output, key=lambda chunk: chunk if chunk.is_comment else chunk.kind)
        runs = [[*run] for _, run in grouped]
        return [Chunk(run[0].kind, "".join(chunk.text for chunk in run)) for run in runs]

    def prompt_view(self) -> tuple[str, list[int]]:
        """The text and ids of all the model has seen and said, markers included."""
        spans = self._leaf.path_spans() + (self._job.spans() if self._job else [])
        text = "".join(span.piece.text for span in spans)
        return text, [token_id for span in spans for token_id in span.ids]

    def tree(self) -> list[TreeRow]:
        """Every turn, old branches included, depth first."""
        return list(tree_rows(self._root, self._leaf))

    # Talking

    def send(self, text: str) -> None:
        """Ask; while a reply is being made the text waits its turn. Raises UsageError for an empty
        one, CapacityError for one that does not fit; nothing has changed then."""
        text = _readable(text)
        if self.is_working:
            self.queued.append(text)
        else:
            self._ask(self._leaf, text)

    def stop(self) -> bool:
        """End the reply being made and keep what was said; False when there was none."""
        if self._job is None:
            return False
        self._desk.engine.abort(self._job.request.request_id)
        self._finish(self._job, "abort")
        return True

    def drop_queued(self) -> int:
        """Forget what waits to be sent, and how many texts that were."""
        num_dropped = len(self.queued)
        self.queued.clear()
        return num_dropped

    def undo(self, num_turns: int = 1) -> int:
        """Step back; the turns stay in the tree. Returns how many it were."""
        self._require_idle()
        num_steps = 0
        while num_steps < num_turns and self._leaf.parent is not None:
            self._leaf.parent.last_child = self._leaf
            self._leaf = self._leaf.parent
            num_steps += 1
        if not num_steps:
            raise UsageError("nothing to undo: this is the start of the conversation")
        self._note_lost(self._desk.engine.trim(self.id, self._leaf.num_tokens))
        return num_steps

    def redo(self) -> None:
        """Step forward to where undo came from."""
        self._require_idle()
        if self._leaf.last_child is None:
            raise UsageError("nothing to redo")
        self._leaf = self._leaf.last_child

    def regen(self) -> None:
        """Ask the last turn again; the reply so far stays in the tree."""
        self._replace_turn(self._leaf.user)

    def edit(self, text: str) -> None:
        """Ask something else instead of the last turn, which stays in the tree."""
        self._replace_turn(_readable(text))

    def clear(self) -> None:
        """Start anew; what was said stays in the tree."""
        self.drop_queued()
        self.stop()
        self._leaf = self._root
        self._desk.engine.trim(self.id, 0)

    # Settings

    def set_system(self, text: str) -> None:
        """The system text from the next turn on; the conversation is then computed again."""
        self.system = _decodable(text)

    def set_option(self, name: str, text: str) -> None:
        """Set one option from its text. Raises UsageError."""
        if name == "seed":
            self.seed = read_seed(text)
        elif name == "think":
            self._set_think(text)
        else:
            self.sampling = set_sampling(self.sampling, name, text)

    def options(self) -> dict[str, Value]:
        """Every option's value by name."""
        return sampling_options(self.sampling) | {"seed": self.seed, "think": self.think}

    def _set_think(self, text: str) -> None:
        self._desk.chat_format.require_think_switch()
        try:
            self.think = parse_switch(text.strip())
        except ValueError:
            raise UsageError("think can be on or off") from None

    # For the library

    def fork_from(self, parent: Session) -> None:
        """Take over the parent's conversation up to its last finished turn, on a new branch."""
        turn = parent._leaf
        if parent._job is not None and turn.parent is not None:
            turn = turn.parent
        self._root, self._leaf = turn.copy_path(next(self._branches))
        shared = self._desk.engine.fork(parent.id, self.id, turn.num_tokens)
        self._note_lost(shared.num_lost_tokens)

    def apply(self, event: Event, at: float) -> bool:
        """Take in what the engine made at the time `at`; False when it is no longer wanted."""
        job = self._job
        if job is None or event.request_id != job.request.request_id:
            return False
        self._output += job.feed(event, at)
        if job.reply.is_stopped:
            self._desk.engine.abort(event.request_id)
            self._finish(job, "stop")
        elif event.finish_reason is not None:
            self._finish(job, event.finish_reason, event.error)
        return True

    # Inside

    def _note_lost(self, num_tokens: int) -> None:
        """Say what a cut through compressed tokens costs the next turn."""
        if num_tokens:
            text = f"{num_tokens:,} kept tokens were compressed with later ones: computed again"
            self._output.append(Chunk("remark", f"{text} with the next turn"))

    def _require_idle(self) -> None:
        if self.is_working:
            raise UsageError("a reply is being made; stop it first (Ctrl-C or /stop)")

    def _messages(self, leaf: Turn) -> list[Message]:
        system = [Message("system", self.system)] if self.system else []
        return system + leaf.messages()

    def _replace_turn(self, text: str) -> None:
        self._require_idle()
        if self._leaf.parent is None:
            raise UsageError("there is no turn yet")
        self._ask(self._leaf.parent, text)

    def _ask(self, parent: Turn, text: str) -> None:
        """Make a turn below `parent` and ask the engine. Nothing changes when it does not fit."""
        desk, old = self._desk, parent.path_spans()
        if len(text) > self.max_context * MAX_TOKEN_CHARS:
            raise CapacityError(
                f"the text has {len(text):,} characters; the context holds {self.max_context:,} "
                "tokens: send less"
            )
        messages = [*self._messages(parent), Message("user", text)]
        pieces = desk.chat_format.pieces(messages, self.think)
        spans, num_kept = continue_spans(desk.tokenizer, old, pieces)
        ids = [token_id for span in spans for token_id in span.ids]
        self._check_room(len(ids))
        branch = next(self._branches) if parent.children else parent.branch
        turn = Turn(parent, text, branch)
        turn.num_kept, turn.spans, turn.num_tokens = num_kept, spans[num_kept:], len(ids)
        is_continued = num_kept == len(old)
        num_known = parent.num_tokens if is_continued else num_tokens_before(spans, text)
        job = Job(desk, self._request(ids, branch), spans, num_known)
        desk.engine.submit(job.request)
        parent.add_child(turn)
        self._leaf, self._job = turn, job
        self._output.append(Chunk("asked", text))

    def _request(self, ids: list[int], branch: int) -> Request:
        stop_ids = self.sampling.stop_token_ids | self._desk.chat_format.stop_token_ids
        return Request(
            request_id=next(self._desk.request_ids),
            session_id=self.id,
            token_ids=ids,
            num_prompt_tokens=len(ids),
            sampling=replace(self.sampling, stop_token_ids=stop_ids),
            seed=self.seed,
            branch=branch,
        )

    def _check_room(self, num_tokens: int) -> None:
        """One token must be left for the reply."""
        if num_tokens >= self.max_context:
            raise CapacityError(
                f"the conversation would have {num_tokens:,} tokens, the context holds "
                f"{self.max_context - 1:,} and one for the reply: shorten the text by "
                f"{num_tokens - self.max_context + 1:,} tokens, /undo turns or /clear"
            )

    def _finish(self, job: Job, reason: str, error: str = "") -> None:
        """The reply has ended: put it in the tree, then ask what waits."""
        turn, reply = self._leaf, job.reply
        self._output += reply.finish(is_cut=reason in ("abort", "error"))
        turn.content = reply.content.removeprefix(self._desk.chat_format.reply_lead)
        turn.reasoning = reply.reasoning.rstrip("\n")
        turn.finish_reason = reason
        turn.spans += job.spans()
        turn.num_tokens = job.num_tokens
        self._job = None
        self.last_reply = job.stats(reason)
        self.unread += 1
        self._output += self._comments(turn, job, error)
        if self.queued:
            try:
                self._ask(turn, self.queued.pop(0))
            except KvchatError as problem:
                self._output.append(Chunk("notice", f"not sent: {problem}"))

    def _comments(self, turn: Turn, job: Job, error: str) -> Iterator[Chunk]:
        """What is to be said about a finished reply; something where there is nothing else."""
        stats = self.last_reply
        assert stats is not None, f"not finished: {turn=}"
        if stats.finish_reason == "error":
            yield Chunk("notice", error or "the engine could not go on with this reply")
        elif stats.finish_reason == "abort":
            yield Chunk("remark", "stopped")
        elif stats.finish_reason == "length":
            yield self._length_comment(turn, stats, job.request.sampling.max_tokens)
        elif not turn.content.strip():
            yield Chunk("remark", "empty reply")
        if stats.num_recomputed_tokens:
            remark = f"{stats.num_recomputed_tokens:,} tokens of history recomputed"
            yield Chunk("remark", remark)
        lowest = max(self._desk.engine.session_kv(self.id).shares, default=Codec.NATIVE)
        if lowest > self._told_codec:
            self._told_codec = lowest
            yield Chunk("remark", f"older tokens are now {lowest.label}; /kv shows which")

    def _length_comment(self, turn: Turn, stats: ReplyStats, max_tokens: int | None) -> Chunk:
        """Which limit the reply has come to: the context's, that of a pinned chat, or its own."""
        way_out = "/undo turns, /clear, or /fork an earlier point"
        if turn.num_tokens >= self.max_context:
            text = f"context full: {turn.num_tokens:,} of {self.max_context:,} tokens; {way_out}"
            return Chunk("notice", text)
        if self.is_pinned and (max_tokens is None or stats.num_generated_tokens < max_tokens):
            text = f"the KV pool holds {turn.num_tokens:,} tokens of a pinned chat, which is not"
            return Chunk("notice", f"{text} compressed; /unpin it, {way_out}")
        return Chunk("remark", f"cut at {stats.num_generated_tokens:,} tokens")


def _decodable(text: str) -> str:
    """Text that UTF-8 can hold: what a terminal could not read becomes a question mark."""
    return text.encode("utf-8", "replace").decode()


def _readable(text: str) -> str:
    """The text of a turn. Raises UsageError when there is none."""
    if not text.strip():
        raise UsageError("nothing to send: the text is empty")
    return _decodable(text)

"""An engine that says what it is told to, and a tokenizer and format to go with it. No model.

    engine = ScriptedEngine(tokenizer)
    library = scripted_library(engine)
    engine.replies += ["Hello!"]        # the next submitted request says this, then its end marker
    library.current.send("hi")
    engine.run()                        # one token a request and step, until all have finished
    library.pump()

Without a prepared reply a request says `engine.default_reply`. `engine.step()` does one step, for
what happens in the middle of a reply. Prompts longer than `max_prompt` are refused.
"""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace

from kvchat.chat.library import ChatDefaults, Library
from kvchat.chat.template import ChatFormat, load_chat_format
from kvchat.chat.tokenizer import Tokenizer, load_tokenizer
from kvchat.config import SamplingParams
from kvchat.engine.request import Event, Request, Shared
from kvchat.engine.stats import SessionKV
from kvchat.errors import CapacityError

CHAT_MARKERS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def text_source(**files):
    """A ModelSource as far as text is concerned."""
    fields = {
        "name": "test-model",
        "config": {},
        "generation_config": {},
        "tokenizer_config": {},
        "special_tokens_map": {},
        "tokenizer_json": None,
        "tokenizer_model": None,
        "chat_template": None,
    }
    return SimpleNamespace(**{**fields, **files})


def byte_level_json(markers=CHAT_MARKERS, merges=(), **changes):
    """A tokenizer.json: one token a byte (GPT-2's alphabet), `merges`, and special markers."""
    from tokenizers.pre_tokenizers import ByteLevel

    vocab = {char: index for index, char in enumerate(sorted(ByteLevel.alphabet()))}
    for left, right in merges:
        vocab[left + right] = len(vocab)
    first = len(vocab)
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": True,
        "trim_offsets": True,
        "use_regex": True,
    }
    spec = {
        "version": "1.0",
        "added_tokens": [
            {"id": first + index, "content": text, "special": True, **plain}
            for index, text in enumerate(markers)
        ],
        "normalizer": None,
        "pre_tokenizer": {**byte_level, "add_prefix_space": False},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "unk_token": None,
            "vocab": vocab,
            "merges": [f"{left} {right}" for left, right in merges],
        },
    }
    return json.dumps({**spec, **changes}).encode()


def scripted_tokenizer(markers=CHAT_MARKERS, **tokenizer_config) -> Tokenizer:
    """One token a byte, plus `markers`."""
    source = text_source(
        tokenizer_json=byte_level_json(markers),
        tokenizer_config={"eos_token": "<|im_end|>", **tokenizer_config},
    )
    return load_tokenizer(source, 1000)


class ScriptedEngine:
    """Implements session.ChatEngine. `calls` lists (name, *arguments) but for submit's requests,
    which are in `requests`."""

    def __init__(self, tokenizer: Tokenizer, listener=lambda events: None) -> None:
        self.tokenizer = tokenizer
        self.listener = listener
        self.replies: list[str | list[int]] = []
        self.default_reply = "ok"
        self.max_prompt = 1 << 30
        self.max_context = 1 << 30
        self.num_cached_tokens = 0  # what every request is said to have found computed
        self.num_lost_tokens = 0  # what every fork and trim is said to have cut
        self.held: dict[int, SessionKV] = {}  # what sessions are said to hold, by id
        self.requests: list[Request] = []
        self.calls: list[tuple] = []
        self._running: dict[int, tuple[Request, list[int]]] = {}

    def submit(self, request: Request) -> None:
        if len(request.token_ids) > self.max_prompt:
            raise CapacityError(f"{len(request.token_ids)} tokens, at most {self.max_prompt} fit")
        reply = self.replies.pop(0) if self.replies else self.default_reply
        if isinstance(reply, str):
            pieces = self.tokenizer.split(reply, at_start=False)
            reply = [
                token_id
                for piece in pieces
                for token_id in (
                    [piece.marker.token_id]
                    if piece.marker
                    else self.tokenizer.encode(piece.text, at_start=False)
                )
            ]
            reply += sorted(request.sampling.stop_token_ids)[:1]
        self.requests.append(request)
        self._running[request.request_id] = (request, list(reply))

    def abort(self, request_id: int) -> Event | None:
        self.calls.append(("abort", request_id))
        running = self._running.pop(request_id, None)
        if running is None:
            return None
        event = Event(request_id, running[0].session_id, finish_reason="abort")
        self.listener([event])
        return event

    def release(self, session_id: int) -> Event | None:
        self.calls.append(("release", session_id))
        return None

    def fork(self, parent_session_id: int, child_session_id: int, num_tokens: int) -> Shared:
        self.calls.append(("fork", parent_session_id, child_session_id, num_tokens))
        return Shared(num_tokens - self.num_lost_tokens, self.num_lost_tokens)

    def trim(self, session_id: int, num_tokens: int) -> int:
        self.calls.append(("trim", session_id, num_tokens))
        return self.num_lost_tokens

    def set_foreground(self, session_id: int | None) -> None:
        self.calls.append(("set_foreground", session_id))

    def set_pinned(self, session_id: int, is_pinned: bool) -> None:
        self.calls.append(("set_pinned", session_id, is_pinned))

    def session_kv(self, session_id: int) -> SessionKV:
        return self.held.get(session_id, SessionKV(0, 0, 0))

    def step(self, num_tokens: int = 1) -> bool:
        """Every running request says `num_tokens` more; False when none runs."""
        events = [self._advance(*running, num_tokens) for running in [*self._running.values()]]
        if events:
            self.listener(events)
        return bool(events)

    def run(self) -> None:
        """Step until every request has finished."""
        while self.step():
            pass

    def fail(self, error: str) -> None:
        """Every running request ends with this sentence."""
        events = [
            Event(request.request_id, request.session_id, finish_reason="error", error=error)
            for request, _ in self._running.values()
        ]
        self._running.clear()
        self.listener(events)

    def _advance(self, request: Request, rest: list[int], num_tokens: int) -> Event:
        said, rest[:] = rest[:num_tokens], rest[num_tokens:]
        request.token_ids += said
        reason = None
        if not rest:
            is_stop = bool(said) and said[-1] in request.sampling.stop_token_ids
            reason = "stop" if is_stop else "length"
        num_generated = len(request.token_ids) - request.num_prompt_tokens
        limits = (request.sampling.max_tokens or 1 << 30, self.max_context)
        if num_generated >= limits[0] or len(request.token_ids) >= limits[1]:
            reason = reason or "length"
        if reason:
            del self._running[request.request_id]
        return Event(
            request.request_id,
            request.session_id,
            tuple(said),
            reason,
            num_cached_tokens=self.num_cached_tokens,
        )


def scripted_library(
    engine: ScriptedEngine,
    chat_format: str | ChatFormat = "chatml",
    max_model_len: int = 1 << 20,
    system: str | None = None,
    seed: int | None = 7,
    notify=lambda: None,
) -> Library:
    """A library over `engine`, wired both ways; the clock ticks one second a look."""
    if isinstance(chat_format, str):
        chat_format = load_chat_format(text_source(), engine.tokenizer, chat_format)
    ticks = itertools.count()
    engine.max_context = max_model_len
    library = Library(
        engine,
        engine.tokenizer,
        chat_format,
        ChatDefaults(SamplingParams(), max_model_len, system, seed),
        notify,
        clock=lambda: float(next(ticks)),
    )
    engine.listener = library.on_events
    return library

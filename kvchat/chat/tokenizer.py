"""Text to token ids and back. Knows vocabularies; never templates, sessions or the engine.

A *marker* is the text of an added or control token (`<|im_end|>`, `</s>`). `encode` is for content:
it never yields a marker's id, whatever the text says. `split` is for a template's own text: there
the markers are found. Everything else gets the ids the library itself would give.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise

from kvchat.chat.vocabulary import (
    JsonVocabulary,
    Marker,
    SentencePieceVocabulary,
    Vocabulary,
    json_marker,
)
from kvchat.errors import ModelError, quoted
from kvchat.model.source import ModelSource

MAX_TOKENIZER_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of prompt text: a marker, or plain text. `at_start`: gets a leading space."""

    text: str
    marker: Marker | None = None
    at_start: bool = False


class Tokenizer:
    """One model's tokenizer. `special` names texts as templates do: bos_token, eos_token, ...

    `adds_bos` None: as the library does.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        markers: Iterable[Marker],
        special: Mapping[str, str],
        adds_bos: bool | None,
    ) -> None:
        self._vocabulary = vocabulary
        self.has_inner_prefix = vocabulary.has_inner_prefix  # text after a marker is at a start
        self.has_prefix = vocabulary.has_prefix  # text at a start gets a space
        self.markers = {m.text: m for m in markers if m.is_structural}
        self.special = dict(special)
        self.warnings: list[str] = []
        self._marker_of_id = {m.token_id: m for m in self.markers.values()}
        self.num_ids = max(vocabulary.num_ids, *(i + 1 for i in self._marker_of_id), 0)
        self._forbidden = frozenset(self._marker_of_id) - {vocabulary.unk_id}
        self._pattern = _marker_pattern(self.markers.values())
        bos = self.markers.get(self.special.get("bos_token", ""))
        if adds_bos is None:
            adds_bos = bos is not None and bos.token_id == vocabulary.first_id
        self.bos = bos if adds_bos else None  # what stands before a text that is no template's

    def marker(self, token_id: int) -> Marker | None:
        """The marker an id stands for; None for the ids of plain text."""
        return self._marker_of_id.get(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        """What a plain token adds to the text: UTF-8 that may begin or end inside a character."""
        return self._vocabulary.token_bytes(token_id)

    def encode(self, text: str, at_start: bool = True) -> list[int]:
        """The ids of content. A marker in it is cut in two and stays plain text."""
        ids = self._vocabulary.encode(text, at_start)
        if self._forbidden.isdisjoint(ids):
            return ids
        if len(text) < 2:
            return [] if self._vocabulary.unk_id is None else [self._vocabulary.unk_id]
        # The library made a marker. Those in the text are cut before their last character, those
        # that appear only once the text is normalised are found by halving.
        cuts = [found.end() - 1 for found in self._pattern.finditer(text)] or [len(text) // 2]
        parts = [text[start:end] for start, end in pairwise([0, *cuts, len(text)])]
        encoded = [self.encode(p, at_start and i == 0) for i, p in enumerate(parts) if p]
        return [token_id for ids in encoded for token_id in ids]

    def split(self, text: str, at_start: bool) -> list[Piece]:
        """A template's text as markers and the plain text between them."""
        pieces: list[Piece] = []
        position = 0
        for found in self._pattern.finditer(text):
            if found.start() > position:
                pieces.append(Piece(text[position : found.start()], at_start=at_start))
            marker = self.markers.get(found[0]) or self.markers[found[0].strip()]
            pieces.append(Piece(found[0], marker))
            position, at_start = found.end(), self.has_inner_prefix
        if position < len(text):
            pieces.append(Piece(text[position:], at_start=at_start))
        return pieces

    def decode(self, ids: Iterable[int], at_start: bool = True) -> str:
        """The text of ids, markers included; bytes that are no UTF-8 become U+FFFD."""
        decoder = StreamDecoder(self, at_start, shows_hidden=True)
        return decoder.feed(ids) + decoder.flush()


class StreamDecoder:
    """Ids to text as they come: never half a character, and each token is looked at once.

    `at_start`: these ids begin a text, so the space the library put there is taken away.
    """

    def __init__(self, tokenizer: Tokenizer, at_start: bool, shows_hidden: bool = False) -> None:
        self._tokenizer = tokenizer
        self._shows_hidden = shows_hidden
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._drops_space = at_start and tokenizer.has_prefix

    @property
    def is_complete(self) -> bool:
        """No character is half read."""
        return not self._utf8.getstate()[0]

    def feed(self, ids: Iterable[int]) -> str:
        """The text these ids complete."""
        return "".join(map(self._feed_one, ids))

    def _feed_one(self, token_id: int) -> str:
        marker = self._tokenizer.marker(token_id)
        if marker is not None:
            self._drops_space = self._tokenizer.has_inner_prefix
            is_shown = self._shows_hidden or not marker.is_hidden
            return self.flush() + (marker.text if is_shown else "")
        data = self._tokenizer.token_bytes(token_id)
        if self._drops_space and data:
            data = data.removeprefix(b" ")
            self._drops_space = False
        return self._utf8.decode(data)

    def flush(self) -> str:
        """What is held back, as U+FFFD: nothing can complete it any more."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest


def _marker_pattern(markers: Iterable[Marker]) -> re.Pattern[str]:
    """Finds markers in a template's text, the longest first, as the libraries do."""
    forms = [
        r"\s*" * marker.has_lstrip + re.escape(marker.text) + r"\s*" * marker.has_rstrip
        for marker in sorted(markers, key=lambda m: len(m.text), reverse=True)
    ]
    return re.compile("|".join(forms) or r"(?!)")


def load_tokenizer(source: ModelSource, vocab_size: int) -> Tokenizer:
    """A model's tokenizer; tokenizer.json wins over tokenizer.model. Raises ModelError.

    vocab_size: rows of its embeddings; more ids than that would read past the end, fewer is
    padding.
    """
    config = source.tokenizer_config
    vocabulary = _load_vocabulary(source)
    known = {marker.token_id for marker in vocabulary.markers}
    extra = [m for m in _configured_markers(config) if m.token_id not in known]
    wrong = [m for m in extra if vocabulary.piece(m.token_id) not in (None, m.text)]
    adds_bos = config.get("add_bos_token")
    tokenizer = Tokenizer(
        vocabulary,
        [*vocabulary.markers, *(m for m in extra if m not in wrong)],
        vocabulary.special | _special_texts(source.special_tokens_map) | _special_texts(config),
        adds_bos if isinstance(adds_bos, bool) else None,
    )
    if tokenizer.num_ids > vocab_size:
        raise ModelError(
            f"tokenizer: {tokenizer.num_ids:,} pieces, embeddings have {vocab_size:,} rows; "
            "it belongs to another model"
        )
    tokenizer.warnings += _disagreements(source, vocabulary, wrong)
    return tokenizer


def _load_vocabulary(source: ModelSource) -> Vocabulary:
    files = {"tokenizer.json": source.tokenizer_json, "tokenizer.model": source.tokenizer_model}
    for name, data in files.items():
        if data is not None and len(data) > MAX_TOKENIZER_BYTES:
            raise ModelError(f"{name} refused: {len(data) >> 20} MB, the limit is 64 MB")
    if source.tokenizer_json is not None:
        return JsonVocabulary(source.tokenizer_json)
    if source.tokenizer_model is not None:
        is_legacy = source.tokenizer_config.get("legacy", True) is not False
        return SentencePieceVocabulary(source.tokenizer_model, is_legacy)
    raise ModelError(
        f"{quoted(source.name)} has no tokenizer: put its tokenizer.json or tokenizer.model "
        "beside the weights"
    )


def _configured_markers(config: Mapping[str, object]) -> list[Marker]:
    """tokenizer_config.json's added_tokens_decoder: id -> token."""
    table = config.get("added_tokens_decoder")
    items = table.items() if isinstance(table, Mapping) else ()
    return [
        json_marker({"content": None, **token, "id": int(key)})
        for key, token in items
        if isinstance(token, Mapping) and str(key).isdecimal()
    ]


def _special_texts(config: Mapping[str, object]) -> dict[str, str]:
    """Entries such as "bos_token": "<s>" or {"content": "<s>"}."""
    texts = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        value = config.get(name)
        text = value.get("content") if isinstance(value, Mapping) else value
        if isinstance(text, str):
            texts[name] = text
    return texts


def _disagreements(source: ModelSource, vocabulary: Vocabulary, wrong: list[Marker]) -> list[str]:
    """One line when the tokenizer files name ids differently."""
    differing = [(m.token_id, m.text) for m in wrong]
    if source.tokenizer_json is not None and source.tokenizer_model is not None:
        other = SentencePieceVocabulary(source.tokenizer_model, is_legacy=True)
        pieces = ((i, other.piece(i)) for i in range(other.num_ids))
        differing += [(i, p or "") for i, p in pieces if vocabulary.piece(i) != p]
    return [
        f"tokenizer files disagree on {len(differing)} ids (first: {token_id} is "
        f'"{quoted(text)}" or "{quoted(vocabulary.piece(token_id) or "")}"); tokenizer.json is used'
        for token_id, text in differing[:1]
    ]

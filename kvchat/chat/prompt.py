"""A conversation's tokens with the text they stand for. Knows the tokenizer; never templates.

History is not tokenised twice: a new prompt takes over the tokens of the old one as far as their
texts agree, and encodes only what comes after.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvchat.chat.tokenizer import Piece, StreamDecoder, Tokenizer


@dataclass(frozen=True, slots=True)
class Span:
    """A run of tokens and its text; a marker is a span of its own."""

    piece: Piece
    ids: tuple[int, ...]


def encode_piece(tokenizer: Tokenizer, piece: Piece) -> Span:
    """The tokens of one piece of a prompt."""
    if piece.marker is not None:
        return Span(piece, (piece.marker.token_id,))
    return Span(piece, tuple(tokenizer.encode(piece.text, piece.at_start)))


def generated_spans(tokenizer: Tokenizer, ids: Sequence[int], at_start: bool) -> list[Span]:
    """A reply's tokens as spans: plain runs with their text, markers by themselves."""
    spans: list[Span] = []
    run: list[int] = []

    def end_run() -> None:
        if run:
            text = tokenizer.decode(run, at_start)
            spans.append(Span(Piece(text, at_start=at_start), tuple(run)))
            run.clear()

    for token_id in ids:
        marker = tokenizer.marker(token_id)
        if marker is None:
            run.append(token_id)
            continue
        end_run()
        spans.append(Span(Piece(marker.text, marker), (token_id,)))
        at_start = tokenizer.has_inner_prefix
    end_run()
    return spans


def continue_spans(
    tokenizer: Tokenizer, old: Sequence[Span], pieces: Iterable[Piece]
) -> tuple[list[Span], int]:
    """`pieces` as spans, and how many of them are those of `old`: as far as the texts agree. Of
    the first that differs its agreeing tokens are taken, as a span of their own."""
    spans: list[Span] = []
    num_kept = 0
    todo = list(pieces)[::-1]
    for span in old:
        if not todo or not _same_kind(span.piece, todo[-1]):
            break
        piece, is_whole = todo.pop(), True
        if not piece.text.startswith(span.piece.text):
            span, is_whole = _cut_span(tokenizer, span, piece.text), False
        rest = piece.text[len(span.piece.text) :]
        if span.ids or is_whole:
            spans.append(span)
        if rest:
            todo.append(Piece(rest, at_start=piece.at_start and not span.ids))
        if not is_whole:
            break
        num_kept += 1
    return spans + [encode_piece(tokenizer, piece) for piece in reversed(todo)], num_kept


def _same_kind(old: Piece, new: Piece) -> bool:
    if old.marker is not None or new.marker is not None:
        return old.marker == new.marker and old.text == new.text
    return old.at_start == new.at_start


def _cut_span(tokenizer: Tokenizer, span: Span, new: str) -> Span:
    """The first tokens of `span`, as many as `new` begins with the text of."""
    decoder = StreamDecoder(tokenizer, span.piece.at_start)
    text, num_ids, num_agreed = "", 0, 0
    for index, token_id in enumerate(span.ids):
        text += decoder.feed((token_id,))
        if not all(t.startswith(text[num_agreed:], num_agreed) for t in (new, span.piece.text)):
            break  # the second differs where the library normalises what it encodes
        if decoder.is_complete:
            num_ids, num_agreed = index + 1, len(text)
    piece = Piece(span.piece.text[:num_agreed], at_start=span.piece.at_start)
    return Span(piece, span.ids[:num_ids])


def num_tokens_before(spans: Sequence[Span], text: str) -> int:
    """Tokens of the spans that end before the last place where `text` is."""
    start = "".join(span.piece.text for span in spans).rfind(text.strip())
    num_tokens = num_chars = 0
    for span in spans:
        num_chars += len(span.piece.text)
        if num_chars > start:
            break
        num_tokens += len(span.ids)
    return num_tokens

"""What the two tokenizer libraries give, behind one face. Knows their file formats, nothing else.

Both kinds put a space before a text's start ("hello" -> "▁hello") where the model was trained so;
`encode(..., at_start=False)` is the same encoding without it, for text that goes on after text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from kvchat.errors import ModelError, quoted

SPACE = "▁"  # how sentencepiece writes a space inside a piece
# A second normalizer_spec, merged over the first by protobuf's rules: add_dummy_prefix = false.
_NO_PREFIX_PATCH = b"\x1a\x02\x18\x00"
_USER_DEFINED = b"\x18\x04"  # how a piece of that type ends: field 3 (type) = 4
_DECODERS = frozenset(
    ("Sequence", "ByteLevel", "Metaspace", "Replace", "ByteFallback", "Fuse", "Strip")
)


@dataclass(frozen=True, slots=True)
class Marker:
    """An added or control token. `is_hidden`: not shown when a model says it."""

    text: str
    token_id: int
    is_hidden: bool = True
    has_lstrip: bool = False  # swallows the white space before it, as the library does
    has_rstrip: bool = False

    @property
    def is_structural(self) -> bool:
        """Runs of white space and single characters are text to everyone."""
        return len(self.text) > 1 and not self.text.isspace()


class SentencePieceVocabulary:
    """tokenizer.model. `is_legacy` as in tokenizer_config.json: a space after every marker too."""

    def __init__(self, serialized: bytes, is_legacy: bool) -> None:
        from sentencepiece import SentencePieceProcessor

        try:
            self._model = SentencePieceProcessor(model_proto=serialized)
            self._inner = SentencePieceProcessor(model_proto=serialized + _NO_PREFIX_PATCH)
            self.num_ids: int = self._model.vocab_size()  # markers included
            self._pieces: list[str] = [self._model.id_to_piece(i) for i in range(self.num_ids)]
            self.has_prefix: bool = self._model.encode("a") != self._inner.encode("a")
        except (RuntimeError, ValueError, TypeError) as error:
            raise ModelError(f"tokenizer.model refused: {quoted(str(error))}") from None
        self.has_inner_prefix = self.has_prefix and is_legacy  # text after a marker gets a space
        self.unk_id: int | None = self._model.unk_id()
        self.first_id: int = self._model.bos_id()  # what stands before a text; -1 for nothing
        self.markers = list(self._find_markers(serialized))
        named = {"bos_token": self._model.bos_id(), "eos_token": self._model.eos_id()}
        self.special = {name: self._pieces[i] for name, i in named.items() if i >= 0}

    def _find_markers(self, serialized: bytes) -> Iterator[Marker]:
        for token_id, record in enumerate(_piece_records(serialized)):
            is_control = self._model.is_control(token_id) or self._model.is_unknown(token_id)
            if is_control or record.endswith(_USER_DEFINED):
                yield Marker(self._pieces[token_id], token_id, is_hidden=is_control)

    def encode(self, text: str, at_start: bool) -> list[int]:
        """The library's ids of `text`; with the leading space only if `at_start`."""
        ids: list[int] = (self._model if at_start else self._inner).encode(text)
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        """What one token adds to a text, as UTF-8 that may begin or end inside a character."""
        piece = self.piece(token_id) or ""
        if piece and self._model.is_byte(token_id):
            return bytes([int(piece[3:-1], 16)])
        return piece.replace(SPACE, " ").encode()

    def piece(self, token_id: int) -> str | None:
        """The library's name of an id; None when it has none."""
        return self._pieces[token_id] if token_id < self.num_ids else None


def _piece_records(serialized: bytes) -> Iterator[bytes]:
    """The serialised pieces (field 1) of a sentencepiece ModelProto the library has accepted.

    The library's Python face does not tell user-defined pieces from ordinary ones.
    """
    position = 0
    while position < len(serialized):
        key, position = _read_varint(serialized, position)
        size, position = _read_varint(serialized, position)  # all its fields are length-delimited
        if key >> 3 == 1:
            yield serialized[position : position + size]
        position += size


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    """A protobuf number and where it ends."""
    value = shift = 0
    while data[position] > 127:
        value |= (data[position] & 127) << shift
        position, shift = position + 1, shift + 7
    return value | data[position] << shift, position + 1


class JsonVocabulary:
    """tokenizer.json, with the same face. Its added tokens are all made special, so that `encode`
    can leave them be."""

    def __init__(self, serialized: bytes) -> None:
        from tokenizers import Tokenizer

        try:
            spec = json.loads(serialized)
            added = spec.get("added_tokens") or []
            self.markers = [json_marker(token) for token in added]
            for token, marker in zip(added, self.markers, strict=True):
                token["special"] = marker.is_structural
            kinds = _decoder_kinds(spec)
            self._model = Tokenizer.from_str(json.dumps(spec))
            self.has_prefix, self.has_inner_prefix = _take_prefix(spec)
            inner = json.dumps(spec) if self.has_prefix else ""
            self._inner = Tokenizer.from_str(inner) if inner else self._model
        except (ModelError, KeyboardInterrupt):
            raise
        except (
            BaseException
        ) as error:  # the library raises bare Exception, or panics, on a bad file
            raise ModelError(f"tokenizer.json refused: {quoted(str(error))}") from None
        for model in (self._model, self._inner):
            model.encode_special_tokens = True
            model.no_truncation()
            model.no_padding()
        self._bytes_of = _byte_level_alphabet() if "ByteLevel" in kinds else {}
        self._has_byte_pieces = "ByteFallback" in kinds
        self.num_ids = max(self._model.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        unk, unk_id = spec["model"].get("unk_token"), spec["model"].get("unk_id")
        self.unk_id: int | None = self._model.token_to_id(unk) if unk else unk_id
        self.first_id: int = [*self._model.encode("", add_special_tokens=True).ids, -1][0]
        self.special: dict[str, str] = {}

    def encode(self, text: str, at_start: bool) -> list[int]:
        model = self._model if at_start else self._inner
        ids: list[int] = model.encode(text, add_special_tokens=False).ids
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        piece = self.piece(token_id) or ""
        if self._bytes_of:
            values = [self._bytes_of.get(c, -1) for c in piece]
            return bytes(values) if -1 not in values else piece.encode()
        if self._has_byte_pieces and len(piece) == 6 and piece[:3] == "<0x" and piece[5] == ">":
            return bytes([int(piece[3:5], 16)])
        return piece.replace(SPACE, " ").encode()

    def piece(self, token_id: int) -> str | None:
        piece: str | None = self._model.id_to_token(token_id)
        return piece


Vocabulary = SentencePieceVocabulary | JsonVocabulary


def json_marker(token: Mapping[str, object]) -> Marker:
    """One entry of added_tokens, or of added_tokens_decoder with its id put in."""
    text, token_id = token["content"], token["id"]
    if not isinstance(text, str) or not isinstance(token_id, int) or not 0 <= token_id < 1 << 24:
        raise ModelError(f"tokenizer refused: added token {quoted(repr(token))}")
    return Marker(text, token_id, *(bool(token.get(n)) for n in ("special", "lstrip", "rstrip")))


def _nodes(root: object) -> Iterator[dict[str, object]]:
    """Every step of a normalizer, pre-tokenizer or decoder, sequences taken apart."""
    if isinstance(root, dict):
        yield root
        for name in ("normalizers", "pretokenizers", "decoders"):
            for child in root.get(name) or []:
                yield from _nodes(child)


def _decoder_kinds(spec: Mapping[str, object]) -> set[str]:
    """The types named in the decoder; refused when tokens are not plain pieces of the text."""
    kinds = {str(node.get("type")) for node in _nodes(spec.get("decoder"))}
    if not kinds or kinds - _DECODERS:
        named = quoted(", ".join(sorted(kinds - _DECODERS))) or "none"
        raise ModelError(
            f"tokenizer.json refused: decoder {named}; known are ByteLevel and Metaspace"
        )
    return kinds


def _take_prefix(spec: Mapping[str, object]) -> tuple[bool, bool]:
    """Remove from `spec` what puts a space before a text; whether it did so at the very start, and
    after markers too."""
    has_prefix = has_inner = False
    for node in _nodes(spec.get("normalizer")):
        if node.get("type") == "Prepend":
            # the library has no empty Prepend: a rule that changes nothing takes its place
            node.clear()
            node.update(type="Replace", pattern={"String": SPACE}, content=SPACE)
            has_prefix = has_inner = True
    for node in _nodes(spec.get("pre_tokenizer")):
        if node.get("type") == "Metaspace":
            old_scheme = "always" if node.get("add_prefix_space", True) else "never"
            scheme = node.get("prepend_scheme") or old_scheme
            node["prepend_scheme"], node["add_prefix_space"] = "never", False
            has_prefix |= scheme != "never"
            has_inner |= scheme == "always"
        elif node.get("type") == "ByteLevel" and node.get("add_prefix_space"):
            node["add_prefix_space"] = False
            has_prefix = has_inner = True
    return has_prefix, has_inner


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's byte-to-character table, reversed: printable bytes stand for themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + index): byte for index, byte in enumerate(others)}

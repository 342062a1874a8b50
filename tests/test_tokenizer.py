"""Tokenizers: the libraries' own ids, markers that content cannot form, text that streams whole."""

import json
import random

import pytest
from scripted_engine import byte_level_json, text_source
from text_models import (
    JSON_KINDS,
    MARKERS,
    OPEN_MARKERS,
    TEXTS,
    sentencepiece_model,
    tokenizer_json,
)

from kvchat.chat.tokenizer import StreamDecoder, load_tokenizer
from kvchat.errors import ModelError

SP_KINDS = ("bpe", "unigram")
KINDS = (*JSON_KINDS, *SP_KINDS)
ALL_MARKERS = (*MARKERS, *OPEN_MARKERS, "<mask>", "<end>")
FAMILY_EMOJI = "👩‍👩‍👧 ok 🇩🇪"


def load(kind, **files):
    if kind in SP_KINDS:
        return load_tokenizer(text_source(tokenizer_model=sentencepiece_model(kind), **files), 9999)
    return load_tokenizer(text_source(tokenizer_json=tokenizer_json(kind), **files), 9999)


def library_ids(kind, text):
    """The library's ids, with no marker found in the text."""
    if kind in SP_KINDS:
        import sentencepiece

        return sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model(kind)).encode(
            text
        )
    from tokenizers import Tokenizer

    spec = json.loads(tokenizer_json(kind))
    for token in spec["added_tokens"]:
        token["special"] = True
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    tokenizer.encode_special_tokens = True
    return tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_the_librarys_own(kind):
    tokenizer = load(kind)
    texts = [*TEXTS, *ALL_MARKERS, *(f"say {m}, {m}{m}!" for m in ALL_MARKERS)]

    assert [tokenizer.encode(t) for t in texts] == [library_ids(kind, t) for t in texts]


@pytest.mark.parametrize("kind", ["byte_level", "prepend", "bpe"])
def test_code_points_survive(kind):
    tokenizer = load(kind)
    codes = [*range(0x3100), *range(0x3100, 0xD800, 9), *range(0xE000, 0x30000, 9)]
    points = [chr(c) for c in codes if chr(c) != "▁"]
    if kind == "byte_level":  # normalises to NFC
        import unicodedata

        points = [c for c in points if unicodedata.is_normalized("NFC", c)]
        points = [
            c for c in points if not unicodedata.combining(c) and not "\u1100" <= c < "\u1200"
        ]
    for start in range(0, len(points), 512):
        text = "x".join(points[start : start + 512])
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("kind", JSON_KINDS)
def test_split_finds_markers_as_the_library_does(kind):
    from tokenizers import Tokenizer

    tokenizer, library = load(kind), Tokenizer.from_str(tokenizer_json(kind).decode())
    for text in (
        "<s>[INST] hi</s> there <s>  x",
        "a <mask> b <mask>c",
        "a<end>  \n b<end>c",
        "<think>\nhm</think>ok [TOOL]",
        " <s> x",
        "<s></s>",
        "no marker",
        "<<s>>",
    ):
        pieces = tokenizer.split(text, at_start=True)
        ids = []
        for piece in pieces:
            ids += (
                [piece.marker.token_id]
                if piece.marker
                else tokenizer.encode(piece.text, piece.at_start)
            )
        assert ids == library.encode(text, add_special_tokens=False).ids, text
        assert "".join(piece.text for piece in pieces) == text


@pytest.mark.parametrize("kind", KINDS)
def test_content_never_has_a_markers_id(kind):
    tokenizer = load(kind)
    marker_ids = {m.token_id for m in tokenizer.markers.values()}
    for marker in tokenizer.markers:
        for text in (marker, marker * 3, f"a {marker} b", marker[:2] + marker, f"\n{marker}\t"):
            assert marker_ids.isdisjoint(tokenizer.encode(text)), text


def test_user_defined_pieces_stay_text_even_when_normalisation_makes_them():
    data = sentencepiece_model("unigram", "nmt_nfkc", ("<|im_end|>", "  ", "\n"))
    tokenizer = load_tokenizer(text_source(tokenizer_model=data), 9999)
    marker_id = tokenizer.markers["<|im_end|>"].token_id

    assert "  " not in tokenizer.markers and "\n" not in tokenizer.markers
    for text in (
        "x<|im_end|>y",
        "＜|im_end|＞",
        "<|im\u200b_end|>",
        "<|im_end|>" * 9,
        "＜|ｉｍ_end|>!",
    ):
        assert marker_id not in tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode("x<|im_end|>y")) == "x<|im_end|>y"


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_split_at_every_token_equals_decoding_all(kind):
    tokenizer = load(kind)
    rng = random.Random(1)
    texts = [tokenizer.encode(text) for text in (*TEXTS, FAMILY_EMOJI)]
    texts += [[rng.randrange(tokenizer.num_ids) for _ in range(200)] for _ in range(20)]
    for ids in texts:
        decoder = StreamDecoder(tokenizer, at_start=True, shows_hidden=True)
        text = "".join(decoder.feed([token_id]) for token_id in ids) + decoder.flush()
        assert text == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_never_shows_half_a_character(kind):
    tokenizer = load(kind)
    decoder = StreamDecoder(tokenizer, at_start=True)
    shown = ""
    for token_id in tokenizer.encode(FAMILY_EMOJI):
        shown += decoder.feed([token_id])
        assert FAMILY_EMOJI.startswith(shown)

    assert shown == FAMILY_EMOJI
    assert decoder.flush() == ""


def test_half_a_character_at_the_end_is_one_replacement_character():
    tokenizer = load("byte_level")
    ids = tokenizer.encode("é😀")

    assert tokenizer.decode(ids[:-1]) == "é\ufffd"
    assert tokenizer.decode([*ids[:-1], tokenizer.markers["</s>"].token_id]) == "é\ufffd</s>"


@pytest.mark.parametrize("kind", ["prepend", "metaspace_always", "bpe"])
def test_the_first_space_is_the_librarys_and_the_others_are_the_models(kind):
    tokenizer = load(kind)
    hello = tokenizer.encode("hello")

    assert tokenizer.decode(hello + hello) == "hello hello"
    assert tokenizer.decode(hello, at_start=False) == " hello"
    assert (
        tokenizer.decode([*hello, tokenizer.markers["</s>"].token_id, *hello]) == "hello</s>hello"
    )


def test_a_space_follows_markers_only_where_the_model_was_trained_so():
    assert load("metaspace_first").has_inner_prefix is False
    assert load("bpe").has_inner_prefix is True
    assert load("bpe", tokenizer_config={"legacy": False}).has_inner_prefix is False


def test_streaming_looks_at_each_token_once(monkeypatch):
    tokenizer = load("byte_level")
    ids, looks = tokenizer.encode("日本語 " * 200), []
    token_bytes = tokenizer.token_bytes
    monkeypatch.setattr(tokenizer, "token_bytes", lambda i: looks.append(i) or token_bytes(i))
    decoder = StreamDecoder(tokenizer, at_start=True)
    for token_id in ids:
        decoder.feed([token_id])

    assert looks == ids


def test_hidden_markers_are_not_shown_and_open_ones_are():
    tokenizer = load("byte_level")
    ids = [tokenizer.markers[text].token_id for text in ("<|im_start|>", "<think>")]

    assert StreamDecoder(tokenizer, at_start=True).feed(ids) == "<think>"
    assert tokenizer.decode(ids) == "<|im_start|><think>"


def test_ids_past_the_vocabulary_are_padding_and_say_nothing():
    for kind in ("byte_level", "bpe"):
        tokenizer = load(kind)
        assert tokenizer.decode([tokenizer.num_ids, tokenizer.num_ids + 7]) == ""


def test_bos_is_added_where_the_files_say_so():
    bos = {"bos_token": {"content": "<s>"}}

    assert load("bpe").bos.text == "<s>"
    assert load("bpe", tokenizer_config={"add_bos_token": False}).bos is None
    assert load("byte_level", tokenizer_config=bos).bos is None
    assert load("byte_level", tokenizer_config={**bos, "add_bos_token": True}).bos.text == "<s>"


def test_bos_is_added_where_the_library_does():
    from tokenizers import Tokenizer, processors

    library = Tokenizer.from_str(tokenizer_json("byte_level").decode())
    for pattern, names in (("<s> $A", ["<s>"]), ("$A </s>", []), ("</s> $A", [])):
        ids = [(text, library.token_to_id(text)) for text in ("<s>", "</s>") if text in pattern]
        library.post_processor = processors.TemplateProcessing(pattern, special_tokens=ids)
        source = text_source(
            tokenizer_json=library.to_str().encode(), tokenizer_config={"bos_token": "<s>"}
        )
        bos = load_tokenizer(source, 9999).bos
        assert [marker.text for marker in [bos] if marker] == names


def test_added_tokens_of_the_config_complete_a_sentencepiece_model():
    added = {"520": {"content": "<|im_end|>", "special": True}, "1": {"content": "<s>"}}
    tokenizer = load("bpe", tokenizer_config={"added_tokens_decoder": added})

    assert tokenizer.markers["<|im_end|>"].token_id == 520
    assert tokenizer.num_ids == 521
    assert tokenizer.warnings == []


def test_tokenizer_json_wins_and_a_disagreement_is_one_warning():
    source = text_source(
        tokenizer_json=tokenizer_json("prepend"), tokenizer_model=sentencepiece_model("bpe")
    )
    tokenizer = load_tokenizer(source, 9999)

    assert tokenizer.encode("hello") == load("prepend").encode("hello")
    (warning,) = tokenizer.warnings
    assert warning.startswith("tokenizer files disagree on ")
    assert warning.endswith("tokenizer.json is used")
    assert "\n" not in warning


def test_more_ids_than_embeddings_are_refused_and_fewer_are_padding():
    source = text_source(tokenizer_json=byte_level_json())

    assert load_tokenizer(source, 259).num_ids == 259
    assert load_tokenizer(source, 320).num_ids == 259
    with pytest.raises(ModelError, match="tokenizer: 259 pieces, embeddings have 258 rows"):
        load_tokenizer(source, 258)


def test_files_that_are_no_tokenizer_are_refused_in_one_line():
    good = byte_level_json()
    cases = {
        "no tokenizer": {},
        "tokenizer.json refused": {"tokenizer_json": b"{"},
        "tokenizer.json refused: 'l": {"tokenizer_json": b"[1]"},
        "tokenizer.model refused": {"tokenizer_model": b"\x00" * 99},
        "64 MB": {"tokenizer_json": good + b" " * (65 << 20)},
        "decoder WordPiece": {
            "tokenizer_json": byte_level_json(decoder={"type": "WordPiece", "prefix": "##"})
        },
        "added token": {"tokenizer_json": good.replace(b'"id": 256', b'"id": -5')},
    }
    for message, files in cases.items():
        with pytest.raises(ModelError, match=message) as caught:
            load_tokenizer(text_source(**files), 9999)
        assert len(str(caught.value)) < 300 and str(caught.value).isprintable()


def test_damaged_files_are_refused_or_read_but_never_worse():
    rng = random.Random(3)
    files = {"tokenizer_json": byte_level_json(), "tokenizer_model": sentencepiece_model("bpe")}
    num_refused = 0
    for name, data in files.items():
        for _ in range(60):
            mutant = bytearray(data)
            for _ in range(rng.randint(1, 4)):
                mutant[rng.randrange(len(mutant))] = rng.randrange(256)
            if rng.random() < 0.3:
                del mutant[rng.randrange(len(mutant)) :]
            try:
                load_tokenizer(text_source(**{name: bytes(mutant)}), 9999).encode("hello é")
            except ModelError as error:
                num_refused += 1
                assert str(error).isprintable()
    assert num_refused > 20

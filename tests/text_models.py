"""Tokenizers small enough to be trained inside a test, one of each kind that models come with."""

from __future__ import annotations

import io
import json
from functools import cache

MARKERS = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "[TOOL]")
OPEN_MARKERS = ("<think>", "</think>")  # added tokens that are not special: shown when said

CORPUS = [
    "hello world, this is a test of the system: user assistant system INST SYS text",
    "[INST] ok [/INST] <<SYS>> fine <</SYS>> <|user|> hey <|assistant|> there <|system|>",
    "<|start_header_id|>user<|end_header_id|> <|eot_id|> <|im_start|>user <|im_end|>",
    "Ünïcödé wörld straße naïve café ＡＢＣ ﬁne ½",
    "日本語のテキスト 漢字 かな 中文 한국어",
    "emoji 😀 👩‍👩‍👧 🇩🇪 and e\u0301 combining",
    "def f(x):\n    return x + 1\n\ttab\r\n",
    "<think> k> <think> k> </think> k> [TOOL] L] [TOOL] L]",
    "### Instruction: USER: ASSISTANT: ### Response:",
]

TEXTS = [
    *CORPUS,
    "",
    " ",
    "   ",
    "a",
    " leading and trailing ",
    "  two  spaces  ",
    "\n",
    "\n\n\n",
    "\t\x00\x01\x02\x1b[31m\x7f\x80\x9b\u202e\u2028\ufeff\ufdd0\ufffd",
    "zebra quux 12345 3.14",
    "ŧħĸ ∀∂∈ℝ ᚠᛇᚻ 🏳️‍🌈🧑🏽‍🚀",
    "▁already ▁marked",
    "x" * 300,
]


@cache
def sentencepiece_model(kind: str = "bpe", normalizer: str = "identity", user_defined=()) -> bytes:
    """kind: bpe or unigram, with byte fallback."""
    import sentencepiece

    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 20),
        model_writer=out,
        model_type=kind,
        vocab_size=520,
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name=normalizer,
        remove_extra_whitespaces=normalizer != "identity",
        user_defined_symbols=list(user_defined),
        control_symbols=["<ctl>"],
        minloglevel=2,
    )
    return out.getvalue()


@cache
def tokenizer_json(kind: str) -> bytes:
    """kind: byte_level (Qwen, Llama 3), prepend (Llama 2), metaspace_always, metaspace_first."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from tokenizers.trainers import BpeTrainer

    tokenizer = Tokenizer(models.BPE(byte_fallback=kind != "byte_level", unk_token="<unk>"))
    alphabet = []
    if kind == "byte_level":
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        scheme = kind.partition("_")[2]
        if scheme:
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        else:
            steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
            tokenizer.normalizer = normalizers.Sequence(steps)
        tokenizer.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
    fallback = [] if kind == "byte_level" else [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = BpeTrainer(
        vocab_size=900,
        special_tokens=["<unk>", *fallback],
        initial_alphabet=alphabet,
        show_progress=False,
        max_token_length=12,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = []
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in MARKERS])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in OPEN_MARKERS])
    tokenizer.add_special_tokens(
        [AddedToken("<mask>", lstrip=True), AddedToken("<end>", rstrip=True)]
    )
    return tokenizer.to_str().encode()


JSON_KINDS = ("byte_level", "prepend", "metaspace_always", "metaspace_first")

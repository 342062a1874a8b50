"""Perplexity per domain on held-out text, beside a unigram and a trigram that saw the same training
text."""

import lzma
from collections.abc import Iterator
from dataclasses import dataclass
from math import exp
from pathlib import Path

import numpy as np
import torch

from .corpus import Encoded
from .generator import Generator, Mix
from .llama import Llama, rotary_tables
from .ngrams import Trigram
from .tokens import ASSISTANT_LOSS, Encoder, Row

MAX_LENGTH = 1024
_RAW_LENGTH = 1000
_NUM_DIALOGUES = 400  # per domain
_NUM_COUNTED = 3_000_000  # generated tokens the baselines count, beside all real ones


@dataclass(frozen=True)
class Text:
    ids: np.ndarray
    is_scored: np.ndarray


def _dialogues(encoder: Encoder, real: Encoded, source: str) -> list[Text]:
    texts = []
    for index in real.of(source)[:: max(1, len(real.of(source)) // _NUM_DIALOGUES)][
        :_NUM_DIALOGUES
    ]:
        row = Row(encoder)
        row.begin()
        span = real.whole(int(index))
        row.add_encoded(real.ids[span], real.weights[span])
        ids, weights = (
            np.array(row.ids[:MAX_LENGTH]),
            np.frombuffer(bytes(row.weights[:MAX_LENGTH]), np.uint8),
        )
        texts.append(Text(ids, weights > 0))
    return texts


def _generated(encoder: Encoder, seed: int) -> list[Text]:
    """Talk by the generator, the assistant's side scored."""
    generator = Generator(encoder, None, Mix(), seed)
    texts = []
    for _ in range(_NUM_DIALOGUES):
        row = Row(encoder)
        generator.conversation(row, 600)
        ids, weights = row.arrays(min(len(row), MAX_LENGTH))
        texts.append(Text(ids.astype(np.int64), weights >= ASSISTANT_LOSS))
    return texts


def _raw(encoder: Encoder, text: str) -> list[Text]:
    """Plain prose as one long assistant turn, in windows."""
    ids = encoder.text(text)
    head = [encoder.bos, encoder.markers["assistant"]]
    windows = (
        np.array(head + ids[i : i + _RAW_LENGTH])
        for i in range(0, min(len(ids), 200_000), _RAW_LENGTH)
    )
    return [Text(window, np.arange(len(window)) >= 2) for window in windows]


def domains(data: Path, encoder: Encoder, held_out: Encoded, seed: int) -> dict[str, list[Text]]:
    with lzma.open(data / "wikitext-2" / "test.txt.xz", "rt", encoding="utf-8") as file:
        wikitext = file.read()
    stories = (data / "tinystories-excerpt" / "tinystories.txt").read_text(encoding="utf-8")
    named = {
        source: _dialogues(encoder, held_out, source) for source in ("persona", "booking", "coffee")
    }
    return named | {
        "generated": _generated(encoder, seed),
        "tinystories": _raw(encoder, " ".join(stories.split())),
        "wikitext-2": _raw(encoder, " ".join(wikitext.split())),
    }


def _losses(model: Llama, texts: list[Text]) -> Iterator[tuple[float, int]]:
    """Sum of loss and number of scored tokens, text by text."""
    device = model.model.embed_tokens.weight.device
    tables = rotary_tables(model.config, MAX_LENGTH, device)
    dtype = model.model.embed_tokens.weight.dtype
    for text in texts:
        ids = torch.from_numpy(text.ids.astype(np.int64)).to(device)[None]
        with torch.no_grad():
            logits = model(ids[:, :-1], tables, dtype)[0].float()
            losses = (
                torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
                .cpu()
                .numpy()
            )
        scored = text.is_scored[1:]
        yield float(losses[scored].sum()), int(scored.sum())


def _baseline(texts: list[Text], baseline: Trigram) -> tuple[float, float]:
    trigram = np.concatenate([baseline.losses(t.ids)[t.is_scored[2:]] for t in texts])
    unigram = np.concatenate([baseline.unigram_losses(t.ids)[t.is_scored[2:]] for t in texts])
    return exp(unigram.mean()), exp(trigram.mean())


def counted_text(encoder: Encoder, training: Encoded, seed: int) -> np.ndarray:
    generator = Generator(encoder, None, Mix(), seed)
    row = Row(encoder)
    while len(row) < _NUM_COUNTED:
        generator.conversation(row, 1000)
    return np.concatenate((np.array(row.ids), training.ids.astype(np.int64)))


def perplexities(
    model: Llama, texts: dict[str, list[Text]], counted: np.ndarray
) -> dict[str, dict[str, float]]:
    rng = np.random.default_rng(0)
    blocks = np.array_split(counted, 500)
    order = rng.permutation(len(blocks))
    held_back = np.concatenate([blocks[i] for i in order[:10]])
    rest = np.concatenate([blocks[i] for i in order[10:]])
    baseline = Trigram(rest, held_back, model.config.vocab_size)
    figures = {}
    for name, made in texts.items():
        sums = list(_losses(model, made))
        loss = sum(total for total, _ in sums) / sum(count for _, count in sums)
        unigram, trigram = _baseline(made, baseline)
        figures[name] = {
            "model": exp(loss),
            "trigram": trigram,
            "unigram": unigram,
            "tokens": sum(c for _, c in sums),
        }
    return figures

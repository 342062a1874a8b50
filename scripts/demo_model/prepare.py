"""The tokenizer and the encoded dialogues, made once before training."""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from random import Random

from .corpus import (
    SOURCES,
    Dialogue,
    encode_dialogues,
    held_out_dialogues,
    training_dialogues,
)
from .facts import VALUE, acknowledge, answer, ask, draw_fact, state
from .talk import dialogue, filler
from .tokens import Encoder, train_tokenizer

_NUM_GENERATED = 15_000  # facts with some talk each: about as much text as the dialogues give
_BOOKING_SHARE = 0.2  # booking talk would fill the vocabulary with restaurants


def generated_texts(count: int, seed: int) -> Iterator[str]:
    """Messages of the kind the generator writes."""
    rng = Random(seed)
    for _ in range(count):
        fact = draw_fact(rng)
        turns = dialogue(
            state(fact, rng),
            acknowledge(fact, rng, echo=rng.random() < 0.4),
            ask(fact, rng),
            answer(fact, rng),
        )
        for _ in range(3):
            turns += filler(rng)
        yield from (turn.text.replace(VALUE, "") for turn in turns)


def real_texts(dialogues: list[Dialogue], seed: int) -> Iterator[str]:
    rng = Random(seed)
    for item in dialogues:
        if item.source in ("persona", "coffee") or (
            item.source == "booking" and rng.random() < _BOOKING_SHARE
        ):
            yield from (turn.text for turn in item.turns)


def make_tokenizer(data: Path, tokenizer: Path, seed: int) -> None:
    dialogues = list(training_dialogues(data))
    texts = chain(real_texts(dialogues, seed), generated_texts(_NUM_GENERATED, seed))
    train_tokenizer(texts, tokenizer)
    print(f"{tokenizer}: {tokenizer.stat().st_size} bytes")


def encode_corpus(data: Path, tokenizer: Path, encoded: Path, held_out: Path) -> None:
    """The dialogues to train on and those to measure on, in separate files."""
    encoder = Encoder(tokenizer)
    encoded.parent.mkdir(parents=True, exist_ok=True)
    for path, dialogues in (
        (encoded, training_dialogues(data)),
        (held_out, held_out_dialogues(data)),
    ):
        real = encode_dialogues(dialogues, encoder)
        real.save(path)
        print(f"{path}: {len(real.sources)} dialogues, {len(real.ids)} tokens")
        for source in SOURCES:
            print(f"  {source}: {len(real.of(source))} dialogues, {real.num_tokens(source)} tokens")

"""Recall of a stated fact: items with held-out names and values at given distances, and the share
answered right."""

import re
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from random import Random

from .corpus import Encoded
from .decoding import Sampling, Talkers
from .facts import Fact, acknowledge, ask, correct, draw_fact, families, state
from .generator import Generator, Mix
from .llama import Llama
from .phrases_file import pick
from .talk import Turn, dialogue, exchange, filler
from .tokens import Encoder, Row

DISTANCES = (100, 500, 1_000, 2_000, 3_000)
UNSEEN_SHARE = 0.3  # items whose statement and question are phrased as training never does
CORRECTED_SHARE = 0.2  # items with an earlier, wrong statement of the same fact
_SLACK = 24  # tokens an item may be longer than its distance
_MAX_ANSWER = 48
_BATCH_TOKENS = 400_000


@dataclass(frozen=True)
class Item:
    prompt: list[int]  # up to and with the assistant's marker
    value: str
    distance: int  # as asked for
    actual: int  # tokens from the value's last occurrence to the end of the prompt
    is_unseen: bool
    kind: str


def _distractors(fact: Fact, count: int, rng: Random) -> list[Fact]:
    """Other facts of the same type: the same kind of value, about something else."""
    same = [f for f in families() if f.kind == fact.family.kind and f.is_measured]
    found: dict[str, Fact] = {}
    while len(found) < count:
        other = draw_fact(rng, pick(same, rng), held_out=True)
        if other.user_key != fact.user_key and other.value != fact.value:
            found.setdefault(other.user_key, other)
    return list(found.values())


class _Writer:
    def __init__(self, encoder: Encoder, real: Encoded, seed: int) -> None:
        self.rng = Random(seed)
        self.row = Row(encoder)
        # excerpts come from held-out dialogues here
        self.filler = Generator(encoder, real, Mix(), seed)

    def state(self, fact: Fact, is_unseen: bool) -> None:
        text = state(fact, self.rng, is_unseen)
        self.add(dialogue(text, acknowledge(fact, self.rng, echo=self.rng.random() < 0.35)))

    def add(self, turns: list[Turn]) -> None:
        for turn in turns:
            self.row.add(turn)

    def fill(self, target: int) -> None:
        """Talk until the row has at least `target` tokens, at most _SLACK more."""
        while len(self.row) < target:
            piece = Row(self.row.encoder)
            if self.rng.random() < 0.3:
                self.filler.fill_real(piece)
            else:
                for turn in filler(self.rng):
                    piece.add(turn)
            if len(self.row) + len(piece) <= target + _SLACK:
                self.row.ids += piece.ids
                self.row.weights += piece.weights


def make_item(encoder: Encoder, real: Encoded, distance: int, seed: int) -> Item:
    writer = _Writer(encoder, real, seed)
    rng, row = writer.rng, writer.row
    is_unseen = rng.random() < UNSEEN_SHARE
    measured = [family for family in families() if family.is_measured]
    fact = draw_fact(rng, pick(measured, rng), held_out=True)
    others = _distractors(fact, 3 + int(rng.random() * 3), rng)
    num_before = len(others) if distance < 300 else 1 + int(rng.random() * len(others))
    row.begin()
    writer.add(exchange("open", rng))
    for other in others[:num_before]:
        writer.state(other, False)
        writer.fill(len(row) + int(rng.random() * 60))
    if rng.random() < CORRECTED_SHARE and not is_unseen:
        writer.state(fact.with_value(draw_fact(rng, fact.family, held_out=True).value), False)
        writer.add(dialogue(correct(fact, rng), acknowledge(fact, rng, echo=rng.random() < 0.35)))
    else:
        writer.state(fact, is_unseen)
    value_end = row.value_end
    question = Row(encoder)
    question.add(Turn("user", ask(fact, rng, is_unseen)))
    question.ask_for_reply()
    end = value_end + distance - len(question)
    for i, other in enumerate(others[num_before:], 1):
        writer.fill(len(row) + (end - len(row)) * i // (len(others) - num_before + 1) - 40)
        writer.state(other, False)
    writer.fill(end)
    prompt = row.ids + question.ids
    return Item(prompt, fact.value, distance, len(prompt) - value_end, is_unseen, fact.family.name)


def _make_items(args: tuple[Path, Path, int, int, int]) -> list[Item]:
    tokenizer, dialogues, distance, first, count = args
    encoder, real = Encoder(tokenizer), Encoded.load(dialogues)
    return [
        make_item(encoder, real, distance, seed=distance * 1_000_003 + first + i)
        for i in range(count)
    ]


def make_items(
    tokenizer: Path, dialogues: Path, count: int, num_workers: int
) -> dict[int, list[Item]]:
    """`count` items for each distance; the same whatever the number of workers."""
    share = max(1, min(count, 50))
    jobs = [
        (tokenizer, dialogues, d, first, min(share, count - first))
        for d in DISTANCES
        for first in range(0, count, share)
    ]
    with ProcessPoolExecutor(num_workers) as pool:
        made = [item for items in pool.map(_make_items, jobs) for item in items]
    return {
        distance: [item for item in made if item.distance == distance] for distance in DISTANCES
    }


def is_right(value: str, reply: str) -> bool:
    return re.search(rf"(?<![\w-]){re.escape(value)}(?![\w-])", reply, re.IGNORECASE) is not None


def _batches(items: list[Item]) -> Iterator[list[Item]]:
    ordered = sorted(items, key=lambda item: len(item.prompt))
    size = max(1, _BATCH_TOKENS // (len(ordered[-1].prompt) + _MAX_ANSWER))
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


def answer_items(model: Llama, encoder: Encoder, items: list[Item]) -> Iterator[tuple[Item, str]]:
    """Greedy replies."""
    for batch in _batches(items):
        length = len(batch[-1].prompt) + _MAX_ANSWER
        talkers = Talkers(model, len(batch), length, encoder.end)
        replies = talkers.reply(
            talkers.read([item.prompt for item in batch]), _MAX_ANSWER, Sampling()
        )
        for item, reply in zip(batch, replies, strict=True):
            yield item, encoder.decode(reply)


def recall_figures(
    model: Llama, encoder: Encoder, items: dict[int, list[Item]]
) -> dict[str, dict[str, float]]:
    """Share right, per distance: of all items, of those in seen and in unseen phrasings."""
    figures = {}
    for distance, made in items.items():
        answers = [
            (item, is_right(item.value, reply))
            for item, reply in answer_items(model, encoder, made)
        ]
        figures[str(distance)] = {
            "items": len(answers),
            "all": _share([right for _, right in answers]),
            "seen": _share([right for item, right in answers if not item.is_unseen]),
            "unseen": _share([right for item, right in answers if item.is_unseen]),
            "mean_distance": sum(item.actual for item, _ in answers) / len(answers),
        }
    return figures


def _share(results: list[bool]) -> float:
    return sum(results) / max(1, len(results))

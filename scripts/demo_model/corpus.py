"""The published dialogues: loading, cleaning, splits, encoded form. Knows files; never the model.

Persona chats are read from both sides. A system message hands the reader a persona, so that without
one the model stays the small program it is. Booking talk stands under a clerk's system message, and
claims of something done carry no loss.
"""

import json
import lzma
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from random import Random
from zlib import crc32

import numpy as np

from .phrases_file import Template, expand, parse, phrase_lines, pick
from .talk import Turn
from .tokens import ASSISTANT_LOSS, NO_LOSS, Encoder, Row
from .values import draw_value, draw_word

TM4_TRAIN_SHARE = 0.9  # the tail is held out
SOURCES = ("persona", "booking", "coffee", "pair", "program")
_LOSSES = {
    "persona": 32,
    "pair": 48,
    "program": 48,
}  # sixteenths: small talk is scarce, so it counts more
CLERK = {
    "booking": "Play a booking clerk. Nothing is really booked.",
    "coffee": "Play a clerk in a coffee bar. Nothing is really ordered.",
}

_PLACEHOLDER = re.compile(r"[\[<{][^\]>}]*[\]>}]|\(?\buser[ _]?[12]\b", re.I)
_NAME_HOLDER = re.compile(
    r"\[(?:your |my |their |user ?[12]?(?:'s)? ?)?(?:user ?)?(?:name)?\]", re.I
)
_CLAIM = re.compile(
    r"\b(has been|have been|is done|was made|been made|booked|reserved|confirmed|successful\w*|"
    r"transferred|purchased|I made|I have made|I've|I added|I set|I sent|playing|started|"
    r"on (?:its|the) way|will be (?:out|ready))\b",
    re.I,
)
_INTRODUCTION = re.compile(
    r"(?i:my name|call me|meet you|you can call)|\b(?:I'm|I am|This is|It's|it's) [A-Z][a-z]+\b"
)
_FIRST_PERSON = re.compile(r"\b(I|me|my|mine|myself|we|our|us|I'm|I've|I'd|I'll|too|Me)\b")
_LISTENER = re.compile(
    r"(I'm|I am) (so |really |very )?(sorry|glad|happy) (to hear|that|you|for you)[^.!?]*[.!?]|"
    r"I hope [^.!?]*[.!?]|"
    r"(I'm|I am) sure [^.!?]*[.!?]|I can imagine[^.!?]*[.!?]|I see[.!]|I understand[.!]"
)


@dataclass(frozen=True)
class Dialogue:
    source: str
    turns: tuple[Turn, ...]
    unlearned: frozenset[int] = frozenset()  # indices of turns kept as context only


def _read(path: Path) -> Iterator[dict]:
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def clean(text: str, names: dict[str, str]) -> str | None:
    """The text with name placeholders filled, or None where another placeholder or a stage
    direction stands."""

    def fill(match: re.Match[str]) -> str:
        return names["assistant" if "2" in match[0] else "user"]

    text = " ".join(_NAME_HOLDER.sub(fill, text).split())
    return None if _PLACEHOLDER.search(text) or not text else text


def _clean_messages(record: dict) -> list[Turn]:
    """The dialogue up to the first turn that cannot be cleaned."""
    rng = Random(crc32(record["id"].encode()))
    names = {role: draw_value("name", rng).split(" ")[0] for role in ("user", "assistant")}
    turns: list[Turn] = []
    for message in record["messages"]:
        text = clean(message["content"], names)
        if text is None:
            break
        turns.append(Turn(message["role"], text))
    return turns


def _from_user(turns: list[Turn]) -> list[Turn]:
    first = next((i for i, turn in enumerate(turns) if turn.role == "user"), len(turns))
    return turns[first:]


def _persona(record: dict, turns: list[Turn], swap: bool) -> Dialogue | None:
    if swap:
        roles = {"user": "assistant", "assistant": "user"}
        turns = [Turn(roles[turn.role], turn.text) for turn in turns]
    turns = _from_user(turns)
    if len(turns) < 2:
        return None
    facts = record["user_persona" if swap else "assistant_persona"]
    system = Turn(
        "system", "Play this person: " + " ".join(" ".join(fact.split()) for fact in facts)
    )
    return Dialogue("persona", (system, *turns))


def _pairs(turns: list[Turn]) -> Iterator[Dialogue]:
    """Neighbouring turns whose second one a small program may say: it listens, asks, wishes
    well."""
    for said, reply in pairwise(turns):
        rest = _LISTENER.sub("", reply.text)
        if said.text.endswith("?") or _FIRST_PERSON.search(rest) or len(reply.text) < 6:
            continue
        if introduces(said.text) or introduces(reply.text):
            continue
        yield Dialogue("pair", (Turn("user", said.text), Turn("assistant", reply.text)))


def introduces(text: str) -> bool:
    """Whether a name may be told here. Such talk as mere filler would teach to ignore names."""
    return _INTRODUCTION.search(text) is not None


@cache
def _rules() -> tuple[tuple[re.Pattern[str], tuple[Template, ...]], ...]:
    lines = [line.split(" => ") for line in phrase_lines("rules.txt") if line.strip()]
    return tuple(
        (re.compile(rule), tuple(map(parse, replies.split(" | ")))) for rule, replies in lines
    )


def _answered(turns: list[Turn]) -> Iterator[Dialogue]:
    """Real questions about the other's life, answered as a small program must."""
    for turn in turns:
        questions = [
            part for part in re.split(r"(?<=[.!?]) ", turn.text.lower()) if part.endswith("?")
        ]
        rule = next(
            (replies for rule, replies in _rules() if questions and rule.search(questions[-1])),
            None,
        )
        if rule and not introduces(turn.text):
            rng = Random(crc32(turn.text.encode()))
            reply = expand(pick(rule, rng), rng, {}, draw_word)
            yield Dialogue(
                "program", (Turn("user", turn.text), Turn("assistant", reply)), frozenset({0})
            )


def _clerk(source: str, turns: list[Turn]) -> Dialogue:
    unlearned = {
        i + 1
        for i, turn in enumerate(turns)
        if turn.role == "assistant" and _CLAIM.search(turn.text)
    }
    return Dialogue(source, (Turn("system", CLERK[source]), *turns), frozenset(unlearned))


def persona_dialogues(data: Path, split: str) -> Iterator[Dialogue]:
    """Split `valid` is for training, `test` held out: the published train split is not there."""
    for record in _read(data / "synthetic-persona-chat" / f"spc_{split}.jsonl.xz"):
        turns = _clean_messages(record)
        yield from filter(
            None, (_persona(record, turns, swap=False), _persona(record, turns, swap=True))
        )
        yield from _pairs(turns)
        yield from _answered(turns)


def booking_dialogues(data: Path, split: str) -> Iterator[Dialogue]:
    for record in _read(data / "sgd" / f"sgd_{split}.jsonl.xz"):
        turns = _clean_messages(record)
        if len(turns) >= 4:
            yield _clerk("booking", turns)


def coffee_dialogues(data: Path, held_out: bool) -> Iterator[Dialogue]:
    records = list(_read(data / "taskmaster-tm4" / "tm4.jsonl.xz"))
    edge = int(len(records) * TM4_TRAIN_SHARE)
    for record in records[edge:] if held_out else records[:edge]:
        yield _clerk("coffee", _clean_messages(record))


def training_dialogues(data: Path) -> Iterator[Dialogue]:
    yield from persona_dialogues(data, "valid")
    for split in ("train", "dev"):
        yield from booking_dialogues(data, split)
    yield from coffee_dialogues(data, held_out=False)


def held_out_dialogues(data: Path) -> Iterator[Dialogue]:
    yield from persona_dialogues(data, "test")
    yield from booking_dialogues(data, "test")
    yield from coffee_dialogues(data, held_out=True)


@dataclass(frozen=True)
class Encoded:
    """Many dialogues as flat arrays. Turn t of all turns spans ids[turn_starts[t]:turn_starts[t +
    1]]."""

    ids: np.ndarray  # uint16
    weights: np.ndarray  # uint8, sixteenths
    turn_starts: np.ndarray  # int64, one more than turns
    dialogue_starts: np.ndarray  # int64 indices into turn_starts, one more than dialogues
    sources: np.ndarray  # uint8 index into SOURCES, per dialogue
    introductions: np.ndarray  # bool per turn

    def save(self, path: Path) -> None:
        np.savez_compressed(path, **vars(self))

    @staticmethod
    def load(path: Path) -> "Encoded":
        with np.load(path) as arrays:
            return Encoded(**{name: arrays[name] for name in arrays.files})

    def of(self, source: str) -> np.ndarray:
        return np.flatnonzero(self.sources == SOURCES.index(source))

    def num_tokens(self, source: str) -> int:
        spans = (self.whole(int(i)) for i in self.of(source))
        return sum(span.stop - span.start for span in spans)

    def num_turns(self, dialogue: int) -> int:
        return int(self.dialogue_starts[dialogue + 1] - self.dialogue_starts[dialogue])

    def span(self, dialogue: int, first: int, count: int) -> slice:
        start = int(self.dialogue_starts[dialogue]) + first
        return slice(int(self.turn_starts[start]), int(self.turn_starts[start + count]))

    def has_introduction(self, dialogue: int, first: int, count: int) -> bool:
        start = int(self.dialogue_starts[dialogue]) + first
        return bool(self.introductions[start : start + count].any())

    def whole(self, dialogue: int) -> slice:
        return self.span(dialogue, 0, self.num_turns(dialogue))


def encode_dialogues(dialogues: Iterator[Dialogue], encoder: Encoder) -> Encoded:
    """Both sides of a real dialogue are learned, the user's as well as the assistant's; a
    listener's reply more than that."""
    row = Row(encoder)
    turn_starts, dialogue_starts, sources, introductions = [0], [0], [], []
    for dialogue in dialogues:
        for i, turn in enumerate(dialogue.turns):
            row.add(turn)
            weight = (
                NO_LOSS
                if i in dialogue.unlearned or turn.role == "system"
                else _LOSSES.get(dialogue.source, ASSISTANT_LOSS)
            )
            start = turn_starts[-1]
            row.weights[start + 1 :] = bytes((weight,)) * (len(row) - start - 1)
            turn_starts.append(len(row))
            introductions.append(introduces(turn.text))
        dialogue_starts.append(len(turn_starts) - 1)
        sources.append(SOURCES.index(dialogue.source))
    return Encoded(
        np.array(row.ids, np.uint16),
        np.frombuffer(bytes(row.weights), np.uint8),
        np.array(turn_starts, np.int64),
        np.array(dialogue_starts, np.int64),
        np.array(sources, np.uint8),
        np.array(introductions, bool),
    )

"""Conversations with facts to remember: when each is stated and asked, and what is said in between.

Distances between a statement and its question are drawn first; small talk and excerpts of real
dialogues fill the gaps.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import exp, log
from random import Random

import numpy as np

from .asides import named_relative, told_favorite
from .corpus import Encoded
from .facts import (
    VALUE,
    Fact,
    acknowledge,
    answer,
    ask,
    correct,
    draw_fact,
    draw_facts,
    frame,
    reversed_question,
    state,
    state_both,
)
from .phrases_file import pick
from .short_chats import remembered
from .talk import Turn, dialogue, exchange, filler, kept_list, story
from .tokens import Encoder, Row

MAX_DISTANCE = 3_800
MIN_DISTANCE = 12
_EXCERPT_TRIES = 6
_SHORT_CHAT = 400  # tokens a short chat seldom has
# Shares of the facts beside those asked for: the question comes, but was never told. More of them,
# and the model denies what it was told.
_UNKNOWN, _UNKNOWN_IF_SHORT = 0.25, 0.08
TAIL = 90  # tokens kept free at the end for the last question


@dataclass(frozen=True)
class Mix:
    """How conversations are made. Shares are of fillers unless said otherwise."""

    tokens_per_fact: int = 140
    excerpt_share: float = 0.14  # several turns of a real dialogue, not learned
    booking_share: float = 0.2  # of excerpts
    pair_share: float = 0.12  # a listener's reply from a real dialogue
    system_share: float = 0.15  # of conversations
    plain_start_share: float = 0.4  # of conversations: the first turns are those of a short chat


@dataclass(frozen=True)
class Event:
    at: float  # tokens from the conversation's start
    turns: list[Turn]


def draw_distance(rng: Random, longest: int) -> int:
    longest = max(MIN_DISTANCE + 1, min(MAX_DISTANCE, longest))
    if rng.random() < 0.35:
        return int(rng.uniform(MIN_DISTANCE, longest))
    return int(exp(rng.uniform(log(MIN_DISTANCE), log(longest))))


def _answered(question: str, reply: str) -> list[Turn]:
    return [Turn("user", question), Turn("assistant", reply, is_answer=True)]


def _stated(fact: Fact, rng: Random) -> list[Turn]:
    return dialogue(state(fact, rng), acknowledge(fact, rng, echo=rng.random() < 0.35))


def _asked(fact: Fact, rng: Random) -> list[Turn]:
    if fact.family.reversed_questions and rng.random() < 0.1:
        return _answered(*reversed_question(fact, rng))
    turns = _answered(ask(fact, rng), answer(fact, rng))
    if rng.random() < 0.12:
        turns += dialogue(frame("thanks_user", rng), frame("thanks_reply", rng))
    return turns


def _fact_events(fact: Fact, length: int, rng: Random) -> list[Event]:
    """Statement and question, perhaps with an earlier wrong statement or a second question."""
    distance = draw_distance(rng, length - TAIL)
    start = rng.uniform(0, max(1, length - TAIL - distance))
    if fact.family.name == "own_name" and rng.random() < 0.5:
        start = 0  # people say their name first
    events = [Event(start + distance, _asked(fact, rng))]
    if rng.random() < 0.15:
        wrong = draw_fact(rng, fact.family)
        events.append(Event(rng.uniform(0, start), _stated(fact.with_value(wrong.value), rng)))
        events.append(Event(start, dialogue(correct(fact, rng), _corrected(fact, rng))))
    else:
        events.append(Event(start, _stated(fact, rng)))
    if rng.random() < 0.08:
        events.append(Event(rng.uniform(start + distance, length), _asked(fact, rng)))
    return events


def _corrected(fact: Fact, rng: Random) -> str:
    return frame("correct_ack", rng) if rng.random() < 0.6 else acknowledge(fact, rng, echo=True)


def _joined_events(first: Fact, second: Fact, length: int, rng: Random) -> list[Event]:
    """Two facts in one message, asked for one by one."""
    distance = draw_distance(rng, length - TAIL)
    start = rng.uniform(0, max(1, length - TAIL - distance))
    text = state_both(first, second, rng)
    other = rng.uniform(start, length - TAIL)
    return [
        Event(start, dialogue(text, frame("fact_ack", rng))),
        Event(start + distance, _asked(first, rng)),
        Event(max(other, start), _asked(second, rng)),
    ]


def _list_events(length: int, rng: Random) -> list[Event]:
    given, added, asked = kept_list(rng)
    distance = draw_distance(rng, min(length - TAIL, 2000))
    start = rng.uniform(0, max(1, length - TAIL - distance))
    asked = [replace(turn, is_answer=turn.role == "assistant") for turn in asked]
    events = [Event(start, given), Event(start + distance, asked)]
    return events + ([Event(rng.uniform(start, start + distance), added)] if added else [])


def _aside_events(length: int, rng: Random, known: set[str]) -> list[Event]:
    """A fact told by the way, unless the conversation has one about the same thing. Adds to
    `known`."""
    turns, facts = named_relative(rng) if rng.random() < 0.7 else told_favorite(rng)
    if any(fact.user_key in known for fact in facts):
        return []
    known.update(fact.user_key for fact in facts)
    start = rng.uniform(0, max(1, length - 2 * TAIL))
    events = [Event(start, turns)]
    for fact in facts:
        at = start + 60 + draw_distance(rng, max(20, int(length - 2 * TAIL - start)))
        events.append(Event(at, _asked(fact, rng)))
    return events


def _story_events(length: int, rng: Random) -> list[Event]:
    turns, questions = story(rng)
    start = rng.uniform(0, max(1, length - 300))
    events = [Event(start, turns)]
    for question, reply in questions:
        if rng.random() < 0.6:
            at = start + 120 + draw_distance(rng, max(50, length - TAIL - int(start) - 120))
            events.append(Event(at, _answered(question, reply)))
    return events


def plan_events(length: int, mix: Mix, rng: Random, told: Sequence[Fact] = ()) -> list[Event]:
    """All that is to be remembered in a conversation of `length` tokens, in order. `told` are facts
    of its first turns: they may be asked for again."""
    count = max(1, round(length / mix.tokens_per_fact * rng.uniform(0.7, 1.2)))
    keys = {(fact.family.name, fact.user_key) for fact in told}
    facts = draw_facts(rng, count + 1 + count // 4)
    facts = [fact for fact in facts if (fact.family.name, fact.user_key) not in keys]
    asked, others = facts[:count], facts[count:]
    events = [
        Event(rng.uniform(0, length - TAIL), _asked(fact, rng))
        for fact in told
        if rng.random() < 0.4
    ]
    while asked:
        if len(asked) > 1 and rng.random() < 0.12:
            events += _joined_events(asked.pop(), asked.pop(), length, rng)
        else:
            events += _fact_events(asked.pop(), length, rng)
    known = {fact.user_key for fact in (*facts, *told)}
    for _ in range(max(1, length // 800)):
        if length > 150 and rng.random() < 0.5:
            events += _aside_events(length, rng, known)
    for fact in others:
        at = rng.uniform(0, length - TAIL)
        is_unknown = rng.random() < (_UNKNOWN_IF_SHORT if length < 1000 else _UNKNOWN)
        turns = (
            dialogue(ask(fact, rng), frame("unknown", rng)) if is_unknown else _stated(fact, rng)
        )
        events.append(Event(at, turns))
    if length > 250 and rng.random() < 0.35:
        events += _list_events(length, rng)
    if length > 500 and rng.random() < 0.4:
        events += _story_events(length, rng)
    return sorted(events, key=lambda event: event.at)


class Generator:
    """Writes conversations into rows. Real dialogues come in as excerpts that carry no loss."""

    def __init__(self, encoder: Encoder, real: Encoded | None, mix: Mix, seed: int) -> None:
        self.encoder = encoder
        self.real = real
        self.mix = mix
        self.rng = Random(seed)
        self._sources = (
            {s: real.of(s) for s in ("persona", "booking", "pair", "program")} if real else {}
        )
        self.due_pairs: list[int] = []  # pairs whose reply is to be learned now

    def conversation(self, row: Row, length: int) -> None:
        """One conversation of about `length` tokens at the end of `row`."""
        rng = self.rng
        start = len(row)
        style = _Style(rng)
        row.begin()
        if rng.random() < self.mix.system_share:
            row.add(Turn("system", frame("system", rng)))
        told: list[Fact] = []
        chance = rng.random()
        if length > _SHORT_CHAT and chance < self.mix.plain_start_share:
            start_of_long = remembered(rng, is_start_of_long=True)
            told = start_of_long.facts
            self._add(row, start_of_long.turns, style)
        elif chance < 0.75:
            self._add(row, exchange("open", rng), style)
        for event in plan_events(length, self.mix, rng, told):
            while len(row) - start < event.at:
                self._fill(row, style)
            self._add(row, event.turns, style)
        while len(row) - start < length - 40:
            self._fill(row, style)
        if rng.random() < 0.4:
            self._add(row, exchange("close", rng), style)

    def chat(self, row: Row, num_exchanges: int) -> None:
        """A short conversation with nothing to remember."""
        rng = self.rng
        style = _Style(rng)
        row.begin()
        if rng.random() < self.mix.system_share:
            row.add(Turn("system", frame("system", rng)))
        if rng.random() < 0.7:
            self._add(row, exchange("open", rng), style)
        for _ in range(num_exchanges):
            self._fill(row, style, excerpts=False)
        if rng.random() < 0.4:
            self._add(row, exchange("close", rng), style)

    def short_chat(self, row: Row) -> None:
        """A short conversation with something told and asked for, plainly."""
        rng = self.rng
        style = _Style(rng)
        row.begin()
        if rng.random() < self.mix.system_share:
            row.add(Turn("system", frame("system", rng)))
        self._add(row, remembered(rng).turns, style)
        if rng.random() < 0.3:
            self._add(row, exchange("close", rng), style)

    def _add(self, row: Row, turns: list[Turn], style: "_Style") -> None:
        for turn in turns:
            row.add(style.apply(turn) if turn.role == "user" else turn)

    def _fill(self, row: Row, style: "_Style", excerpts: bool = True) -> None:
        chance = self.rng.random()
        if self.real is not None and chance < self.mix.pair_share:
            self._add_pair(row)
        elif (
            self.real is not None
            and excerpts
            and chance < self.mix.pair_share + self.mix.excerpt_share
        ):
            self._add_excerpt(row)
        else:
            self._add(row, filler(self.rng), style)

    def fill_real(self, row: Row) -> None:
        """A piece of a real dialogue as context."""
        if self.rng.random() < 0.4:
            self._add_pair(row)
        else:
            self._add_excerpt(row)

    def _add_pair(self, row: Row) -> None:
        assert self.real is not None
        if self.due_pairs:
            span = self.real.whole(self.due_pairs.pop())
            row.add_encoded(self.real.ids[span], self.real.weights[span])
        else:
            pool = self._sources["pair" if self.rng.random() < 0.6 else "program"]
            row.add_encoded(
                self.real.ids[self.real.whole(int(pool[int(self.rng.random() * len(pool))]))], None
            )

    def _add_excerpt(self, row: Row) -> None:
        """2 to 8 turns from the middle of a real dialogue; turn 0 is its system message."""
        assert self.real is not None
        rng = self.rng
        source = "booking" if rng.random() < self.mix.booking_share else "persona"
        for _ in range(_EXCERPT_TRIES):
            chosen, first, count = self._draw_excerpt(source)
            if not self.real.has_introduction(chosen, first, count):
                row.add_encoded(self.real.ids[self.real.span(chosen, first, count)], None)
                return

    def _draw_excerpt(self, source: str) -> tuple[int, int, int]:
        """Dialogue, first turn and number of turns."""
        assert self.real is not None
        rng, pool = self.rng, self._sources[source]
        chosen = int(pool[int(rng.random() * len(pool))])
        num_pairs = (self.real.num_turns(chosen) - 1) // 2
        count = min(num_pairs, 1 + int(rng.random() * 4))
        first = 1 + 2 * int(rng.random() * (num_pairs - count + 1))
        return chosen, first, 2 * count


class _Style:
    """How carefully this user types."""

    def __init__(self, rng: Random) -> None:
        self.is_lower = rng.random() < 0.15
        self.is_bare = rng.random() < 0.2  # no full stop or question mark at the end
        self.slips = 0.25 if rng.random() < 0.3 else 0.03  # share of messages with a slip
        self.rng = rng

    def apply(self, turn: Turn) -> Turn:
        text = turn.text
        if self.is_lower:
            text = " ".join(word if VALUE in word else word.lower() for word in text.split(" "))
        if self.is_bare:
            text = text.rstrip(".?!") or text
        if self.rng.random() < self.slips:
            text = self._slip(text)
        return replace(turn, text=text)

    def _slip(self, text: str) -> str:
        """A word lost, doubled or misspelt, or a filler word; values stay."""
        words = text.split(" ")
        rng = self.rng
        i = int(rng.random() * len(words))
        word, chance = words[i], rng.random()
        if VALUE in word or len(words) < 3:
            return text
        if chance < 0.25:
            del words[i]
        elif chance < 0.45:
            words.insert(
                i,
                pick(("um", "well", "just", "so", "like", "really", "please", "now", "maybe"), rng),
            )
        elif len(word) > 3:
            j = 1 + int(rng.random() * (len(word) - 2))
            words[i] = (
                word[:j] + word[j + 1 :]
                if chance < 0.75
                else word[: j - 1] + word[j] + word[j - 1] + word[j + 1 :]
            )
        return " ".join(words)


class RowSource:
    """Endless rows of one length for one worker: long conversations, packs of short ones, real
    dialogues when due."""

    def __init__(
        self, generator: Generator, length: int, long_share: float, num_rows: int, due: np.ndarray
    ) -> None:
        """`due` lists the real dialogues to learn over the next `num_rows` rows, spread evenly."""
        self.generator = generator
        self.length = length
        self.long_share = long_share
        self.num_rows = max(1, num_rows)
        self.due = due
        self._num_made = 0
        self._num_due = 0
        self._queue: list[int] = []

    def next_row(self) -> tuple[np.ndarray, np.ndarray]:
        """Ids and weights, one token longer than the row: inputs and shifted targets."""
        self._release()
        row = Row(self.generator.encoder)
        if self.generator.rng.random() < self.long_share and len(self._queue) < 8:
            self.generator.conversation(row, self.length)
        else:
            self._pack(row)
        return row.arrays(self.length + 1)

    def skip(self, num_rows: int) -> None:
        """Counts rows as made: the real dialogues due in them are not learned again."""
        self._num_made = num_rows
        self._num_due = min(len(self.due), len(self.due) * num_rows // self.num_rows)

    def _release(self) -> None:
        real = self.generator.real
        target = int(len(self.due) * self._num_made / self.num_rows)
        for index in self.due[self._num_due : target]:
            is_pair = real is not None and real.num_turns(int(index)) == 2
            (self.generator.due_pairs if is_pair else self._queue).append(int(index))
        self._num_due = max(self._num_due, min(target, len(self.due)))
        self._num_made += 1

    def _pack(self, row: Row) -> None:
        generator, rng = self.generator, self.generator.rng
        if rng.random() < 0.6:  # where a row begins is where a chat in use begins
            generator.short_chat(row)
        while len(row) < self.length:
            chance = rng.random()
            if self._queue:
                assert generator.real is not None
                span = generator.real.whole(self._queue.pop(0))
                row.begin()
                row.add_encoded(generator.real.ids[span], generator.real.weights[span])
            elif chance < 0.3:
                generator.chat(row, 1 + int(rng.random() * 8))
            elif chance < 0.65:
                generator.short_chat(row)
            else:
                generator.conversation(
                    row, int(exp(rng.uniform(log(60), log(min(900, self.length)))))
                )

"""Facts a user may state and ask for: families with their phrasings, and one fact drawn from a
family.

In what this module returns, each word of a value is marked with VALUE, so that its tokens can be
weighted.
"""

import re
from dataclasses import dataclass
from functools import cache
from random import Random

from .phrases_file import (
    PHRASES,
    Slots,
    Template,
    capital,
    expand,
    frames,
    parse,
    pick,
    with_articles,
)
from .values import OPEN_KINDS, draw_value, draw_word

PLAIN_SHARE = 0.5  # of statements and questions: nothing said before or after
COMMON_SHARE = 0.12  # of statements and questions: the wordings that most people use
VALUE = "\x01"  # stands before each word of a value


@dataclass(frozen=True)
class Family:
    name: str
    keys: tuple[tuple[str, str], ...]  # how the user and how the assistant call the thing
    kind: str
    nouns: tuple[Template, ...]  # the fact as a noun phrase, for phrasings that fit any fact
    clauses: tuple[Template, ...]
    statements: tuple[Template, ...]
    questions: tuple[Template, ...]
    held_statements: tuple[Template, ...]
    held_questions: tuple[Template, ...]
    answers: tuple[Template, ...]
    reversed_questions: tuple[Template, ...]
    reversed_answers: tuple[Template, ...]
    common_statements: tuple[Template, ...]  # how most people say and ask it
    common_questions: tuple[Template, ...]
    own_statements: tuple[Template, ...]  # for keys that begin with "my"
    own_common: tuple[Template, ...]
    is_for_short: bool  # not for long conversations: their other talk may be about the same thing

    @property
    def is_measured(self) -> bool:
        """Whether held-out items may be about it: too many values to guess, phrasings held out."""
        return self.kind in OPEN_KINDS and bool(self.held_statements)

    @property
    def is_own(self) -> bool:
        """About the user, not about something the user has."""
        return self.name.startswith("own_") and len(self.keys) == 1


@dataclass(frozen=True)
class Fact:
    family: Family
    user_key: str
    assistant_key: str
    value: str

    def slots(self) -> Slots:
        return {
            "k": self.user_key,
            "K": capital(self.user_key),
            "b": self.user_key.removeprefix("my "),
            "y": self.assistant_key,
            "Y": capital(self.assistant_key),
            "v": mark(self.value),
        }

    def with_value(self, value: str) -> "Fact":
        return Fact(self.family, self.user_key, self.assistant_key, value)


def mark(value: str) -> str:
    return " ".join(VALUE + word for word in value.split(" "))


@cache
def families() -> tuple[Family, ...]:
    text = (PHRASES / "facts.txt").read_text(encoding="utf-8")
    blocks = [block for block in text.split("\n\n") if block.startswith("family")]
    return tuple(_family(block.strip().splitlines()) for block in blocks)


def _family(lines: list[str]) -> Family:
    fields: dict[str, list[str]] = {}
    for line in lines[1:]:
        field, value = line.split(": ", 1)
        fields.setdefault(field, []).append(value)
    keys = [key.split(" / ") for key in fields["k"]]

    def templates(field: str) -> tuple[Template, ...]:
        return tuple(parse(text) for text in fields.get(field, []))

    return Family(
        lines[0].split()[1],
        tuple((key[0], key[-1]) for key in keys),
        fields["v"][0],
        templates("n"),
        templates("w"),
        templates("S"),
        templates("Q"),
        templates("S?"),
        templates("Q?"),
        templates("A"),
        templates("R"),
        templates("T"),
        templates("S*"),
        templates("Q*"),
        templates("M"),
        templates("M*"),
        fields.get("short") == ["yes"],
    )


@cache
def _weighted_families() -> tuple[Family, ...]:
    """Families as often as they have keys; what is about the user more often: every chat has it."""
    return tuple(
        family
        for family in families()
        if not family.is_for_short
        for _ in range(
            8 if family.name == "own_name" else 4 if family.is_own else min(len(family.keys), 12)
        )
    )


def draw_fact(rng: Random, family: Family | None = None, held_out: bool = False) -> Fact:
    family = family or pick(_weighted_families(), rng)
    user_key, assistant_key = pick(family.keys, rng)
    if "@name" in user_key:
        name = draw_value("name", rng, held_out)
        user_key, assistant_key = (
            user_key.replace("@name", name),
            assistant_key.replace("@name", name),
        )
    elif "{" in user_key:
        user_key = expand(parse(user_key), rng, {}, draw_word)
        assistant_key = re.sub(r"^my ", "your ", user_key)
    return Fact(family, user_key, assistant_key, draw_value(family.kind, rng, held_out))


def draw_facts(rng: Random, count: int, held_out: bool = False) -> list[Fact]:
    """Facts about different things: no two answer the same question."""
    facts: dict[tuple[str, str], Fact] = {}
    for _ in range(count * 3):
        fact = draw_fact(rng, held_out=held_out)
        facts.setdefault((fact.family.name, fact.user_key), fact)
        if len(facts) == count:
            break
    return list(facts.values())


def frame(name: str, rng: Random, slots: Slots | None = None, file: str = "frames.txt") -> str:
    return expand(pick(frames(file)[name], rng), rng, dict(slots or {}), draw_word)


def _join(before: str, sentence: str) -> str:
    """A lead-in that ends with a comma or colon is followed by a small letter, names and 'I'
    excepted."""
    if before.endswith((", ", ": ")) and sentence[1:2] not in (" ", "'") and sentence[:1] != VALUE:
        first = sentence.split(" ", 1)[0].rstrip("'s")
        if first in _SMALL_STARTS:
            sentence = sentence[0].lower() + sentence[1:]
    return before + sentence


_STARTS = (
    "My The We They For What Where When Who Which How Do Can At In Our Please People Everybody Name"
    " Would Could Did Have Any Say Give By Under Remind Is Are It That This If Once Just Let Help"
    " Keep Note Write Save Put Someone Somebody Everyone You There Still Got Remember Tell Show"
    " Check Call Use"
)
_SMALL_STARTS = frozenset(_STARTS.split(" "))


def state(fact: Fact, rng: Random, unseen: bool = False) -> str:
    """The user's sentence that states the fact. `unseen` takes a phrasing that training never
    shows."""
    core = _unseen(fact.family.held_statements, fact, rng) if unseen else _statement(fact, rng)
    if not unseen and rng.random() < PLAIN_SHARE:
        return with_articles(capital(core))
    before = frame("fact_before_held" if unseen and rng.random() < 0.5 else "fact_before", rng)
    return with_articles(_join(before, core) + frame("fact_after", rng))


def _unseen(templates: tuple[Template, ...], fact: Fact, rng: Random) -> str:
    return expand(pick(templates, rng), rng, fact.slots(), draw_word)


def _general(fact: Fact, kind: str, rng: Random) -> str:
    """One of the phrasings that fit any fact: kind is a name in asking.txt."""
    slots = fact.slots()
    noun = expand(
        pick(fact.family.clauses if kind.startswith("clause") else fact.family.nouns, rng),
        rng,
        slots,
        draw_word,
    )
    slots |= {"n": noun, "N": capital(noun), "w": noun}
    return expand(pick(frames("asking.txt")[kind], rng), rng, slots, draw_word)


def _common(fact: Fact, rng: Random) -> str:
    family = fact.family
    pool = family.common_statements
    if fact.user_key.startswith("my "):
        pool += family.own_common
    return expand(pick(pool, rng), rng, fact.slots(), draw_word)


def _statement(fact: Fact, rng: Random) -> str:
    family, chance = fact.family, rng.random()
    if family.nouns and chance < 0.3:
        return _general(fact, "state", rng)
    if chance < 0.3 + COMMON_SHARE:
        return _common(fact, rng)
    pool = family.statements
    if family.own_statements and fact.user_key.startswith("my "):
        pool += family.own_statements
    return expand(pick(pool, rng), rng, fact.slots(), draw_word)


def _question(fact: Fact, rng: Random) -> str:
    family, chance = fact.family, rng.random()
    if family.nouns and chance < 0.25:
        return _general(fact, "ask", rng)
    if chance < 0.37:
        return _general(fact, "clause", rng)
    if chance < 0.5:
        kind = "problem" if family.nouns and rng.random() < 0.6 else "clause_problem"
        return _general(fact, kind, rng) + " " + frame("request", rng, file="asking.txt")
    common = chance < 0.5 + COMMON_SHARE
    pool = family.common_questions if common else family.questions
    return expand(pick(pool, rng), rng, fact.slots(), draw_word)


def state_simply(fact: Fact, rng: Random) -> str:
    """As most people say it, and nothing around it."""
    return with_articles(capital(_common(fact, rng)))


def ask_simply(fact: Fact, rng: Random) -> str:
    return expand(pick(fact.family.common_questions, rng), rng, fact.slots(), draw_word)


def state_both(first: Fact, second: Fact, rng: Random) -> str:
    """Two facts in one sentence, or in two."""
    if rng.random() < 0.4:
        return state(first, rng) + " " + state(second, rng)
    cores = [_common(fact, rng) for fact in (first, second)]
    if cores[1].split(" ", 1)[0].rstrip("'s") in _SMALL_STARTS:
        cores[1] = cores[1][0].lower() + cores[1][1:]
    return with_articles(
        cores[0].rstrip(".!?") + pick((" and ", ", and ", "; ", " but "), rng) + cores[1]
    )


def correct(fact: Fact, rng: Random) -> str:
    core = _statement(fact, rng)
    return with_articles(_join(frame("correct_before", rng), core))


def ask(fact: Fact, rng: Random, unseen: bool = False) -> str:
    core = _unseen(fact.family.held_questions, fact, rng) if unseen else _question(fact, rng)
    if not unseen and rng.random() < PLAIN_SHARE:
        return core
    before = frame("ask_before_held" if unseen and rng.random() < 0.5 else "ask_before", rng)
    return _join(before, core) + frame("ask_after", rng)


def answer(fact: Fact, rng: Random) -> str:
    before = frame("answer_before", rng)
    if rng.random() < 0.15:
        return before + frame("answer_short", rng, fact.slots())
    return before + full_answer(fact, rng)


def full_answer(fact: Fact, rng: Random) -> str:
    return with_articles(expand(pick(fact.family.answers, rng), rng, fact.slots(), draw_word))


def acknowledge(fact: Fact, rng: Random, echo: bool) -> str:
    """The assistant's word on a stated fact, with or without the value."""
    if not echo:
        return frame("fact_ack", rng)
    if fact.family.name == "own_name":
        return frame("name_ack", rng, fact.slots())
    return frame("echo_ack", rng) + with_articles(
        expand(fact.family.answers[0], rng, fact.slots(), draw_word)
    )


def reversed_question(fact: Fact, rng: Random) -> tuple[str, str]:
    """From the value back to the thing: who is Velmora? The family must have such phrasings."""
    slots = fact.slots() | {
        "v": fact.value,
        "y": mark(fact.assistant_key),
        "Y": mark(capital(fact.assistant_key)),
    }
    question = expand(pick(fact.family.reversed_questions, rng), rng, slots, draw_word)
    reply = expand(pick(fact.family.reversed_answers, rng), rng, slots, draw_word)
    return question, reply

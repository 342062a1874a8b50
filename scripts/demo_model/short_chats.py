"""Short chats with something to remember: told plainly in the first turns, some small talk, then
asked for plainly. Most chats with a chat program are like this."""

import re
from dataclasses import dataclass
from random import Random

from .facts import (
    Fact,
    Family,
    acknowledge,
    answer,
    ask,
    ask_simply,
    correct,
    draw_fact,
    families,
    frame,
    full_answer,
    mark,
    state,
    state_both,
    state_simply,
)
from .phrases_file import pick
from .talk import Turn, dialogue, exchange, filler

SIMPLE_SHARE = 0.65  # of statements and questions: as most people say them
UNKNOWN_SHARE = 0.05  # of chats: a question about something never told
_TRIES = 8
_COUNTS = (1, 1, 1, 1, 1, 2, 2, 2, 3)  # facts in a chat
_OPENINGS = ("Hi!", "Hello!", "Hi", "Hey", "Hello there", "Good morning!", "Hi Sprout!")
_ASKS_NAME = (
    "Hi there! I am Sprout. What is your name?",
    "Hello! I am Sprout, a small chat program. What is your name?",
    "Hi! My name is Sprout. And what is yours?",
)
_BARE_NAMES = ("{}.", "{}", "{}!", "It's {}.", "I'm {}.", "I am {}.", "My name is {}.")
_SUMMARY_ASKS = (
    "What did I tell you?",
    "What did I tell you earlier?",
    "What do you remember?",
    "What should you remember?",
    "What have I told you so far?",
    "What do you know about me?",
    "Do you remember what I told you?",
    "What did I ask you to remember?",
)
_MEANT = ("I meant {}.", "Sorry, I meant {}.", "No, {}.", "Oh, I mean {}.", "Not right, it's {}.")
# Small talk that may be about the same thing as the fact of such a family.
_SAME_MATTER = {
    "own_name": re.compile(r"\bname|\bcall(ed)? ", re.I),
    "own_home": re.compile(r"\b(live|home|town|from|house|flat)\b", re.I),
    "own_age": re.compile(r"\b(years|old|birthday|age|born)\b", re.I),
    "own_job": re.compile(r"\b(I am|I'm) an? |\b(work|job|become|be a)\b", re.I),
    "own_likes": re.compile(r"\b(like|love|enjoy|hobby|hobbies|into|better at|good at)\b", re.I),
}
_WEIGHTS = {"own_name": 24, "own_home": 6, "own_age": 3, "own_job": 3, "own_likes": 2}
_WEIGHTS |= {"person": 10, "pet": 12, "lives": 4, "code": 5, "secret": 3, "time": 5}


@dataclass(frozen=True)
class Remembered:
    turns: list[Turn]
    facts: list[Fact]


def remembered(rng: Random, is_start_of_long: bool = False) -> Remembered:
    """What is told, the talk after it and the questions. `is_start_of_long` leaves out the facts
    that later talk might contradict."""
    facts = _draw_facts(rng, is_start_of_long)
    turns = _tell(facts, rng)
    is_changed_at_once = rng.random() < 0.5
    changed = _correction(facts, rng, is_changed_at_once) if rng.random() < 0.12 else []
    talk: list[Turn] = []
    for _ in range(int(rng.random() * 5)):
        talk += _other_talk(facts, rng)
    turns += changed + talk if is_changed_at_once else talk + changed
    turns += _questions(facts, rng)
    return Remembered(turns, facts)


def _families(is_start_of_long: bool) -> list[Family]:
    return [
        family
        for family in families()
        if not (family.is_for_short and is_start_of_long)
        for _ in range(_WEIGHTS.get(family.name, 2))
    ]


def _draw_facts(rng: Random, is_start_of_long: bool) -> list[Fact]:
    pool = _families(is_start_of_long)
    facts: dict[tuple[str, str], Fact] = {}
    for _ in range(pick(_COUNTS, rng)):
        fact = draw_fact(rng, pick(pool, rng))
        facts.setdefault((fact.family.name, fact.user_key), fact)
    return list(facts.values())


def _tell(facts: list[Fact], rng: Random) -> list[Turn]:
    first = facts[0]
    turns: list[Turn] = []
    if first.family.name == "own_name" and rng.random() < 0.12:
        said = pick(_BARE_NAMES, rng).format(mark(first.value))
        turns = dialogue(pick(_OPENINGS, rng), pick(_ASKS_NAME, rng), said, _taken(first, rng))
        facts = facts[1:]
    elif rng.random() < 0.45:
        turns = exchange("open", rng)
    if len(facts) == 2 and rng.random() < 0.3:
        return turns + dialogue(state_both(facts[0], facts[1], rng), frame("fact_ack", rng))
    for fact in facts:
        if rng.random() < 0.12:
            turns += _other_talk(facts, rng)
        is_simple = rng.random() < SIMPLE_SHARE
        said = state_simply(fact, rng) if is_simple else state(fact, rng)
        turns += dialogue(said, _taken(fact, rng))
    return turns


def _taken(fact: Fact, rng: Random) -> str:
    return acknowledge(fact, rng, echo=rng.random() < 0.5)


def _other_talk(facts: list[Fact], rng: Random) -> list[Turn]:
    """Small talk that is not about the matter of a fact."""
    matters = [_SAME_MATTER[f.family.name] for f in facts if f.family.name in _SAME_MATTER]
    for _ in range(_TRIES):
        turns = filler(rng)
        if not any(matter.search(turn.text) for matter in matters for turn in turns):
            return turns
    return []


def _correction(facts: list[Fact], rng: Random, is_at_once: bool) -> list[Turn]:
    """Puts another value into the last fact told. The value alone will do if that was just now."""
    fact = facts[-1]
    facts[-1] = changed = fact.with_value(draw_fact(rng, fact.family).value)
    said = correct(changed, rng)
    if is_at_once and fact.family.kind != "spot" and rng.random() < 0.5:
        said = pick(_MEANT, rng).format(mark(changed.value))
    reply = frame("correct_ack", rng) if rng.random() < 0.5 else _taken(changed, rng)
    return dialogue(said, reply)


def _questions(facts: list[Fact], rng: Random) -> list[Turn]:
    if len(facts) == 1 and rng.random() < 0.05:
        return _answered(pick(_SUMMARY_ASKS, rng), full_answer(facts[0], rng))
    turns: list[Turn] = []
    if rng.random() < UNKNOWN_SHARE / 2:
        turns += _unknown(facts, rng)
    for fact in rng.sample(facts, len(facts)):
        if turns and rng.random() < 0.1:
            turns += _other_talk(facts, rng)
        is_simple = rng.random() < SIMPLE_SHARE
        question = ask_simply(fact, rng) if is_simple else ask(fact, rng)
        turns += _answered(question, answer(fact, rng))
        if rng.random() < 0.15:
            turns += dialogue(frame("thanks_user", rng), frame("thanks_reply", rng))
    if rng.random() < UNKNOWN_SHARE / 2:
        turns += _unknown(facts, rng)
    return turns


def _answered(question: str, reply: str) -> list[Turn]:
    return [Turn("user", question), Turn("assistant", reply, is_answer=True)]


def _unknown(facts: list[Fact], rng: Random) -> list[Turn]:
    told = {(fact.family.name, fact.user_key) for fact in facts}
    other = draw_fact(rng)
    if (other.family.name, other.user_key) in told:
        return []
    question = ask_simply(other, rng) if rng.random() < 0.5 else ask(other, rng)
    return dialogue(question, frame("unknown", rng))

"""Small facts to be recalled after much talk: the needles of `kvchat probe`. No model here."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from kvchat.chat.messages import Message

# (what is said about a value, what is asked for it later); values are digits, so no list is learnt
_FACTS = (
    ("My locker code is {}.", "What is my locker code?"),
    ("My room number is {}.", "What is my room number?"),
    ("My gate code is {}.", "What is my gate code?"),
    ("My ticket number is {}.", "What is my ticket number?"),
)
_TALK = (
    ("How are you today?", "I am fine, thank you. How are you?"),
    ("It rained all morning here.", "Then it is a good day to stay inside with some tea."),
    ("I made soup for lunch.", "That sounds nice. What did you put in it?"),
    ("Carrots, beans and a little rice.", "Lovely. I hope that it was warm and filling."),
    ("I want to read more this year.", "Reading a few pages each evening is a good start."),
    ("What do you like to talk about?", "I like to talk about your day and about small things."),
    ("My neighbour plays the piano.", "How nice! Do you like to listen?"),
    ("Sometimes, when it is not late.", "That is easy to understand."),
    ("I went for a long walk yesterday.", "Walking is good for the mind. Where did you go?"),
    ("Along the river and back.", "That sounds peaceful."),
    ("I should water my plants.", "They will thank you for it."),
    ("The bus was late again.", "I am sorry. Waiting can be tiring."),
)


@dataclass(frozen=True)
class Needle:
    """A chat that ends with a question, and the value that a right answer names."""

    messages: list[Message]
    value: str


def make_needles(
    count: int, num_tokens: int, measure: Callable[[list[Message]], int]
) -> list[Needle]:
    """Chats of about num_tokens tokens (as `measure` counts a chat's), the fact in one of the first
    turns, three other facts of its kind around it. The same for every model, up to length."""
    rng = random.Random(1)
    made = []
    for number in range(count):
        facts = rng.sample(_FACTS, len(_FACTS))
        values = [str(rng.randrange(1000, 10000)) for _ in facts]
        messages: list[Message] = []
        for (statement, _), value in zip(facts, values, strict=True):
            messages += _turn(statement.format(value), "Okay, I will remember that.")
        messages += _filler(rng, messages, num_tokens, measure)
        asked = number % len(facts)
        messages.append(Message("user", facts[asked][1]))
        made.append(Needle(messages, values[asked]))
    return made


def _turn(user: str, assistant: str) -> list[Message]:
    return [Message("user", user), Message("assistant", assistant)]


def _filler(
    rng: random.Random,
    before: list[Message],
    num_tokens: int,
    measure: Callable[[list[Message]], int],
) -> list[Message]:
    """Small talk up to num_tokens, in a new order each time round."""
    order = rng.sample(_TALK, len(_TALK))
    per_round = measure([*before, *(m for turn in order for m in _turn(*turn))]) - measure(before)
    num_turns = max(0, num_tokens - measure(before)) * len(order) // max(1, per_round)
    return [m for i in range(num_turns) for m in _turn(*order[i % len(order)])]

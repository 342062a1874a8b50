"""Talk that is not a fact: greetings, small talk, requests, refusals, little stories, lists to
keep.

Each function returns turns in role order, the user's first, the assistant's last.
"""

from dataclasses import dataclass
from random import Random

from .facts import frame, mark
from .phrases_file import (
    Exchange,
    Slots,
    capital,
    exchanges,
    expand,
    frames,
    pairs,
    pick,
    with_articles,
    word_lists,
)
from .values import draw_value, draw_word


@dataclass(frozen=True)
class Turn:
    role: str  # user, assistant or system
    text: str
    is_answer: bool = False  # values in it have to be remembered, not just repeated


def dialogue(*texts: str) -> list[Turn]:
    return [Turn(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]


def _by_kind(kind: str) -> tuple[Exchange, ...]:
    found = [e for file in ("talk.txt", "asks.txt") for e in exchanges(file) if e.kind == kind]
    return tuple(e for e in found for _ in range(e.weight))


_POOLS: dict[str, tuple[Exchange, ...]] = {}


def exchange(kind: str, rng: Random) -> list[Turn]:
    """A written exchange; often cut after its first answer, as people change the subject."""
    pool = _POOLS.setdefault(kind, _by_kind(kind))
    chosen = pick(pool, rng)
    slots: Slots = {}
    num_lines = len(chosen.lines)
    if num_lines > 2 and rng.random() < 0.2:
        num_lines = 2
    texts = [expand(pick(line, rng), rng, slots, draw_word) for line in chosen.lines[:num_lines]]
    if not kind and rng.random() < 0.08:
        texts[0] = frame("lead", rng) + capital(texts[0])
    return dialogue(*(with_articles(capital(text.strip())) for text in texts))


_KNOW_ASKS = (
    "What is {}?",
    "What's {}?",
    "Do you know what {} is?",
    "Tell me what {} is.",
    "Can you explain what {} is?",
)
_KNOW_SAYS = (
    "{} is {}.",
    "{} is {}. Would you like to know more?",
    "Sure. {} is {}.",
    "I think {} is {}.",
)


def knowledge(rng: Random) -> list[Turn]:
    if rng.random() < 0.3:
        country, city = pick(pairs("capitals.txt"), rng)
        question = pick(
            (
                "What is the capital of {}?",
                "Which city is the capital of {}?",
                "What's the capital of {}?",
            ),
            rng,
        )
        reply = pick(("The capital of {} is {}.", "I think the capital of {} is {}."), rng)
        return dialogue(question.format(country), reply.format(country, city))
    thing, meaning = pick(pairs("know.txt"), rng)
    says = pick(_KNOW_SAYS, rng)
    subject = capital(thing) if says.startswith("{}") or "Sure" in says else thing
    return dialogue(pick(_KNOW_ASKS, rng).format(thing), says.format(subject, meaning))


_PRONOUNS = (("it", "it", "its"), ("she", "her", "her"), ("he", "him", "his"))
_PRONOUN_OF = {
    "girl": 1,
    "princess": 1,
    "queen": 1,
    "witch": 1,
    "fairy": 1,
    "boy": 2,
    "prince": 2,
    "king": 2,
    "robot": 0,
    "ghost": 0,
}
_STORY_PARTS = ("open", "wish", "walk", "meet", "turn", "end")


def story(rng: Random) -> tuple[list[Turn], list[tuple[str, str]]]:
    """A story on request, and questions on it that may follow: (question, answer)."""
    p, o, s = pick(_PRONOUNS, rng)
    lists = word_lists()
    hero = pick(
        lists["animal" if p == "it" else "job"] if rng.random() < 0.6 else lists["hero"], rng
    )
    p, o, s = _PRONOUNS[_PRONOUN_OF[hero]] if hero in _PRONOUN_OF else (p, o, s)
    slots: Slots = {
        "hero": hero,
        "name": _first_name(rng),
        "friend": _first_name(rng),
        "p": p,
        "P": capital(p),
        "o": o,
        "s": s,
    }
    lines = frames("stories.txt")

    def line(part: str) -> str:
        return with_articles(capital(expand(pick(lines[part], rng), rng, slots, draw_word)))

    request = line("ask")
    parts = [part for part in _STORY_PARTS if part != "walk" or rng.random() < 0.6]
    turns = dialogue(request, " ".join(line(part) for part in parts))
    if rng.random() < 0.5:
        turns += dialogue(line("praise"), line("praised"))
    questions = []
    for about, key in (("hero", "name"), ("friend", "friend")):
        question = line(f"ask_{about}")
        reply = expand(
            pick(lines[f"tell_{about}"], rng), rng, slots | {"v": mark(slots[key])}, draw_word
        )
        questions.append((question, reply))
    return turns, questions


def _first_name(rng: Random) -> str:
    return draw_value("name", rng).split(" ")[0]


_LIST_KINDS = (
    ("shopping list", "grocery"),
    ("packing list", "gear"),
    ("to-do list", "chore"),
    ("guest list", "name"),
)
_LIST_STARTS = (
    "Please remember my {}: {}.",
    "My {} is: {}.",
    "Here is my {}: {}.",
    "Note my {}, please: {}.",
    "I have a {} with {}.",
    "Can you keep my {}? It has {}.",
    "These are on my {}: {}.",
)
_LIST_ADDS = (
    "Please add {0} to my {1}.",
    "Add {0} to the {1}.",
    "Also put {0} on my {1}.",
    "{0} must go on the {1}, too.",
)
_LIST_ASKS = (
    "What is on my {}?",
    "What's on my {}?",
    "Read me my {}.",
    "Please repeat my {}.",
    "Can you tell me what is on my {}?",
    "Show me my {}, please.",
)
_LIST_SAYS = ("On your {} there is: {}.", "Your {} has {}.", "Your {}: {}.")


def _enumerate(items: list[str]) -> str:
    return ", ".join(items[:-1]) + " and " + items[-1] if len(items) > 1 else items[0]


def kept_list(rng: Random) -> tuple[list[Turn], list[Turn], list[Turn]]:
    """A list to keep: the turns that give it, those that add to it (may be none), and those that
    ask for it."""
    title, source = pick(_LIST_KINDS, rng)
    items = list(dict.fromkeys(draw_word(source, rng) for _ in range(2 + int(rng.random() * 4))))
    said = _enumerate([mark(item) for item in items])
    given = dialogue(pick(_LIST_STARTS, rng).format(title, said), frame("fact_ack", rng))
    added: list[Turn] = []
    if rng.random() < 0.5:
        item = draw_word(source, rng)
        if item not in items:
            items.append(item)
            text = capital(pick(_LIST_ADDS, rng).format(mark(item), title))
            added = dialogue(
                text,
                pick(("Done, {} is on the list.", "Okay, I added {}.", "Added: {}."), rng).format(
                    mark(item)
                ),
            )
    marked = [mark(item) for item in items]
    if rng.random() < 0.3:
        reply = f"Your {title}:\n" + "\n".join("- " + item for item in marked)
    else:
        reply = pick(_LIST_SAYS, rng).format(title, _enumerate(marked))
    return given, added, dialogue(pick(_LIST_ASKS, rng).format(title), reply)


def filler(rng: Random) -> list[Turn]:
    """One exchange of anything that no later question is about."""
    chance = rng.random()
    if chance < 0.07:
        return knowledge(rng)
    if chance < 0.11:
        return story(rng)[0]
    return exchange("", rng)

"""Facts that come up by the way: a name given with a pronoun, a favorite told when asked back."""

from random import Random

from .facts import Fact, acknowledge, families, frame, mark
from .phrases_file import capital, pick, with_articles, word_lists
from .talk import Turn, dialogue, filler
from .values import draw_value

_SHE = ("sister", "mother", "aunt", "grandmother", "daughter", "niece", "girlfriend", "wife")
_HE = ("brother", "father", "uncle", "grandfather", "son", "nephew", "boyfriend", "husband")
_MENTIONS = (
    "I {past} with my {who}.",
    "My {who} came to see me today.",
    "Mostly with my {who}.",
    "I had an argument with my {who}.",
    "I am on the phone with my {who}.",
    "My {who} told me a joke.",
    "I have a {who}.",
    "I went there with my {who}.",
    "I love {topic}. I do it with my {who}.",
    "On weekends, with my {who}.",
    "My {who} is angry with me.",
    "It was a gift from my {who}.",
)
_PASTS = (
    "went hiking",
    "baked a cake",
    "watched a film",
    "went to the market",
    "played chess",
    "had lunch",
    "cleaned the house",
)
_REPLIES = (
    "That sounds nice. What is {their} name?",
    "I see. Tell me more.",
    "How nice! What is {their} name?",
    "Oh, I see.",
    "I see. How was it?",
    "I see. What happened?",
    "Tell me more about {them}.",
)
_NAMINGS = (
    "{Their} name is {v}.",
    "{They} is called {v}.",
    "{They} is {v}.",
    "{Their} name's {v}.",
    "{v}.",
    "It's {v}.",
)
_LIVINGS = (" {They} lives in {w}.", " {They} has a house in {w}.", " {They} moved to {w}.")


def _family(name: str) -> int:
    return next(i for i, family in enumerate(families()) if family.name == name)


def named_relative(rng: Random) -> tuple[list[Turn], list[Fact]]:
    """A relative comes up, then the name, perhaps the town; and the facts this gives."""
    is_she = rng.random() < 0.5
    who = pick(_SHE if is_she else _HE, rng)
    they, their = ("she", "her") if is_she else ("he", "his")
    person = Fact(
        families()[_family("person")], f"my {who}", f"your {who}", draw_value("name", rng)
    )
    facts = [person]
    naming = pick(_NAMINGS, rng)
    if rng.random() < 0.3 and naming.startswith("{The"):
        facts.append(
            Fact(families()[_family("lives")], f"my {who}", f"your {who}", draw_value("town", rng))
        )
        naming += pick(_LIVINGS, rng)
    said = naming.format(
        v=mark(person.value), w=mark(facts[-1].value), They=capital(they), Their=capital(their)
    )
    mention = pick(_MENTIONS, rng).format(
        who=who, past=pick(_PASTS, rng), topic=pick(word_lists()["topic"], rng)
    )
    reply = pick(_REPLIES, rng).format(their=their, them="her" if is_she else "him")
    reaction = (
        frame("fact_ack", rng)
        if len(facts) > 1
        else acknowledge(person, rng, echo=rng.random() < 0.3)
    )
    between = filler(rng) if rng.random() < 0.35 else []
    return dialogue(mention, reply) + between + dialogue(said, reaction), facts


_FAVORITES = (("color", "color"), ("food", "food"))
_ASKED_BACK = (
    "I am a program, so I do not really have one. What is yours?",
    "I have no favorites, I am only a small program. What is yours?",
    "I am a program, so I do not have a favorite. What about you?",
)
_MINE = (
    "Mine is {v}.",
    "My favorite is {v}.",
    "{v}.",
    "I like {v} best.",
    "It is {v}.",
    "Mine is {v}, I think.",
)
_TAKEN = (
    "{V} is a good choice.",
    "I see, {v}. That is nice.",
    "{V}, how nice.",
    "I will remember that.",
    "Good to know!",
)


def told_favorite(rng: Random) -> tuple[list[Turn], list[Fact]]:
    """The user asks for a favorite, is asked back, and tells."""
    kind, source = pick(_FAVORITES, rng)
    value = pick(word_lists()[source], rng)
    fact = Fact(
        families()[_family(f"favorite_{kind}")],
        f"my favorite {kind}",
        f"your favorite {kind}",
        value,
    )
    question = pick(
        ("What is your favorite {}?", "What's your favorite {}?", "Do you have a favorite {}?"), rng
    ).format(kind)
    said = capital(pick(_MINE, rng).format(v=mark(value)))
    taken = with_articles(pick(_TAKEN, rng).format(v=value, V=capital(value)))
    return dialogue(question, pick(_ASKED_BACK, rng), said, taken), [fact]

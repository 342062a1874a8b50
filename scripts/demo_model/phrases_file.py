"""The phrase files and the little language they are written in. Knows text and chance; no tokens.

A template is plain text with [this/or that] choices and {slots}. A slot is a word list's name, with
a number to tell two draws apart ({food2}) and a caret for a capital letter ({food^}). Slots already
bound keep their value.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import TypeVar

PHRASES = Path(__file__).parent / "phrases"
T = TypeVar("T")
_TOKEN = re.compile(r"\[([^\]]*)\]|\{([A-Za-z_]+)(\d*)(\^?)\}")

_ARTICLE = re.compile(r"\b([Aa]) (?=\x01?[aeiou])")

Slots = dict[str, str]
Draw = Callable[[str, Random], str]  # (list name, rng) -> a word


@dataclass(frozen=True)
class Slot:
    key: str  # what equal draws share
    source: str  # word list
    is_capital: bool


Part = str | Slot | tuple["Template", ...]
Template = tuple[Part, ...]


def pick(items: Sequence[T], rng: Random) -> T:
    return items[int(rng.random() * len(items))]


def with_articles(text: str) -> str:
    """'a old owl' -> 'an old owl'. The mark before a value may stand in between."""
    return _ARTICLE.sub(r"\1n ", text)


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _slots(text: str) -> Template:
    parts: list[Part] = []
    end = 0
    for match in _TOKEN.finditer(text):
        parts.append(text[end : match.start()])
        parts.append(_slot(match))
        end = match.end()
    parts.append(text[end:])
    return tuple(part for part in parts if part != "")


def _slot(match: re.Match[str]) -> Part:
    if match[1] is not None:
        return tuple(_slots(choice) for choice in match[1].split("/"))
    return Slot(match[2] + match[3], match[2], bool(match[4]))


@cache
def parse(text: str) -> Template:
    return _slots(text.replace("\\n", "\n"))


def expand(template: Template, rng: Random, slots: Slots, draw: Draw) -> str:
    """The template's text; slots not yet bound are drawn and stay bound in `slots`."""
    out: list[str] = []
    for part in template:
        if isinstance(part, str):
            out.append(part)
        elif isinstance(part, Slot):
            if part.key not in slots:
                slots[part.key] = _draw_other(part, rng, slots, draw)
            value = slots[part.key]
            out.append(capital(value) if part.is_capital else value)
        else:
            out.append(expand(pick(part, rng), rng, slots, draw))
    return "".join(out)


def _draw_other(slot: Slot, rng: Random, slots: Slots, draw: Draw) -> str:
    """A word no slot of the exchange has yet, so that {food} and {food2} differ."""
    for _ in range(4):
        word = draw(slot.source, rng)
        if word not in slots.values():
            break
    return word


def phrase_lines(name: str) -> list[str]:
    """A phrase file without its comments."""
    lines = (PHRASES / name).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if not line.startswith("#")]


@cache
def word_lists() -> dict[str, tuple[str, ...]]:
    lists: dict[str, tuple[str, ...]] = {}
    for line in filter(str.strip, phrase_lines("words.txt")):
        name, items = line.split(":", 1)
        lists[name] = tuple(item.strip() for item in items.split(";"))
    return lists


@cache
def frames(file: str) -> dict[str, tuple[Template, ...]]:
    """Lines `name: template`, grouped by name. `_` stands for nothing; the space after a prefix is
    kept."""
    groups: dict[str, list[Template]] = {}
    for line in filter(str.strip, phrase_lines(file)):
        name, text = line.split(": ", 1)
        groups.setdefault(name, []).append(parse("" if text.strip() == "_" else text))
    return {name: tuple(templates) for name, templates in groups.items()}


@cache
def pairs(file: str) -> tuple[tuple[str, str], ...]:
    """Lines `left: right`."""
    split = (line.split(": ", 1) for line in filter(str.strip, phrase_lines(file)))
    return tuple((left, right) for left, right in split)


@dataclass(frozen=True)
class Exchange:
    """Lines of talk, the user's first, each with its alternatives."""

    kind: str  # '', 'open' or 'close'
    weight: int
    lines: tuple[tuple[Template, ...], ...]


@cache
def exchanges(file: str) -> tuple[Exchange, ...]:
    blocks = "\n".join(phrase_lines(file)).strip().split("\n\n")
    return tuple(_exchange(block.strip().splitlines()) for block in blocks if block.strip())


def _exchange(lines: list[str]) -> Exchange:
    kind, weight = lines[0].lstrip("*").rpartition(" ")[::2]
    roles = [line[0] for line in lines[1:]]
    assert roles == ["U", "A"] * (len(roles) // 2), f"turns out of order: {lines}"
    alternatives = tuple(tuple(parse(text) for text in line[3:].split(" | ")) for line in lines[1:])
    return Exchange(kind.strip(), int(weight), alternatives)

"""Names, places, codes and the other values a fact can have. A value's checksum decides whether it
is held out.

Names are made of random syllables, so that a model cannot learn a list: it has to look back.
"""

from collections.abc import Callable
from random import Random
from zlib import crc32

from .phrases_file import pick, word_lists

HELD_OUT_SHARE = 10  # one value in ten is never seen in training

_ONSETS = (
    "b",
    "bl",
    "br",
    "c",
    "ch",
    "cl",
    "cr",
    "d",
    "dr",
    "f",
    "fl",
    "fr",
    "g",
    "gl",
    "gr",
    "h",
    "j",
    "k",
    "kr",
    "l",
    "m",
    "n",
    "p",
    "pl",
    "pr",
    "qu",
    "r",
    "s",
    "sh",
    "sk",
    "sl",
    "sm",
    "sn",
    "sp",
    "st",
    "t",
    "th",
    "tr",
    "v",
    "w",
    "y",
    "z",
)
_VOWELS = (
    "a",
    "a",
    "a",
    "e",
    "e",
    "e",
    "i",
    "i",
    "i",
    "o",
    "o",
    "o",
    "u",
    "u",
    "ai",
    "ea",
    "ee",
    "ia",
    "io",
    "oa",
    "oo",
    "ou",
)
_CODAS = (
    "",
    "",
    "",
    "",
    "l",
    "m",
    "n",
    "r",
    "s",
    "t",
    "x",
    "nd",
    "rk",
    "lm",
    "nn",
    "sh",
    "ck",
    "th",
)
_TOWN_ENDS = (
    "ton",
    "ville",
    "burg",
    "ford",
    "wick",
    "stad",
    "mouth",
    "field",
    "port",
    "",
    "",
    "",
    "",
)
_FRAGMENT_LISTS = ("firstname", "country", "job", "topic", "instrument", "animal", "food", "month")
_LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"

OPEN_KINDS = frozenset(
    {"name", "town", "code", "word", "time", "price"}
)  # too many values to learn by heart


def is_held_out(value: str) -> bool:
    return crc32(value.lower().encode()) % HELD_OUT_SHARE == 0


def _syllables(rng: Random, count: int) -> str:
    return "".join(pick(_ONSETS, rng) + pick(_VOWELS, rng) for _ in range(count)) + pick(
        _CODAS, rng
    )


def _fragments(rng: Random) -> str:
    """Pieces of common words run together: other letters and other pieces than syllables give."""
    lists = word_lists()
    parts = []
    for _ in range(2 if rng.random() < 0.75 else 3):
        word = "".join(filter(str.isalpha, pick(lists[pick(_FRAGMENT_LISTS, rng)], rng).lower()))
        start = int(rng.random() * max(1, len(word) - 2))
        parts.append(word[start : start + 2 + int(rng.random() * 3)])
    return "".join(parts)


def _made_up(rng: Random) -> str:
    chance = rng.random()
    if chance < 0.3:
        return _fragments(rng)
    if chance < 0.4:
        return pick("aeiou", rng) + pick(("", *_CODAS), rng) + _syllables(rng, 1)
    return _syllables(rng, 2 if rng.random() < 0.7 else (1 if rng.random() < 0.2 else 3))


def _name(rng: Random) -> str:
    chance = rng.random()
    if chance < 0.15:
        return pick(word_lists()["firstname"], rng)
    first = _made_up(rng).capitalize()
    return f"{first} {_made_up(rng).capitalize()}" if chance > 0.93 else first


def _town(rng: Random) -> str:
    if rng.random() < 0.1:
        return pick(word_lists()["country"], rng)
    return (_syllables(rng, 1 if rng.random() < 0.5 else 2) + pick(_TOWN_ENDS, rng)).capitalize()


def _digits(rng: Random, count: int) -> str:
    return "".join(pick("0123456789", rng) for _ in range(count))


def _code(rng: Random) -> str:
    chance = rng.random()
    if chance < 0.6:
        return _digits(rng, 2 + int(rng.random() * 5))
    letters = "".join(pick(_LETTERS, rng) for _ in range(1 + int(rng.random() * 3)))
    return (
        f"{letters}-{_digits(rng, 3)}"
        if chance > 0.8
        else f"{letters}{_digits(rng, 2 + int(rng.random() * 3))}"
    )


def _word(rng: Random) -> str:
    word = _made_up(rng)
    return word + _digits(rng, 2) if rng.random() < 0.4 else word


def _time(rng: Random) -> str:
    clock = f"{1 + int(rng.random() * 12)}:{int(rng.random() * 60):02d}"
    chance = rng.random()
    if chance < 0.6:
        return clock
    return (
        f"{clock} on {pick(word_lists()['weekday'], rng)}"
        if chance < 0.8
        else f"{clock} {pick(('am', 'pm'), rng)}"
    )


def _price(rng: Random) -> str:
    return f"{2 + int(rng.random() * 998)} {pick(('dollars', 'euros', 'coins', 'pounds'), rng)}"


def _age(rng: Random) -> str:
    return str(2 + int(rng.random() * 96))


def _spot(rng: Random) -> str:
    lists = word_lists()
    quality = pick(lists["color"], rng) if rng.random() < 0.6 else pick(lists["adjective"], rng)
    return f"{quality} {pick(lists['container'], rng)}"


_OPEN: dict[str, Callable[[Random], str]] = {
    "name": _name,
    "town": _town,
    "code": _code,
    "word": _word,
    "time": _time,
    "price": _price,
}
_OTHER: dict[str, Callable[[Random], str]] = {
    "age": _age,
    "spot": _spot,
    "n": lambda rng: str(2 + int(rng.random() * 97)),
}


def draw_value(kind: str, rng: Random, held_out: bool = False) -> str:
    """A value of `kind`: one seen in training, or one never seen there. Small closed lists hold
    nothing out."""
    if kind not in _OPEN:
        return _OTHER[kind](rng) if kind in _OTHER else pick(word_lists()[kind], rng)
    while is_held_out(value := _OPEN[kind](rng)) != held_out:
        pass
    return value


def draw_word(source: str, rng: Random) -> str:
    """What a slot of the talk templates asks for."""
    return draw_value(source, rng)

"""A screenshot of three chats at work: the shipped model, asked what a person would ask it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from drawing.person import Person
from drawing.screenshot import draw_screen

ARGUMENTS = ("run", "--seed", "3", "--kv-mem", "12MiB")
COLUMNS, ROWS = 92, 25
ANIMALS = ("dog", "bear", "hen", "frog", "goat", "mouse", "owl", "pony", "crab", "deer")
CALM_S = 0.4  # so long is nobody at work between two turns
CTRL_L = "\x0c"


def draw_repl(path: Path) -> None:
    """Chat until the pool has been full and has INT8 blocks; picture it while all three answer."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_STATE_HOME"] = folder  # nobody's own input history
        with Person(ARGUMENTS, COLUMNS, ROWS) as person:
            _fill_pool(person)
            _set_all_to_work(person)
            picture = draw_screen(person.screen, " ".join(("$ kvchat", *ARGUMENTS)))
    path.write_text(picture, encoding="utf-8")


def _fill_pool(person: Person) -> None:
    person.waits_until(lambda lines: "context" in _toolbar(lines), "prompt")
    person.types("/rename code")
    _say(person, "Please remember that the door code is 4417.")
    for animal in ("fox", "cat"):
        _say(person, f"Tell me a short story about a {animal}.")
    person.types("/fork what-if")
    _say(person, "Give me a list of three animals.")
    person.types("/new travel")
    _say(person, "Please remember that my sister is called Ada.")
    for animal in ANIMALS:
        _say(person, f"/all Tell me a short story about a {animal}.")
    person.types("/switch code")
    person.waits_until(lambda lines: _toolbar(lines).startswith("code"), "first chat")


def _set_all_to_work(person: Person) -> None:
    person.presses(CTRL_L)
    _say(person, "What is the door code?")
    person.types("/sessions")
    person.types("/all Tell me a short story about a wolf.")
    person.waits_until(lambda lines: _num_working(lines) == 3, "work in three chats")
    person.types("/pool")
    person.waits_until(_is_telling, "map above a reply that grows")


def _say(person: Person, text: str) -> None:
    """A turn, to the end of all replies to it."""
    person.types(text)
    person.waits_until(lambda lines: any(text in line for line in lines), "echo")
    person.waits_until(lambda lines: not _num_working(lines), "end of the replies", CALM_S)


def _toolbar(lines: list[str]) -> str:
    """The last line that is not empty."""
    return next((line for line in reversed(lines) if line), "")


def _num_working(lines: list[str]) -> int:
    words = _toolbar(lines).split()
    return int(words[words.index("working") - 1]) if "working" in words else 0


def _is_telling(lines: list[str]) -> bool:
    """All are at work, and below the numbers of /pool stands the beginning of the reply."""
    numbers = [i for i, line in enumerate(lines) if line.startswith("pressure ")]
    return _num_working(lines) == 3 and bool(numbers) and len(lines[numbers[-1] + 1]) > 60

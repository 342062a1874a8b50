"""Whatever a model, a file or a library says, the terminal only ever gets printable text."""

import ast
import io
import random
import re
import unicodedata
from pathlib import Path

import pyte
import pytest

from kvchat.terminal.show import (
    STYLES,
    Show,
    StreamSanitiser,
    one_line,
    sanitise,
    styled,
)

ROOT = Path(__file__).resolve().parent.parent
FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467"  # man, woman, girl
HEART = "\u2764\ufe0f\u200d\U0001f525"
CONJUNCT = "\u0915\u094d\u200d\u0937"  # Devanagari with an explicit joiner
HOSTILE = (
    "\x1b]52;c;aGk=\x07",  # clipboard
    "\x1b]0;title\x07",
    "\x1b]8;;http://example.invalid\x1b\\link\x1b]8;;\x1b\\",
    "\x1b[2J\x1b[1;1H",
    "\x1b[?1049h\x1b[31mred",
    "\x9b2J",
    "\x9d0;title\x9c",
    "\x90+q544e\x9c",
    "\r\x1b[K> fake prompt",
    "\x08" * 80,
    "\x0e\x0f\x05",
    "\u202eevil\u202c\u2066x\u2069",
    "a\u2028b\u2029c",
    "tag\U000e0041\U000e007f",
    "lone\u200djoiner",
    FAMILY + HEART + CONJUNCT,
    "\ud800",
    "\x1bP$q\x1b\\",
    "\x1bc",
)


class Recorder:
    """A pyte listener that writes down which of the terminal's functions were called."""

    def __init__(self):
        self.calls = set()

    def __getattr__(self, name):
        def record(*args, **kwargs):
            self.calls.add(name)

        return record


def _terminal_calls(text: str) -> set[str]:
    recorder = Recorder()
    pyte.Stream(recorder).feed(text)
    return recorder.calls


def _hostile_text(rng: random.Random) -> str:
    pieces = []
    for _ in range(rng.randint(1, 12)):
        kind = rng.randrange(4)
        if kind == 0:
            pieces.append(rng.choice(HOSTILE))
        elif kind == 1:
            pieces.append(chr(rng.choice([rng.randrange(0xA0), rng.randrange(0x2000, 0x2070)])))
        elif kind == 2:
            pieces.append(
                f"\x1b{rng.choice('[]P_^X(#')}{rng.randrange(100)};{rng.choice('mHJKhl')}"
            )
        else:
            pieces.append(chr(rng.randrange(0x110000)))
    return "".join(pieces)


@pytest.mark.parametrize("code", [*range(0x20), *range(0x7F, 0xA0)])
def test_every_control_is_shown_as_an_escape(code):
    shown = chr(code) if chr(code) in "\n\t" else f"\\x{code:02x}"

    assert sanitise(f"a{chr(code)}b") == f"a{shown}b"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\u202e", "\\u202e"),
        ("\u2069", "\\u2069"),
        ("\u2028", "\\u2028"),
        ("\U000e0041", "\\U000e0041"),
        ("\ud83d", "\\ud83d"),
        ("a\u200db", "a\\u200db"),
        ("one\r\ntwo\rthree", "one\ntwo\\x0dthree"),
        ("\r\r\n", "\\x0d\n"),
    ],
)
def test_what_reorders_or_hides_text_is_shown_as_an_escape(text, shown):
    assert sanitise(text) == shown


@pytest.mark.parametrize("text", [FAMILY, HEART, CONJUNCT, "naïve 汉字 עברית", "a\tb\nc", "👍🏽"])
def test_honest_text_is_left_alone(text):
    assert sanitise(text) == text


def test_ten_thousand_hostile_texts_change_the_screen_by_printing_only():
    rng = random.Random(7)
    allowed = {"draw", "linefeed", "tab"}

    for _ in range(10_000):
        text = _hostile_text(rng)
        safe = sanitise(text)
        assert _terminal_calls(safe) <= allowed, ascii(text)
        assert sanitise(safe) == safe, ascii(text)


def test_no_control_survives_of_all_code_points():
    safe = sanitise("".join(map(chr, range(0x110000))))

    categories = {unicodedata.category(character) for character in safe if character not in "\n\t"}
    assert "Cc" not in categories
    assert "Cs" not in categories
    assert not re.search("[\u2028-\u202e\u2066-\u2069\U000e0000-\U000e007f]", safe)


def test_a_text_split_anywhere_streams_as_the_whole():
    rng = random.Random(3)
    texts = [*HOSTILE, "one\r\ntwo\r", FAMILY * 2, *(_hostile_text(rng) for _ in range(300))]
    for text in texts:
        for at in range(len(text) + 1):
            stream = StreamSanitiser()
            shown = stream.feed(text[:at]) + stream.feed(text[at:], is_last=True)
            assert shown == sanitise(text), ascii(text)


def test_one_line_is_one_short_line():
    assert one_line("two\nlines\tand\x1b[31m") == "two lines and\\x1b[31m"
    assert len(one_line("x" * 10_000_000)) == 300


def test_styles_are_codes_only_where_colour_is_wanted():
    line = [("bold", "a\x1b[31m"), ("", "b")]

    assert styled(line, use_color=False) == "a\\x1b[31mb"
    assert styled(line, use_color=True) == "\x1b[1ma\\x1b[31m\x1b[0mb"
    assert _terminal_calls(styled([(s, "x") for s in STYLES], use_color=True)) == {
        "draw",
        "select_graphic_rendition",
    }


def test_answers_go_to_stdout_and_the_rest_to_stderr():
    out, err = io.StringIO(), io.StringIO()
    show = Show(out, err)

    show.answer("an ans")
    show.answer("wer\r", is_last=True)
    show.note("a note")
    show.error("went\nwrong")
    show.thought("hm\x1b")
    show.progress("loading", 1, 2)

    assert out.getvalue() == "an answer\\x0d"
    assert err.getvalue() == "a note\nerror: went wrong\nhm\\x1b"


def test_the_progress_bar_redraws_itself_and_disappears():
    err = io.StringIO()
    show = Show(io.StringIO(), err, is_live=True)

    show.progress("loading", 1, 2)
    show.progress("loading", 1, 2)
    show.progress("loading", 2, 2)

    clear = "\r\x1b[?7l\x1b[K\x1b[?7h"
    assert err.getvalue() == f"\r\x1b[?7lloading [{'#' * 12}{'.' * 12}] 50%\x1b[K\x1b[?7h{clear}"


def test_the_progress_bar_takes_one_row_of_any_terminal():
    err = io.StringIO()
    show = Show(io.StringIO(), err, is_live=True)
    for done in range(100):
        show.progress("a long label for a small terminal", done, 100)
    screen = pyte.Screen(20, 5)

    pyte.Stream(screen).feed(err.getvalue())

    assert screen.cursor.y == 0
    assert [line.strip() for line in screen.display[1:]] == [""] * 4


def test_the_clipboard_takes_what_terminals_take():
    out = io.StringIO()
    show = Show(out, io.StringIO())

    assert show.clipboard("hi\x1b")
    assert out.getvalue() == "\x1b]52;c;aGkb\x07"
    assert not show.clipboard("x" * 100_000)


def test_only_show_writes_to_the_terminal():
    exempt = {
        "show.py",
        "sandbox.py",  # a child process; its stdout is the pipe to its parent
    }
    wrong = []
    for path in sorted((ROOT / "kvchat").rglob("*.py")):
        if path.name in exempt:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            if called in {"print", "ANSI", "HTML", "print_formatted_text"} or called.endswith(
                ("stdout.write", "stderr.write", "click.echo", "secho")
            ):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} {called}")

    assert wrong == []

"""The only way text reaches the terminal: every code point is made safe, then written.

stdout is the answer, stderr the rest. Knows streams and styles; nothing of sessions.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable
from typing import Protocol

MAX_LINE = 300  # characters of one line about an error, whatever a library had to say
MAX_CLIPBOARD = 74_994  # bytes most terminals take in one OSC 52 sequence
BAR_WIDTH = 24

# What a zero-width joiner may follow: parts of an emoji, or the virama of an Indic script.
_JOINABLE = (
    "\u2190-\u21ff\u2300-\u27bf\u2b00-\u2bff\ufe0f\U0001f000-\U0001faff"
    "\u094d\u09cd\u0a4d\u0acd\u0b4d\u0bcd\u0c4d\u0ccd\u0d4d\u0dca"
)
# C0 but \t and \n, DEL, C1, line separators, bidi controls, surrogates, tags, lone joiners.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff\U000e0000-\U000e007f]"
    f"|(?<![{_JOINABLE}])\u200d"
)

# A piece of a line: a style's name from STYLES, and untrusted text.
Fragment = tuple[str, str]
STYLES = {"": "", "bold": "1", "dim": "2", "error": "31", "mark": "7"} | {
    f"owner{i}": str(code) for i, code in enumerate((32, 33, 34, 35, 36, 92, 93, 94, 95, 96))
}
NUM_OWNER_STYLES = 10


def _escape(found: re.Match[str]) -> str:
    code = ord(found.group())
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def sanitise(text: str) -> str:
    r"""`text` with everything that could drive a terminal as visible escapes: ESC becomes \x1b.

    Newlines (also as \r\n), tabs, emoji joined by U+200D and Indic conjuncts stay. Idempotent.
    """
    return _UNSAFE.sub(_escape, text.replace("\r\n", "\n"))


def one_line(text: str, limit: int = MAX_LINE) -> str:
    """`text` sanitised, on one line, cut at `limit` characters with dots in its place."""
    line = " ".join(sanitise(text[: 8 * limit]).split())
    return line if len(line) <= limit else line[: limit - 3] + "..."


def styled(fragments: Iterable[Fragment], use_color: bool) -> str:
    """The fragments as one safe string, with SGR codes around each styled one if `use_color`."""
    return "".join(_painted(style, sanitise(text), use_color) for style, text in fragments)


def _painted(style: str, safe: str, use_color: bool) -> str:
    return f"\x1b[{STYLES[style]}m{safe}\x1b[0m" if style and safe and use_color else safe


class Sink(Protocol):
    """Where text ends up: a stream, or the painter of the interactive screen."""

    def write(self, text: str, /) -> object: ...

    def flush(self) -> object: ...


class StreamSanitiser:
    """sanitise() for a text that comes in pieces, split anywhere: pieces add up to the whole's."""

    def __init__(self) -> None:
        self._before = ""  # the code point before, for joiners
        self._held = ""  # a \r that waits for its \n

    def feed(self, text: str, is_last: bool = False) -> str:
        """The safe form of what can be told so far."""
        text = self._held + text
        self._held = "\r" if text.endswith("\r") and not is_last else ""
        text = text[: len(text) - len(self._held)]
        if not text:
            return ""
        safe = sanitise(self._before + text)[len(sanitise(self._before)) :]
        self._before = text[-1]
        return safe


class Show:
    """Writes answers to `out` and everything else to `err`; styles only where `use_color`.

    `is_live` says that `err` is a terminal, on which a progress bar can be redrawn.
    """

    def __init__(
        self, out: Sink, err: Sink, use_color: bool = False, is_live: bool = False
    ) -> None:
        self.use_color = use_color
        self._out, self._err = out, err
        self._is_live = is_live
        self._streaming = StreamSanitiser()
        self._thinking = StreamSanitiser()
        self._bar = ""

    def answer(self, text: str, is_last: bool = False) -> None:
        """A piece of a reply, as it comes; `is_last` ends the reply."""
        self._out.write(self._streaming.feed(text, is_last))
        self._out.flush()
        if is_last:
            self._streaming = StreamSanitiser()

    def thought(self, text: str) -> None:
        """A piece of what a model thinks before it answers: no answer, so on `err`."""
        self._err.write(_painted("dim", self._thinking.feed(text), self.use_color))
        self._err.flush()

    def lines(self, lines: Iterable[Iterable[Fragment]]) -> None:
        """Whole lines of an answer, styled."""
        self._out.write("".join(styled(line, self.use_color) + "\n" for line in lines))
        self._out.flush()

    def note(self, text: str) -> None:
        """Lines that are not the answer: banner, warnings, hints."""
        self._err.write(sanitise(text) + "\n")
        self._err.flush()

    def error(self, message: str) -> None:
        """One line about what went wrong."""
        self.progress("", 1, 1)
        self._err.write(styled([("error", "error: "), ("", one_line(message))], self.use_color))
        self._err.write("\n")
        self._err.flush()

    def progress(self, label: str, done: int, total: int) -> None:
        """A bar that redraws itself and disappears when done; nothing where it cannot."""
        if not self._is_live:
            return
        percent = 100 * done // max(total, 1)
        filled = "#" * (BAR_WIDTH * percent // 100)
        bar = f"{one_line(label, 40)} [{filled:.<{BAR_WIDTH}}] {percent}%" if done < total else ""
        if bar != self._bar:
            self._bar = bar
            self._err.write(f"\r\x1b[?7l{bar}\x1b[K\x1b[?7h")  # a narrow terminal cuts it
            self._err.flush()

    def clipboard(self, text: str) -> bool:
        """Ask the terminal to copy `text` (OSC 52, written here); False when it is too long."""
        payload = base64.b64encode(text.encode("utf-8", "replace")).decode("ascii")
        if len(payload) > MAX_CLIPBOARD:
            return False
        self._out.write(f"\x1b]52;c;{payload}\x07")
        self._out.flush()
        return True

"""The interactive screen: the reply being made, the input, a toolbar; all else goes above them.

Knows prompt-toolkit and where text is painted; nothing of sessions and commands.
"""

from __future__ import annotations

import os
import re
import signal
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TextIO

from prompt_toolkit.application import Application, run_in_terminal
from prompt_toolkit.buffer import Buffer
from prompt_toolkit.completion import Completer
from prompt_toolkit.data_structures import Size
from prompt_toolkit.filters import Condition
from prompt_toolkit.formatted_text import StyleAndTextTuples
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.input import Input
from prompt_toolkit.key_binding import KeyBindings
from prompt_toolkit.layout import (
    AnyContainer,
    ConditionalContainer,
    HSplit,
    Layout,
    VerticalAlign,
    Window,
)
from prompt_toolkit.layout.controls import BufferControl, FormattedTextControl
from prompt_toolkit.layout.dimension import Dimension
from prompt_toolkit.layout.menus import CompletionsMenu
from prompt_toolkit.output import ColorDepth
from prompt_toolkit.output.vt100 import Vt100_Output
from prompt_toolkit.styles import Style
from prompt_toolkit.utils import get_cwidth
from prompt_toolkit.widgets import SearchToolbar

from kvchat import paths
from kvchat.terminal.show import sanitise

MAX_INPUT_ROWS = 10
MAX_MENU_ROWS = 8
TAB_WIDTH = 8
# Terminals do not agree how wide a character is with these; the finished line has them again.
_JOINERS = re.compile("[\u200d\ufe0e\ufe0f\U0001f3fb-\U0001f3ff]")
STYLE = Style.from_dict(
    {
        "dim": "ansibrightblack",
        "completion-menu": "noinherit ansibrightblack",
        "completion-menu.completion.current": "noinherit reverse",
        "completion-menu.meta.completion": "noinherit ansibrightblack",
        "completion-menu.meta.completion.current": "noinherit ansibrightblack",
    }
)


def wrap_rows(text: str, columns: int) -> list[str]:
    """`text` cut into rows of at most `columns` terminal cells; at least one row."""
    if text.isascii():
        return [text[i : i + columns] for i in range(0, len(text), columns)] or [""]
    rows, start, width = [], 0, 0
    for i, character in enumerate(text):
        cells = get_cwidth(character)
        if width + cells > columns and i > start:
            rows.append(text[start:i])
            start, width = i, 0
        width += cells
    return [*rows, text[start:]]


def open_history() -> tuple[History, str]:
    """The input history kept on disk, readable by its owner only, or one in memory and why."""
    folder = paths.state_dir()
    path = folder / "history"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        is_file = stat.S_ISREG(os.fstat(fd).st_mode)  # a FIFO would never end
        os.fchmod(fd, 0o600)
        os.close(fd)
        if not is_file:
            raise OSError(f"{path} is not a file")
        return _KeptHistory(str(path)), ""
    except (OSError, RuntimeError) as error:  # RuntimeError: no home folder
        return InMemoryHistory(), f"input history is not kept: {error}"


class _KeptHistory(FileHistory):
    def store_string(self, string: str) -> None:
        """Append to the file; a full disk costs the entry, not the chat."""
        try:
            super().store_string(string)
        except OSError:
            return


class Painter(Vt100_Output):
    """VT100 output that can hold a repaint back, so that erase, text and redraw are one write.

    While it is held bracketed paste stays on: were it off for a moment, the lines of a paste that
    arrives then would be taken for Enter keys and be sent.
    """

    _is_held = False

    @contextmanager
    def held(self) -> Iterator[None]:
        """Nothing reaches the terminal before the end of the block."""
        self._is_held = True
        try:
            yield
        finally:
            self._is_held = False
            self.flush()

    def flush(self) -> None:
        if not self._is_held:
            super().flush()

    def disable_bracketed_paste(self) -> None:
        if not self._is_held:
            super().disable_bracketed_paste()

    def enable_bracketed_paste(self) -> None:
        if not self._is_held:
            super().enable_bracketed_paste()


@dataclass(frozen=True)
class Terminal:
    """The terminal a screen is drawn on. `input` None: the process's own."""

    stdout: TextIO
    get_size: Callable[[], tuple[int, int]]  # columns, rows
    use_color: bool = True
    input: Input | None = None


class Screen:
    """Paints; a Sink for Show, whose text appears above the input line, as one repaint.

    `tail` is the part of a reply that has no newline yet: (style, text), painted above the input.
    """

    def __init__(
        self,
        terminal: Terminal,
        toolbar: Callable[[], str],
        bindings: KeyBindings,
        completer: Completer,
        history: History,
    ) -> None:
        self.tail = ("", "")
        self.buffer = Buffer(
            multiline=True,
            history=history,
            completer=completer,
            complete_while_typing=Condition(lambda: self.buffer.text.startswith("/")),
        )
        self._pending: list[str] = []
        self._painter = Painter(
            terminal.stdout,
            lambda: Size(rows=terminal.get_size()[1], columns=terminal.get_size()[0]),
            enable_cpr=False,
        )
        self.app: Application[int] = Application(
            layout=self._layout(toolbar),
            key_bindings=bindings,
            style=STYLE,
            input=terminal.input,
            output=self._painter,
            color_depth=None if terminal.use_color else ColorDepth.DEPTH_1_BIT,
            erase_when_done=True,
        )
        self.app.ttimeoutlen = 0.05  # a lone Escape is told from Alt-Enter after 50 ms

    def _layout(self, toolbar: Callable[[], str]) -> Layout:
        search = SearchToolbar()
        control = BufferControl(self.buffer, search_buffer_control=search.control)
        children: list[AnyContainer] = [
            ConditionalContainer(
                Window(FormattedTextControl(self._tail_rows), dont_extend_height=True),
                Condition(lambda: bool(self.tail[1])),
            ),
            Window(
                control,
                height=lambda: Dimension(min=1, max=max(1, min(MAX_INPUT_ROWS, self.rows - 2))),
                dont_extend_height=True,
                wrap_lines=True,
                get_line_prefix=lambda line, wrap: "> " if line == wrap == 0 else "  ",
            ),
            CompletionsMenu(max_height=MAX_MENU_ROWS),
            search,
            Window(
                FormattedTextControl(lambda: [("class:dim", sanitise(toolbar()))]),
                height=1,
                dont_extend_height=True,
            ),
        ]
        return Layout(HSplit(children, align=VerticalAlign.TOP), focused_element=control)

    @property
    def columns(self) -> int:
        """Cells in a row of the terminal now."""
        return max(1, self._painter.get_size().columns)

    @property
    def rows(self) -> int:
        """Rows of the terminal now."""
        return max(1, self._painter.get_size().rows)

    def _tail_rows(self) -> StyleAndTextTuples:
        """The last rows of the tail, as many as leave room for the input and the toolbar."""
        style, text = self.tail
        text = _JOINERS.sub("", sanitise(text)).expandtabs(TAB_WIDTH)
        rows = wrap_rows(text, self.columns)
        used = min(MAX_INPUT_ROWS, self.buffer.document.line_count) + 2
        return [(f"class:{style}" if style else "", "\n".join(rows[-max(1, self.rows - used) :]))]

    def write(self, text: str, /) -> None:
        """Text to appear above the input at the next flush; safe already, it comes from Show."""
        self._pending.append(text)

    def flush(self) -> None:
        """Paint what was written above the input line, and everything below anew."""
        text, self._pending = "".join(self._pending), []
        with self._painter.held():
            if not self.app.is_running:
                self._painter.write_raw(text)
                return
            self.app.renderer.erase()
            self._painter.write_raw(text)
            self.app._redraw()

    def invalidate(self) -> None:
        """Something shown below has changed."""
        self.app.invalidate()

    def clear(self) -> None:
        """An empty screen, as Ctrl-L asks for; the scrollback stays."""
        self.app.renderer.clear()

    def run(self, on_start: Callable[[], None]) -> int:
        """Show the screen until `exit`; what `exit` was given. `on_start` runs when it is up."""

        def start() -> None:
            self.on_signal(signal.SIGTSTP, self.suspend)
            self.on_signal(signal.SIGCONT, self._restore)
            self.app.create_background_task(_calm_signals())
            on_start()

        return self.app.run(pre_run=start, set_exception_handler=False)

    def exit(self, code: int) -> None:
        """Leave the screen; `run` returns `code`."""
        if self.app.future is not None and not self.app.future.done():
            self.app.exit(result=code)

    def on_signal(self, number: signal.Signals, action: Callable[[], None]) -> None:
        """Run `action` on this thread when the signal comes; for use once the screen is up."""
        assert self.app.loop is not None, "the screen is not running"
        self.app.loop.add_signal_handler(number, action)

    def suspend(self) -> None:
        """Stop the process as Ctrl-Z does, with the terminal as the shell had it."""

        def stop() -> None:
            handler = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
            os.kill(0, signal.SIGTSTP)
            signal.signal(signal.SIGTSTP, handler)

        run_in_terminal(stop)

    def _restore(self) -> None:
        """Raw mode and a fresh picture, after somebody else had the terminal."""
        run_in_terminal(lambda: None)


async def _calm_signals() -> None:
    """Let a storm of signals (a window being dragged) pass without a word from asyncio's pipe."""
    signal.set_wakeup_fd(signal.set_wakeup_fd(-1), warn_on_full_buffer=False)

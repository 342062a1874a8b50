"""The program on a real pseudo-terminal: typing, resizing, signals; the terminal stays sane."""

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time

import pyte
import pytest
from tiny_model import write_tiny_model

TIMEOUT_S = 30.0


class Terminal:
    """kvchat on a pseudo-terminal, with an emulated screen that shows what it paints."""

    def __init__(self, *arguments, **environment):
        self._master, self._slave = pty.openpty()
        self.resize(80, 24, is_told=False)
        self.modes_before = termios.tcgetattr(self._slave)
        self.screen = pyte.Screen(80, 24)
        self.raw = b""
        self._stream = pyte.ByteStream(self.screen)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "kvchat", *map(str, arguments)],
            stdin=self._slave,
            stdout=self._slave,
            stderr=self._slave,
            start_new_session=True,
            env={**os.environ, "TERM": "xterm-256color", "OMP_NUM_THREADS": "1", **environment},
        )

    def __enter__(self):
        return self

    def __exit__(self, *problem):
        self.process.kill()
        self.process.wait()
        os.close(self._master)
        os.close(self._slave)

    def resize(self, columns, rows, is_told=True):
        fcntl.ioctl(self._slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        if is_told:
            self.screen.resize(rows, columns)
            self.process.send_signal(signal.SIGWINCH)

    def types(self, text):
        os.write(self._master, text.encode())

    def reads(self, seconds=0.0):
        """Paint what has come within `seconds`."""
        while select.select([self._master], [], [], seconds)[0]:
            data = os.read(self._master, 65536)
            self.raw += data
            self._stream.feed(data)
            seconds = 0.0

    def text(self):
        return "\n".join(line.rstrip() for line in self.screen.display)

    def waits_until(self, condition, what):
        deadline = time.monotonic() + TIMEOUT_S
        while not condition():
            assert time.monotonic() < deadline, f"no {what} in:\n{self.text()}"
            self.reads(0.05)

    def sees(self, text):
        self.waits_until(lambda: text in self.text(), repr(text))

    def ends(self):
        """The exit code; all output is read."""
        self.waits_until(lambda: self.process.poll() is not None, "end")
        self.reads()
        return self.process.returncode

    def is_cooked(self):
        """The terminal itself edits lines, as before the program took over."""
        return bool(termios.tcgetattr(self._slave)[3] & termios.ICANON)

    def is_sane(self):
        """Modes as they were, cursor visible, no bracketed paste, no alternate screen."""
        private = {mode >> 5 for mode in self.screen.mode}
        return (
            termios.tcgetattr(self._slave) == self.modes_before
            and not self.screen.cursor.hidden
            and 2004 not in private
            and b"\x1b[?1049h" not in self.raw
        )


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    folder = write_tiny_model(tmp_path_factory.mktemp("tiny"), max_position=4096)
    return ("run", folder, "--ignore-eos", "--kv-mem", "64MiB", "--logit-bias", "13-100")


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))


def test_typing_goes_on_while_three_sessions_stream(arguments):
    with Terminal(*arguments) as terminal:
        terminal.sees("/help lists the commands")
        terminal.sees("chat-1  context 0/4k")
        for number in (1, 2, 3):
            terminal.types("hello\r" if number == 3 else "hello\r/new\r")
        terminal.sees("3 working")
        for size in ((60, 20), (100, 30), (80, 24)):
            terminal.resize(*size)
        terminal.types("typed while three stream")
        terminal.sees("> typed while three stream")
        terminal.types("\x15\x1b[200~pasted\nwhole\n\x1b[201~")
        terminal.sees("[pasted 2 lines]")
        terminal.types("\x03")
        terminal.sees("[stopped]")
        terminal.sees("2 working")
        terminal.types("\x03\x04")
        terminal.sees("2 replies unfinished; Ctrl-D again leaves")
        terminal.types("\x04")

        assert terminal.ends() == 0
        assert terminal.is_sane()
        assert "Traceback" not in terminal.text()


def test_what_is_typed_while_the_model_loads_is_a_turn_and_not_echoed(arguments):
    with Terminal(*arguments) as terminal:
        terminal.waits_until(lambda: not terminal.is_cooked(), "key by key input")
        assert "chat-1" not in terminal.text()
        terminal.types("early bird\r")
        terminal.sees("> early bird")
        terminal.sees("1 working")

        assert terminal.text().count("early bird") == 1


def test_a_line_without_a_break_is_repainted_ten_times_a_second_whatever_happens(arguments):
    with Terminal(*arguments) as terminal:
        terminal.sees("chat-1  context 0/4k")
        terminal.types("hello\r")
        terminal.sees("1 working")
        assert max(_pictures_per_second(terminal) for _ in range(3)) >= 10

        for i in range(1000):
            terminal.resize(1 + i * 37 % 500, 1 + i * 61 % 200)
            if i % 20 == 0:
                terminal.reads(0.01)
        terminal.resize(80, 24)
        for _ in range(10):
            terminal.process.send_signal(signal.SIGSTOP)
            terminal.process.send_signal(signal.SIGCONT)
        terminal.types("still here")
        terminal.sees("> still here")
        assert b"Traceback" not in terminal.raw


def _pictures_per_second(terminal):
    pictures, end = set(), time.monotonic() + 1.0
    while time.monotonic() < end:
        terminal.reads(0.01)
        pictures.add(terminal.text())
    return len(pictures)


def test_a_signal_leaves_a_sane_terminal_and_no_color_has_no_colour(arguments):
    with Terminal(*arguments, NO_COLOR="1") as terminal:
        terminal.sees("chat-1  context 0/4k")
        terminal.types("hello\r/pool\r")
        terminal.sees("a cell is")
        cells = [cell for row in terminal.screen.buffer.values() for cell in row.values()]
        assert {cell.fg for cell in cells} == {"default"}
        asked = time.monotonic()
        terminal.process.send_signal(signal.SIGTERM)

        assert terminal.ends() == 143
        assert time.monotonic() - asked < 2.0
        assert terminal.is_sane()


def test_a_dumb_terminal_gets_lines_alone(arguments):
    with Terminal(*arguments, "-n", "5", TERM="dumb") as terminal:
        terminal.types("hello\n\x04")

        assert terminal.ends() == 0
        assert b"\x1b" not in terminal.raw

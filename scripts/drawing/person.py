"""Types at the real program on a pseudo-terminal and reads what it shows, as a person would."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Sequence

import pyte

from drawing.screenshot import FaintScreen


class Person:
    """At a terminal of so many columns and rows, on which `kvchat *arguments` runs."""

    def __init__(
        self, arguments: Sequence[str], columns: int, rows: int, timeout_s: float = 120.0
    ) -> None:
        self.screen = FaintScreen(columns, rows)
        self._stream = pyte.ByteStream(self.screen)
        self._timeout_s = timeout_s
        self._master, self._slave = pty.openpty()  # kept open: what was said last can be read
        fcntl.ioctl(self._slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS")}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "kvchat", *arguments],
            stdin=self._slave,
            stdout=self._slave,
            stderr=self._slave,
            start_new_session=True,
            env={**environment, "TERM": "xterm-256color"},
        )

    def __enter__(self) -> Person:
        return self

    def __exit__(self, *problem: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._master)
        os.close(self._slave)

    @property
    def lines(self) -> list[str]:
        """What the screen shows now."""
        return [line.rstrip() for line in self.screen.display]

    def types(self, text: str) -> None:
        """A line and Enter."""
        self.presses(f"{text}\r")

    def presses(self, keys: str) -> None:
        """Keys as they are."""
        os.write(self._master, keys.encode())

    def waits_until(
        self, condition: Callable[[list[str]], bool], what: str, for_s: float = 0.0
    ) -> None:
        """Watch until the lines of the screen are as wanted, and have been for so many seconds.
        Raises TimeoutError, with the lines."""
        since = end = time.monotonic()
        end += self._timeout_s
        while not condition(self.lines) or time.monotonic() < since + for_s:
            if not condition(self.lines):
                since = time.monotonic()
            if time.monotonic() > end or self._process.poll() is not None:
                self._read(0.0)
                raise TimeoutError(f"no {what} in:\n" + "\n".join(self.lines))
            self._read(0.02)

    def _read(self, seconds: float) -> None:
        if select.select([self._master], [], [], seconds)[0]:
            self._stream.feed(os.read(self._master, 65536))

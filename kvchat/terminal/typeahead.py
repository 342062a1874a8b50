"""What is typed before there is a prompt: kept for it, key by key, and not echoed before."""

from __future__ import annotations

import termios
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def keep_keys(fd: int) -> Iterator[None]:
    """The terminal `fd` as a prompt needs it while the model loads; at the end as it was.

    By itself a terminal would turn an early Enter into Ctrl-J, which breaks the line and sends
    nothing. Ctrl-C still interrupts.
    """
    before = termios.tcgetattr(fd)
    early = termios.tcgetattr(fd)
    early[0] &= ~termios.ICRNL
    early[3] &= ~(termios.ICANON | termios.ECHO)
    termios.tcsetattr(fd, termios.TCSANOW, early)
    try:
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSANOW, before)

"""Chat without a screen: an answer to -p, or one turn for every line of stdin. Plain text only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from kvchat.chat.library import Library
from kvchat.errors import CapacityError, EngineError, UsageError
from kvchat.terminal.show import Show

PUMP_S = 0.5  # how long to wait for the engine before looking again
MAX_FILE_BYTES = 64 << 20  # of -f, when its lines are turns
MAX_TURN_BYTES = 4 << 20  # about a million tokens, more than any supported context


def read_turns(prompt: str | None, file: str | None, stdin: BinaryIO | None) -> Iterator[str]:
    """The turns to answer: `prompt` with all of file or stdin, or their lines as they come.

    `stdin` None: there is none to read. Raises UsageError or CapacityError, for lines on the way.
    """
    source, name = (stdin, "stdin") if file is None else (_read(file), f"-f {file}")
    if prompt is None:
        return _lines(source, name)
    rest = decode_turn(source.read(MAX_TURN_BYTES + 1), name) if source else ""
    turn = f"{prompt}\n{rest}" if rest and prompt else prompt + rest
    if not turn.strip():
        raise UsageError("the prompt is empty; give -p some text, or pipe it in")
    return iter([turn])


def _read(file: str) -> BinaryIO:
    try:
        with Path(file).open("rb") as source:
            data = source.read(MAX_FILE_BYTES + 1)  # bounded: it may be a device
    except OSError as error:
        raise UsageError(f"-f {file}: {error.strerror}") from error
    if len(data) > MAX_FILE_BYTES:
        raise CapacityError(f"-f {file}: more than {MAX_FILE_BYTES >> 20} MiB; split the file")
    return BytesIO(data)


def _lines(source: BinaryIO | None, name: str) -> Iterator[str]:
    is_empty = True
    while source and (line := source.readline(MAX_TURN_BYTES + 1)):
        if (turn := decode_turn(line, name).rstrip("\r\n")).strip():
            is_empty = False
            yield turn
    if is_empty:
        raise UsageError(f"{name} holds no text; a line is a turn, or use -p for one answer")


def decode_turn(data: bytes, name: str) -> str:
    """The text of a turn read from `name`. Raises CapacityError or UsageError."""
    if len(data) > MAX_TURN_BYTES:
        limit = MAX_TURN_BYTES >> 20
        raise CapacityError(f"{name}: more than {limit} MiB for one turn; send it in parts")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{name} is not UTF-8 text: byte 0x{data[error.start]:02x} at offset {error.start};"
            " convert it first"
        ) from error


def answer_turns(show: Show, library: Library, turns: Iterable[str]) -> None:
    """Answer every turn in one session, replies parted by a blank line. Raises EngineError."""
    for index, turn in enumerate(turns):
        if index:
            show.answer("\n")
        _answer(show, library, turn)


def _answer(show: Show, library: Library, turn: str) -> None:
    session = library.current
    session.send(turn)
    is_working, is_thinking, last, notices = True, False, "", list[str]()
    while is_working:
        library.pump(timeout=PUMP_S)
        is_working = session.is_working
        for chunk in session.take_output():
            if is_thinking and chunk.kind != "reasoning":
                show.thought("\n")
            is_thinking = chunk.kind == "reasoning"
            if is_thinking:
                show.thought(chunk.text)
            elif chunk.kind == "answer":
                last = chunk.text
                show.answer(chunk.text)
            elif chunk.kind == "notice":
                notices.append(chunk.text)
    show.answer("" if last.endswith("\n") else "\n", is_last=True)
    if session.last_reply is not None and session.last_reply.finish_reason == "error":
        raise EngineError(notices[-1])
    for notice in notices:
        show.note(notice)

"""Plays a person at the REPL: keys in, an emulated terminal out, a scripted engine behind.

    async def script(person):
        await person.types("hello\\r")
        person.engine.run()
        await person.sees("ok")
    transcript = play(script)       # all lines the terminal has shown, from the first to the last

Waiting is for what the terminal shows, never for a time.
"""

import asyncio
from concurrent.futures import Future
from typing import ClassVar

import pyte
from prompt_toolkit.input import create_pipe_input
from scripted_engine import ScriptedEngine, scripted_library, scripted_tokenizer, text_source

from kvchat.chat.runtime import Runtime
from kvchat.chat.template import load_chat_format
from kvchat.config import KVSpec, SchedulerConfig
from kvchat.engine.build import EngineFacts
from kvchat.engine.ledger import Ledger
from kvchat.engine.stats import EngineStats, SessionKV
from kvchat.kv.layout import Codec
from kvchat.terminal.repl import Repl
from kvchat.terminal.screen import Terminal

TIMEOUT_S = 5.0
FACTS = EngineFacts(
    device="cpu",
    dtype="float32",
    spec=KVSpec(5, 4, 8, 16, "float32"),
    scheduler=SchedulerConfig(num_blocks=65, block_size=16, max_model_len=512),
)


class TalkingEngine(ScriptedEngine):
    """A scripted engine that also tells about itself, as engine.Engine does."""

    num_generated = 0
    owners = ("null", *[1] * 10, *["shared"] * 6, *["cached"] * 8, *["free"] * 40)
    codecs = (Codec.NATIVE,) * 65
    compressed: ClassVar[dict] = {}  # by (from, to): spans

    def step(self, num_tokens: int = 1) -> bool:
        self.num_generated += num_tokens * len(self._running)
        return super().step(num_tokens)

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=len(self._running),
            num_waiting=0,
            num_blocks=64,
            num_blocks_used=16,
            num_blocks_cached=8,
            num_blocks_free=40,
            num_steps=10,
            num_decode_steps=4,
            num_decode_rows=8,
            num_scheduled_tokens=100,
            num_generated_tokens=self.num_generated,
            num_cached_tokens=32,
            num_preemptions=0,
            num_drops=0,
            num_copies=1,
            num_evictions=2,
            num_compressions=self.compressed,
            num_blocks_freed={kind: 3 * n for kind, n in self.compressed.items()},
        )

    def pool_map(self) -> list[tuple[object, Codec]]:
        return list(zip(self.owners, self.codecs, strict=True))

    def session_kv(self, session_id: int) -> SessionKV:
        return self.held.get(session_id, SessionKV(100, 7, 7 * 20_480))

    def audit(self) -> Future[Ledger]:
        """Answered when a script sets its result."""
        self.answer: Future[Ledger] = Future()
        return self.answer


class EmulatedTerminal:
    """A file-like terminal; pyte keeps what it shows. `raw` is every byte it was sent."""

    def __init__(self, columns: int, rows: int) -> None:
        self.columns, self.rows = columns, rows
        self.screen = pyte.HistoryScreen(columns, rows, history=5000)
        self.screen.set_mode(pyte.modes.LNM)
        self.raw = ""
        self._stream = pyte.Stream(self.screen)

    def write(self, text: str) -> None:
        self.raw += text
        self._stream.feed(text)

    def flush(self) -> None: ...

    def isatty(self) -> bool:
        return True

    def size(self) -> tuple[int, int]:
        return self.columns, self.rows

    def resize(self, columns: int, rows: int) -> None:
        self.columns, self.rows = columns, rows
        self.screen.resize(rows, columns)

    def lines(self) -> list[str]:
        """Scrollback and screen, less trailing blanks."""
        above = [
            "".join(row[x].data for x in range(self.columns)).rstrip()
            for row in self.screen.history.top
        ]
        return above + [line.rstrip() for line in self.screen.display]


class Person:
    """The driver of a script."""

    def __init__(self, repl, pipe, terminal, engine) -> None:
        self.repl, self.terminal, self.engine = repl, terminal, engine
        self._pipe = pipe

    @property
    def transcript(self) -> str:
        return "\n".join(self.terminal.lines()).rstrip()

    async def types(self, text: str) -> None:
        self._pipe.send_text(text)
        await asyncio.sleep(0)

    async def waits_until(self, condition, what: str) -> None:
        deadline = asyncio.get_running_loop().time() + TIMEOUT_S
        while not condition():
            assert asyncio.get_running_loop().time() < deadline, f"no {what} in:\n{self.transcript}"
            await asyncio.sleep(0.002)

    async def sees(self, text: str) -> None:
        await self.waits_until(lambda: text in self.transcript, repr(text))

    async def sees_no(self, text: str) -> None:
        await self.waits_until(lambda: text not in self.transcript, f"end of {text!r}")

    async def says(self, text: str, reply: str | None = None) -> None:
        """A whole turn: what is typed, and the reply the engine gives to it."""
        if reply is not None:
            self.engine.replies.append(reply)
        num_asked = len(self.engine.requests)
        await self.types(text + "\r")
        await self.waits_until(lambda: len(self.engine.requests) > num_asked, "request")
        self.engine.run()
        await self.waits_until(lambda: not self.repl.library.is_working, "end of reply")
        await self.repl_is_painted()

    async def repl_is_painted(self) -> None:
        """Until the loop has fetched and painted everything there is now."""
        await self.waits_until(lambda: not self.repl.session._output, "painting")


def play(
    script,
    columns: int = 72,
    rows: int = 24,
    use_color: bool = True,
    warnings=(),
    template=None,
    facts=FACTS,
    **library_options,
) -> tuple[str, Person, int]:
    """Run `script` to its end; the transcript, the person and the REPL's exit code.

    A script that does not leave by itself is left when it ends.
    """
    tokenizer = scripted_tokenizer()
    if template:
        source = text_source(chat_template=template)
        library_options["chat_format"] = load_chat_format(source, tokenizer, None)
    engine = TalkingEngine(tokenizer)
    engine.num_cached_tokens = 1 << 20  # every history is in the pool still
    library = scripted_library(engine, **{"max_model_len": 512, **library_options})
    runtime = Runtime(library, engine, facts, "test-model", "chatml", tuple(warnings))
    terminal = EmulatedTerminal(columns, rows)
    failures = []
    with create_pipe_input() as pipe:
        repl = Repl(runtime, Terminal(terminal, terminal.size, use_color, pipe))
        person = Person(repl, pipe, terminal, engine)

        async def drive() -> None:
            try:
                await script(person)
            except asyncio.CancelledError:
                return  # the REPL was left
            except Exception as problem:
                failures.append(problem)
            finally:
                repl.screen.exit(0)

        app = repl.screen.app
        app.pre_run_callables.append(lambda: app.create_background_task(drive()))
        code = repl.run()
    if failures:
        raise failures[0]
    return person.transcript, person, code

"""The slash commands: one function each, its declaration feeds dispatch, /help and completion."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from kvchat.chat.messages import as_jsonl, as_markdown
from kvchat.chat.options import OPTIONS
from kvchat.errors import UsageError, quoted
from kvchat.terminal import memory_views, views
from kvchat.terminal.pipe import MAX_TURN_BYTES, decode_turn
from kvchat.terminal.registry import Registry
from kvchat.terminal.tables import table

if TYPE_CHECKING:
    from kvchat.terminal.repl import Repl

MAX_ARMS = 64
KEYS = """
Enter sends; Alt-Enter, Ctrl-J or \\ at the end breaks the line; //x sends /x
Ctrl-C stops the reply; Ctrl-D leaves; Alt-1..9 switch; Ctrl-L clears the screen"""

COMMANDS = Registry()
command = COMMANDS.command


# Sessions


@command("/new [NAME]", "start another chat")
def new(repl: Repl, argument: str) -> None:
    repl.library.new(argument or None)
    repl.look()


@command("/sessions", "list the chats")
def sessions(repl: Repl, argument: str) -> None:
    held = {each.id: repl.runtime.engine.session_kv(each.id) for each in repl.library.sessions}
    repl.show.lines(views.session_lines(repl.library, held))


@command("/switch NAME|NUMBER", "look at another chat", "session")
def switch(repl: Repl, argument: str) -> None:
    repl.switch(argument)


@command("/close [NAME|NUMBER]", "end a chat and give its memory back", "session")
def close(repl: Repl, argument: str) -> None:
    before = repl.session
    closed = repl.library.find(argument) if argument else before
    repl.library.close(argument or None)
    repl.say(f"closed {closed.name}")
    if repl.session is not before:
        repl.look()


@command("/rename NAME", "give this chat another name")
def rename(repl: Repl, argument: str) -> None:
    repl.library.rename(argument)


@command("/fork [NAME]", "go on from the last finished turn in a new chat")
def fork(repl: Repl, argument: str) -> None:
    repl.library.fork(argument or None)
    repl.look()


# Turns


@command("/undo [N]", "take back the last turn, or N turns")
def undo(repl: Repl, argument: str) -> None:
    num_turns = repl.session.undo(_number(argument or "1"))
    repl.say(f"took back {num_turns} turn{'s' if num_turns > 1 else ''}; /redo brings back")
    repl.look()


@command("/redo", "bring back what /undo took")
def redo(repl: Repl, argument: str) -> None:
    repl.session.redo()
    repl.look()


@command("/tree", "every turn of this chat, those that were replaced too")
def tree(repl: Repl, argument: str) -> None:
    repl.show.lines(views.tree_lines(repl.session.tree()))


@command("/regen", "ask the last turn again")
def regen(repl: Repl, argument: str) -> None:
    repl.session.regen()


@command("/edit [TEXT]", "ask something else instead of the last turn")
def edit(repl: Repl, argument: str) -> None:
    asked = [message.content for message in repl.session.messages if message.role == "user"]
    if not asked:
        raise UsageError("there is no turn to edit yet")
    repl.editing = repl.session
    if argument:
        repl.ask(argument)
        return
    repl.offer(asked[-1])


@command("/stop [all]", "stop the reply, or all of them, and keep them", ("all",))
def stop(repl: Repl, argument: str) -> None:
    stopped = []
    for session in repl.library.sessions if argument == "all" else [repl.session]:
        session.drop_queued()
        stopped += [session.name] if session.stop() else []
    repl.say(f"stopped {', '.join(stopped)}" if stopped else "nothing to stop")


@command("/all TEXT", "send a turn to every chat")
def send_all(repl: Repl, argument: str) -> None:
    for refusal in repl.library.send_all(argument):
        repl.show.error(f"{refusal.session.name}: {refusal.error}")


@command("/fan N [NAME=V,...] TEXT", "send a turn to N forks, each with its own options")
def fan(repl: Repl, argument: str) -> None:
    count, _, rest = argument.partition(" ")
    arms: list[dict[str, str]] = [{} for _ in range(_number(count, MAX_ARMS))]
    while found := re.match(r"([a-z_]+)=(\S+)(?:\s+|$)", rest):
        name, values = found[1], found[2].split(",")
        if name not in (*OPTIONS, "seed", "think"):
            break
        if len(values) not in (1, len(arms)):
            raise UsageError(f"{name} has {len(values)} values for {len(arms)} chats")
        for arm, value in zip(arms, values * (len(arms) // len(values)), strict=True):
            arm[name] = value
        rest = rest[found.end() :]
    made = repl.library.fan(rest, arms)
    repl.say(f"asked {', '.join(session.name for session in made)}; /switch looks at one")


@command("/read FILE", "put a file's text before the next turn", "file")
def read(repl: Repl, argument: str) -> None:
    with _file_errors(argument):
        path = Path(argument).expanduser()
        if path.exists() and not path.is_file():
            raise UsageError(f"{quoted(argument)}: not a file")  # a FIFO might never end
        with path.open("rb") as file:
            text = decode_turn(file.read(MAX_TURN_BYTES + 1), quoted(argument))
    text = text.replace("\r\n", "\n").rstrip("\n")
    repl.attached.append(text)
    num_lines = text.count("\n") + 1
    repl.say(f"{num_lines:,} lines of {argument} go before your next turn; Ctrl-C drops them")


@command("/clear", "start this conversation anew")
def clear(repl: Repl, argument: str) -> None:
    repl.session.clear()
    repl.look()


# Settings


@command("/system [TEXT]", 'show or set the system message; "" is none')
def system(repl: Repl, argument: str) -> None:
    if argument:
        repl.session.set_system("" if argument == '""' else argument)
    repl.say(f"system: {repl.session.system or '(none)'}")


@command("/set NAME VALUE", "set an option of this chat; /show lists them", (*OPTIONS, "seed"))
def set_option(repl: Repl, argument: str) -> None:
    name, _, value = argument.partition(" ")
    repl.session.set_option(name, value)
    repl.say(f"{name} = {_as_set(repl.session.options()[name])}")


@command("/think on|off", "whether a model that can think does", ("on", "off"))
def think(repl: Repl, argument: str) -> None:
    repl.session.set_option("think", argument)
    repl.say(f"think {argument}")


def _as_set(value: object) -> str:
    """An option's value as /set would read it, or that it is not set."""
    if value is None or value == ():
        return "(not set)"
    if isinstance(value, bool):
        return "on" if value else "off"
    return json.dumps(value) if isinstance(value, tuple) else str(value)


@command("/show [prompt]", "the options; or the text and ids the model has seen", ("prompt",))
def show(repl: Repl, argument: str) -> None:
    if argument != "prompt":
        names = {"model": repl.runtime.model_name, "format": repl.runtime.chat_format}
        options = {**names, **repl.session.options()}
        rows = [f"{name} = {_as_set(value)}" for name, value in options.items()]
        repl.show.lines([[("", row)] for row in rows])
        return
    text, ids = repl.session.prompt_view()
    numbers = f"{len(ids):,} ids: {' '.join(map(str, ids))}"
    repl.show.lines([*([("", line)] for line in text.split("\n")), [("dim", numbers)]])


# Memory and numbers


@command("/pool", "draw the KV pool, block by block, and what pressure did to it")
def pool(repl: Repl, argument: str) -> None:
    engine, facts = repl.runtime.engine, repl.runtime.facts
    names = {session.id: session.name for session in repl.library.sessions}
    stats, columns = engine.stats(), repl.screen.columns
    repl.show.lines(memory_views.pool_lines(engine.pool_map(), names, facts, stats, columns))


@command(
    "/kv [all|--audit]",
    "what the chats hold, this one or all in detail; --audit counts every byte",
    ("all", "--audit"),
)
def kv(repl: Repl, argument: str) -> None:
    engine, library, facts = repl.runtime.engine, repl.library, repl.runtime.facts
    if argument == "--audit":
        repl.when_done(engine.audit(), memory_views.ledger_lines)
        return
    held = [(session, engine.session_kv(session.id)) for session in library.sessions]
    library.pump()  # a session knows of all tokens that it holds
    lines = memory_views.kv_lines(held, facts)
    for session, kv in held:
        if argument == "all" or session is library.current:
            lines += memory_views.session_kv_lines(session, kv, facts)
    repl.show.lines(lines)


@command("/pin [NAME|NUMBER]", "never compress a chat; it gives way last", "session")
def pin(repl: Repl, argument: str) -> None:
    repl.say(f"pinned {repl.library.pin(argument or None).name}; /unpin lets it go")


@command("/unpin [NAME|NUMBER]", "let a chat be compressed again", "session")
def unpin(repl: Repl, argument: str) -> None:
    repl.say(f"unpinned {repl.library.unpin(argument or None).name}")


@command("/stats", "the last reply, and everything since the start")
def stats(repl: Repl, argument: str) -> None:
    repl.show.lines(views.stats_lines(repl.session.last_reply, repl.runtime.engine.stats()))


# The rest


@command("/copy [N]", "copy the last reply, or the Nth from the end")
def copy(repl: Repl, argument: str) -> None:
    replies = [m.content for m in repl.session.messages if m.role == "assistant"]
    back = _number(argument or "1")
    if back > len(replies):
        raise UsageError(f"replies in this chat: {len(replies)}")
    text = replies[-back].strip("\n")
    if not repl.show.clipboard(text):
        raise UsageError(f"{len(text):,} characters are too many for a terminal; use /export FILE")
    repl.say(f"copied {len(text):,} characters, if your terminal allows OSC 52")


@command("/export FILE", "write this chat to a new .md or .jsonl file", "file")
def export(repl: Repl, argument: str) -> None:
    name, messages = repl.session.name, repl.session.messages
    texts = {".md": as_markdown(name, messages), ".jsonl": as_jsonl(messages)}
    text = texts.get(Path(argument).suffix)
    if text is None:
        raise UsageError(f"{quoted(argument)}: the name must end in .md or .jsonl")
    with _file_errors(argument), Path(argument).expanduser().open("x", encoding="utf-8") as file:
        file.write(text)
    repl.say(f"wrote {argument}")


@command("/help", "this list", aliases=("/?",))
def help_(repl: Repl, argument: str) -> None:
    rows = [
        (f"{each.name} {each.usage}", " ".join((each.help, *each.aliases)))
        for each in COMMANDS.commands
    ]
    repl.show.lines(table(("command", "what it does"), rows))
    repl.say(KEYS.strip("\n"))


@command("/exit", "leave", aliases=("/bye", "/quit"))
def exit_(repl: Repl, argument: str) -> None:
    repl.leave()


@contextmanager
def _file_errors(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:  # RuntimeError: a ~name that is nobody's
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UsageError(f"{quoted(name)}: {reason}") from error


def _number(text: str, limit: int = 1 << 20) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= limit:
        raise UsageError(f'"{quoted(text, 20)}" is not a number from 1 to {limit:,}')
    return int(text)

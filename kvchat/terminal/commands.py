"""The slash commands: one function each, its declaration feeds dispatch, /help and completion."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from kvchat.chat.options import OPTIONS
from kvchat.errors import UsageError, quoted
from kvchat.terminal import views
from kvchat.terminal.registry import Registry

if TYPE_CHECKING:
    from kvchat.terminal.repl import Repl

MAX_FILE_BYTES = 4 << 20
MAX_ARMS = 64
KEYS = """
Enter sends    Alt-Enter, Ctrl-J or \\ at the end: a new line    //text sends a leading slash
Ctrl-C stops the reply    Ctrl-D leaves    Alt-1..9 switch    Ctrl-L clears the screen"""

COMMANDS = Registry()
command = COMMANDS.command


# Sessions


@command("/new [NAME]", "start another chat")
def new(repl: Repl, argument: str) -> None:
    repl.library.new(argument or None)
    repl.look()


@command("/sessions", "list the chats", aliases=("/ls",))
def sessions(repl: Repl, argument: str) -> None:
    repl.show.lines(views.session_lines(repl.library))


@command("/switch NAME|NUMBER", "look at another chat (Alt-1 to 9)", "session")
def switch(repl: Repl, argument: str) -> None:
    repl.switch(_needed(argument, "/switch NAME or /switch NUMBER; /sessions lists them"))


@command("/close [NAME|NUMBER]", "end a chat and give its memory back", "session")
def close(repl: Repl, argument: str) -> None:
    closed = repl.library.find(argument) if argument else repl.session
    before = repl.session
    repl.library.close(argument or None)
    repl.say(f"closed {closed.name}")
    if repl.session is not before:
        repl.look()


@command("/rename NAME", "give this chat another name")
def rename(repl: Repl, argument: str) -> None:
    repl.library.rename(_needed(argument, "/rename NAME"))


@command("/fork [NAME]", "go on from the last finished turn in a new chat")
def fork(repl: Repl, argument: str) -> None:
    repl.library.fork(argument or None)
    repl.look()


# Turns


@command("/undo [N]", "take back the last turn")
def undo(repl: Repl, argument: str) -> None:
    num_turns = repl.session.undo(_number(argument or "1", "/undo [N]"))
    repl.say(f"took back {num_turns} turn{'s' if num_turns > 1 else ''}; /redo brings back")
    repl.look()


@command("/redo", "bring back what /undo took")
def redo(repl: Repl, argument: str) -> None:
    repl.session.redo()
    repl.look()


@command("/regen", "ask the last turn again", aliases=("/retry",))
def regen(repl: Repl, argument: str) -> None:
    repl.session.regen()
    repl.show.lines(views.user_lines(repl.session.messages[-2].content))


@command("/edit [TEXT]", "ask something else instead of the last turn")
def edit(repl: Repl, argument: str) -> None:
    asked = [message.content for message in repl.session.messages if message.role == "user"]
    if not asked:
        raise UsageError("there is no turn to edit yet")
    repl.editing = repl.session
    if argument:
        repl.ask(argument)
        return
    repl.screen.buffer.text = asked[-1]
    repl.screen.buffer.cursor_position = len(asked[-1])


@command("/stop [all]", "stop the reply and keep what was said", ("all",))
def stop(repl: Repl, argument: str) -> None:
    if argument not in ("", "all"):
        raise UsageError("/stop, or /stop all")
    stopped = []
    for session in repl.library.sessions if argument else [repl.session]:
        session.drop_queued()
        stopped += [session.name] if session.stop() else []
    repl.say(f"stopped {', '.join(stopped)}" if stopped else "nothing to stop")


@command("/all TEXT", "send a turn to every chat")
def send_all(repl: Repl, argument: str) -> None:
    is_idle = not repl.session.is_working
    refusals = repl.library.send_all(_needed(argument, "/all TEXT"))
    for refusal in refusals:
        repl.show.error(f"{refusal.session.name}: {refusal.error}")
    if is_idle and repl.session.is_working:
        repl.show.lines(views.user_lines(argument))


@command("/fan N [NAME=V1,V2,...] TEXT", "send a turn to N forks, each with its own options")
def fan(repl: Repl, argument: str) -> None:
    usage = "/fan N [NAME=V1,V2,...] TEXT, as in /fan 4 temp=0.2,0.7,1,1.3 Tell me a story"
    count, _, rest = _needed(argument, usage).partition(" ")
    num_arms = _number(count, usage, MAX_ARMS)
    arms: list[dict[str, str]] = [{} for _ in range(num_arms)]
    while found := re.match(r"([a-z_]+)=(\S+)\s+", rest):
        values = found[2].split(",")
        if found[1] not in (*OPTIONS, "seed", "think"):
            break
        if len(values) not in (1, num_arms):
            raise UsageError(f"{found[1]} has {len(values)} values for {num_arms} chats")
        for arm, value in zip(arms, values * (num_arms // len(values)), strict=True):
            arm[found[1]] = value
        rest = rest[found.end() :]
    made = repl.library.fan(_needed(rest, usage), arms)
    repl.say(f"asked {', '.join(session.name for session in made)}; /switch looks at one")


@command("/read FILE", "put a file's text before the next turn", "file")
def read(repl: Repl, argument: str) -> None:
    path = Path(_needed(argument, "/read FILE")).expanduser()
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{quoted(argument)}: {error.strerror}") from error
    if len(data) > MAX_FILE_BYTES:
        raise UsageError(f"{quoted(argument)} is larger than {MAX_FILE_BYTES >> 20} MiB")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{quoted(argument)} is not UTF-8 text (byte {error.start})") from error
    repl.attached.append(text.replace("\r\n", "\n").rstrip("\n"))
    num_lines = repl.attached[-1].count("\n") + 1
    repl.say(f"{num_lines:,} lines of {path.name} go before your next turn; Ctrl-C drops them")


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


@command("/set NAME VALUE", "set an option of this chat", (*OPTIONS, "seed"))
def set_option(repl: Repl, argument: str) -> None:
    name, _, value = argument.partition(" ")
    if not value:
        raise UsageError("/set NAME VALUE, as in /set temp 0.7; /show params lists them")
    repl.session.set_option(name, value)
    repl.say(f"{name} = {repl.session.options()[name]}")


@command("/think on|off", "whether a model that can think does", ("on", "off"))
def think(repl: Repl, argument: str) -> None:
    repl.session.set_option("think", _needed(argument, "/think on or /think off"))
    repl.say(f"think {argument}")


@command(
    "/show [prompt|params|model]",
    "what the model saw, the options, the model",
    ("prompt", "params", "model"),
)
def show(repl: Repl, argument: str) -> None:
    if argument == "prompt":
        text, ids = repl.session.prompt_view()
        repl.show.lines([[("", line)] for line in text.split("\n")])
        repl.show.lines([[("dim", f"{len(ids):,} ids: {' '.join(map(str, ids))}")]])
    elif argument == "model":
        repl.show.lines(views.banner(repl.runtime))
    elif argument in ("", "params"):
        repl.show.lines(views.option_lines(repl.session.options()))
    else:
        raise UsageError("/show prompt, /show params or /show model")


# Memory and numbers


@command("/pool", "draw the KV pool, block by block")
def pool(repl: Repl, argument: str) -> None:
    names = {session.id: session.name for session in repl.library.sessions}
    owners = repl.runtime.engine.pool_map()
    repl.show.lines(views.pool_lines(owners, names, repl.runtime.facts, repl.screen.columns))


@command("/kv", "what each chat holds in the pool")
def kv(repl: Repl, argument: str) -> None:
    repl.show.lines(views.kv_lines(repl.library, repl.runtime.engine))


@command("/stats", "speed of the last reply, and of everything since the start")
def stats(repl: Repl, argument: str) -> None:
    repl.show.lines(views.stats_lines(repl.session.last_reply, repl.runtime.engine.stats()))


# The rest


@command("/copy [N]", "copy the last reply, or the one N replies back (OSC 52)")
def copy(repl: Repl, argument: str) -> None:
    back = _number(argument or "1", "/copy [N]")
    replies = [m.content for m in repl.session.messages if m.role == "assistant"]
    if back > len(replies):
        raise UsageError(f"replies in this chat: {len(replies)}")
    text = replies[-back].strip("\n")
    if not repl.show.clipboard(text):
        raise UsageError(
            f"{len(text):,} characters are too long for a terminal's clipboard; use /export FILE"
        )
    repl.say(f"copied {len(text):,} characters, if your terminal allows OSC 52")


@command("/export FILE", "write this chat to a .md or .jsonl file", "file")
def export(repl: Repl, argument: str) -> None:
    path = Path(_needed(argument, "/export FILE.md or /export FILE.jsonl")).expanduser()
    writers = {".md": repl.session.export_markdown, ".jsonl": repl.session.export_jsonl}
    if path.suffix not in writers:
        raise UsageError(f"{quoted(path.name)}: the name must end in .md or .jsonl")
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(writers[path.suffix]())
    except FileExistsError:
        raise UsageError(f"{quoted(argument)} exists; choose another name") from None
    except OSError as error:
        raise UsageError(f"{quoted(argument)}: {error.strerror}") from error
    repl.say(f"wrote {path.name}")


@command("/help", "this list", aliases=("/?",))
def help_(repl: Repl, argument: str) -> None:
    rows = [
        (f"{each.name} {each.usage}".strip(), " ".join((each.help, *each.aliases)))
        for each in COMMANDS.commands
    ]
    repl.show.lines(views.table(("command", "what it does"), rows))
    repl.say(KEYS.strip("\n"))


@command("/exit", "leave (Ctrl-D)", aliases=("/bye", "/quit"))
def exit_(repl: Repl, argument: str) -> None:
    repl.leave()


def _needed(argument: str, usage: str) -> str:
    if not argument:
        raise UsageError(usage)
    return argument


def _number(text: str, usage: str, limit: int = 1 << 20) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= limit:
        raise UsageError(f'"{quoted(text, 20)}" is not a number from 1 to {limit:,}: {usage}')
    return int(text)

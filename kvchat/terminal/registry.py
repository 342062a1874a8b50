"""One registry of slash commands: dispatch, /help and completion all read it. Knows no command."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeVar

from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document

from kvchat.errors import UsageError
from kvchat.terminal.show import one_line

Target = TypeVar("Target")
Words = tuple[str, ...] | Literal["file", "session"]


@dataclass(frozen=True)
class Command:
    """A slash command. `words` is what completion offers for its argument."""

    name: str
    usage: str  # the argument as /help shows it
    help: str
    run: Callable[..., None]
    words: Words = ()
    aliases: tuple[str, ...] = ()


class Registry:
    """The commands by name and alias, in the order in which they were declared."""

    def __init__(self) -> None:
        self.commands: list[Command] = []
        self._by_name: dict[str, Command] = {}

    def command(
        self, name: str, help: str, words: Words = (), aliases: tuple[str, ...] = ()
    ) -> Callable[[Callable[[Target, str], None]], Callable[[Target, str], None]]:
        """Declare a command; `name` is its name, and after a space what /help says it takes."""
        name, _, usage = name.partition(" ")

        def declare(run: Callable[[Target, str], None]) -> Callable[[Target, str], None]:
            made = Command(name, usage, help, run, words, aliases)
            self.commands.append(made)
            self._by_name |= dict.fromkeys((name, *aliases), made)
            return run

        return declare

    def find(self, name: str) -> Command:
        """The command called `name`; UsageError names the nearest one."""
        if name in self._by_name:
            return self._by_name[name]
        near = difflib.get_close_matches(name[:64], self._by_name, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else "/help lists them all"
        raise UsageError(f"unknown command {one_line(name, 40)}; {hint}")

    def dispatch(self, target: object, line: str) -> None:
        """Run the command on `line`, which begins with its name."""
        name, _, argument = line.partition(" ")
        self.find(name.strip()).run(target, argument.strip())


class CommandCompleter(Completer):
    """Completes a command's name, then its argument: words, session names or file names."""

    def __init__(self, registry: Registry, session_names: Callable[[], Iterable[str]]) -> None:
        self._registry = registry
        self._session_names = session_names
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, event: CompleteEvent) -> Iterator[Completion]:
        text = document.text_before_cursor
        if not text.startswith("/") or "\n" in text:
            return
        name, space, argument = text.partition(" ")
        if not space:
            for command in self._registry.commands:
                if command.name.startswith(name):
                    yield Completion(
                        command.name, -len(name), display_meta=one_line(command.help, 60)
                    )
            return
        words = self._words_of(name)
        if words == "file":
            yield from self._paths.get_completions(Document(argument), event)
            return
        offered = self._session_names() if words == "session" else words
        for word in offered:
            if word.startswith(argument):
                yield Completion(word, -len(argument), display=one_line(word, 60))

    def _words_of(self, name: str) -> Words:
        try:
            return self._registry.find(name).words
        except UsageError:
            return ()

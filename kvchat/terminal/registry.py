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
Run = Callable[[Target, str], None]
Words = tuple[str, ...] | Literal["file", "session"]


@dataclass(frozen=True)
class Command:
    """A slash command. `usage` is its argument, in brackets if it may be left out, the very words
    if in lower case; `words` is what completion offers for it."""

    name: str
    usage: str
    help: str
    run: Callable[..., None]
    words: Words
    aliases: tuple[str, ...]

    def accepts(self, argument: str) -> bool:
        """It can make sense of this argument, as far as its usage tells."""
        if not argument:
            return not self.usage or self.usage.startswith("[")
        words = self.usage.strip("[]").split("|")
        return argument in words if self.usage.islower() else bool(self.usage)


class Registry:
    """The commands by name and alias, in the order in which they were declared."""

    def __init__(self) -> None:
        self.commands: list[Command] = []
        self._by_name: dict[str, Command] = {}

    def command(
        self, synopsis: str, help: str, words: Words = (), aliases: tuple[str, ...] = ()
    ) -> Callable[[Run[Target]], Run[Target]]:
        """Declare a command; `synopsis` is its name and usage."""
        name, _, usage = synopsis.partition(" ")

        def declare(run: Run[Target]) -> Run[Target]:
            made = Command(name, usage, help, run, words, aliases)
            self.commands.append(made)
            self._by_name |= dict.fromkeys((name, *aliases), made)
            return run

        return declare

    def dispatch(self, target: object, line: str) -> None:
        """Run the command that `line` begins with; UsageError names the nearest one, or usage."""
        name, _, argument = line.partition(" ")
        found = self._by_name.get(name.strip())
        if found is None:
            near = difflib.get_close_matches(name[:64], self._by_name, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else "/help lists them all"
            raise UsageError(f"unknown command {one_line(name, 40)}; {hint}")
        argument = argument.strip()
        if not found.accepts(argument):
            raise UsageError(f"{found.name} {found.usage or 'stands alone'}: {found.help}")
        found.run(target, argument)

    def words(self, name: str) -> Words:
        """What may follow a command."""
        return self._by_name[name].words if name in self._by_name else ()


class CommandCompleter(Completer):
    """Completes a command's name, then its argument: words, session names or file names."""

    def __init__(self, registry: Registry, session_names: Callable[[], Iterable[str]]) -> None:
        self._registry = registry
        self._session_names = session_names
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, event: CompleteEvent) -> Iterator[Completion]:
        name, space, argument = document.text_before_cursor.partition(" ")
        if not name.startswith("/") or "\n" in name + argument:
            return
        if not space:
            for command in self._registry.commands:
                if command.name.startswith(name):
                    yield Completion(command.name, -len(name), display_meta=command.help)
            return
        words = self._registry.words(name)
        if words == "file":
            yield from self._paths.get_completions(Document(argument), event)
            return
        for word in self._session_names() if words == "session" else words:
            if word.startswith(argument):
                yield Completion(word, -len(argument))

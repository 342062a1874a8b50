"""What each key does. What a key asks for, the REPL does."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from prompt_toolkit.application import get_app
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.filters import Condition, FilterOrBool, is_searching
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.keys import Keys

if TYPE_CHECKING:
    from kvchat.terminal.repl import Repl

# C0 but \t and \n, DEL and C1: nothing of what is pasted may act as a key or a control.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def clean_paste(text: str) -> str:
    """A paste as it goes into the input: newlines as they are meant, no other controls."""
    return _CONTROLS.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))


def make_bindings(actions: Repl) -> KeyBindings:
    """The keys of the input line; all other editing keys are prompt-toolkit's (emacs)."""
    keys = KeyBindings()
    _bind_editing(keys, actions)
    _bind_control(keys, actions)
    return keys


def _bind_editing(keys: KeyBindings, actions: Repl) -> None:
    @keys.add("enter", filter=~is_searching)
    def _(event: KeyPressEvent) -> None:
        """Send, or break the line after a backslash."""
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor(1)
            buffer.insert_text("\n")
            return
        text = buffer.text
        if text.strip():
            buffer.reset(append_to_history=True)
        actions.submit(text)

    @keys.add("escape", "enter", filter=~is_searching)
    @keys.add("c-j", filter=~is_searching)
    def _(event: KeyPressEvent) -> None:
        """Break the line."""
        event.current_buffer.insert_text("\n")

    @keys.add("tab", filter=~is_searching)
    def _(event: KeyPressEvent) -> None:
        """Complete what there is one way to complete, else go through the ways."""
        buffer = event.current_buffer
        asked = CompleteEvent(completion_requested=True)
        found = [*buffer.completer.get_completions(buffer.document, asked)]
        if len(found) == 1:
            buffer.apply_completion(found[0])
        elif buffer.complete_state:
            buffer.complete_next()
        else:
            buffer.start_completion(insert_common_part=True)

    @keys.add(Keys.BracketedPaste, filter=~is_searching)
    def _(event: KeyPressEvent) -> None:
        """Insert a paste whole; it is never sent by itself."""
        text = clean_paste(event.data)
        event.current_buffer.insert_text(text)
        actions.pasted(len(text.splitlines()))


def _bind_control(keys: KeyBindings, actions: Repl) -> None:
    is_empty = Condition(lambda: not get_app().current_buffer.text)

    def bind(key: str, action: Callable[[], None], filter: FilterOrBool = True) -> None:
        keys.add(key, filter=filter)(lambda event: action())

    bind("c-c", actions.interrupt, ~is_searching)
    bind("<sigint>", actions.interrupt)
    bind("c-d", actions.leave, ~is_searching & is_empty)
    bind("c-l", lambda: actions.screen.clear())
    bind("c-z", lambda: actions.screen.suspend())
    for number in range(1, 10):
        keys.add("escape", str(number))(lambda event, n=number: actions.switch_to(n))

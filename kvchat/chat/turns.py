"""The tree of turns one session has been through. Knows texts and tokens; never the engine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from kvchat.chat.messages import Message
from kvchat.chat.prompt import Span


@dataclass(eq=False)
class Turn:
    """One exchange; the root is an empty one. Paths from the root are conversations.

    The tokens of a path are its parent's first `num_kept` spans, then `spans`. `branch` is the
    number the sampler's random stream has for this reply and, on this path, for those after it.
    """

    parent: Turn | None = None
    user: str = ""
    branch: int = 0
    content: str = ""
    reasoning: str = ""
    finish_reason: str | None = None  # None: the reply is being made
    num_kept: int = 0
    spans: list[Span] = field(default_factory=list)
    num_tokens: int = 0  # of the whole path
    children: list[Turn] = field(default_factory=list)
    last_child: Turn | None = None  # where redo goes

    def path(self) -> list[Turn]:
        """Turns from the first to this one, without the root."""
        turns: list[Turn] = []
        turn = self
        while turn.parent is not None:
            turns.append(turn)
            turn = turn.parent
        return turns[::-1]

    def path_spans(self) -> list[Span]:
        """The tokens of the whole path, prompt and replies, as the model saw them."""
        spans: list[Span] = []
        for turn in self.path():
            del spans[turn.num_kept :]
            spans += turn.spans
        return spans

    def messages(self) -> list[Message]:
        """The path's messages, without a system text; a reply being made is not among them."""
        messages: list[Message] = []
        for turn in self.path():
            messages.append(Message("user", turn.user))
            if turn.finish_reason is not None:
                messages.append(Message("assistant", turn.content, turn.reasoning))
        return messages

    def add_child(self, child: Turn) -> None:
        """Hang `child` below this turn and make it redo's way."""
        self.children.append(child)
        self.last_child = child

    def copy_path(self, branch: int) -> tuple[Turn, Turn]:
        """Root and end of a tree of this path alone, the end being on `branch`."""
        root = leaf = Turn()
        for turn in self.path():
            copy = replace(turn, parent=leaf, children=[], last_child=None)
            leaf.add_child(copy)
            leaf = copy
        leaf.branch = branch
        return root, leaf


@dataclass(frozen=True, slots=True)
class TreeRow:
    """One line of a drawn tree; `depth` is how often the path to it has parted from others."""

    depth: int
    user: str
    is_on_path: bool  # from the root to where the session stands


def tree_rows(root: Turn, leaf: Turn) -> Iterator[TreeRow]:
    """All turns, depth first, in the order they were made."""
    on_path = {id(turn) for turn in leaf.path()}
    todo = [(0, turn) for turn in reversed(root.children)]
    while todo:
        depth, turn = todo.pop()
        yield TreeRow(depth, turn.user, id(turn) in on_path)
        below = depth + (len(turn.children) > 1)
        todo += [(below, child) for child in reversed(turn.children)]

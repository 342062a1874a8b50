"""Messages to prompt pieces. Knows templates and the tokenizer; never sessions or the engine.

Content cannot become a role marker. Before rendering, each marker inside content is broken with a
*joint*, a character that no content holds; the rendered text is cut at the joints, and only what
lies between them is searched for markers. The joints vanish, so the text stays what was typed.
Markers are the tokenizer's, and the lines of text that the template itself puts around content.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from kvchat.chat import sandbox
from kvchat.chat.formats import BUILTIN_FORMATS, PLAIN
from kvchat.chat.messages import Message
from kvchat.chat.options import generation_defaults
from kvchat.chat.probe import Probe
from kvchat.chat.reply import THINK_START
from kvchat.chat.tokenizer import Piece, StreamDecoder, Tokenizer
from kvchat.chat.worker import TemplateWorker
from kvchat.errors import UsageError, quoted
from kvchat.model.source import ModelSource

# Noncharacters first: text that is meant for exchange does not hold them.
JOINTS = [chr(code) for code in (*range(0xFDD0, 0xFDF0), *range(0xF0000, 0xF1000))]

_WIDE = "＜ﬁ"  # what NFKC normalises to other characters

Render = Callable[[str, Sequence[Mapping[str, object]]], list[dict[str, str]]]


class ChatFormat:
    """How one model's conversations are written. Made by `load_chat_format`."""

    def __init__(self, name: str, template: str, tokenizer: Tokenizer, render: Render) -> None:
        self.name = name
        self.tokenizer = tokenizer
        self._template = template
        self._render = render
        self.is_plain = name == PLAIN
        self._is_builtin = name in BUILTIN_FORMATS
        self.can_think = not self.is_plain and (
            THINK_START in template or THINK_START in tokenizer.markers
        )
        self.has_think_switch = "enable_thinking" in template
        probe = Probe(self._render_dicts)
        self.has_system = probe.has_system
        self.reply_lead = probe.reply_lead  # white space the template puts before a reply
        fragments = () if self.is_plain else probe.fragments(tokenizer)
        self.markers = dict.fromkeys(tokenizer.markers, 1)
        self.markers |= {f: _weak_point(tokenizer, f) for f in fragments}
        self._is_normalizing = tokenizer.decode(tokenizer.encode(_WIDE)) != _WIDE
        names = sorted(self.markers, key=len, reverse=True)
        self._structure = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        end = None if self.is_plain else probe.end_of_turn(tokenizer)
        self.stop_token_ids = frozenset([end.marker.token_id] if end and end.marker else [])
        self.sampling_defaults: dict[str, object] = {}  # by SamplingParams' names
        self.stop_strings = (end.text,) if end and not end.marker else ()

    def require_think_switch(self) -> None:
        """Raises UsageError where the template cannot be told whether to think."""
        if not self.has_think_switch:
            raise UsageError("this model's template has no switch for thinking")

    def pieces(self, messages: Sequence[Message], think: bool | None = None) -> list[Piece]:
        """The prompt for the next reply. Raises UsageError where the template refuses."""
        joint = _free_joint(messages)
        if not self.has_system:
            messages = _merge_system(messages)
        broken = [_map_content(m, lambda text: self._break(text, joint)) for m in messages]
        blank = [_map_content(m, lambda text: "x" if text else "") for m in messages]
        text, empty = self._render_checked([broken, blank], think)
        if self._count_markers(text) != self._count_markers(empty):
            # content met template text and made a marker with it: keep them apart everywhere
            apart = [_map_content(m, lambda text: joint + text + joint) for m in broken]
            (text,) = self._render_checked([apart], think)
        return self._split(text, joint)

    def _break(self, text: str, joint: str) -> str:
        """`text` with a joint inside every marker."""
        if self._is_normalizing and not text.isascii():
            seen = self.tokenizer.decode(self.tokenizer.encode(text))
            text = seen if self._structure.search(seen) else text  # markers in disguise
        for marker, at in self.markers.items():
            # A marker of one token a character has the same tokens however it is cut: such a
            # vocabulary (no real model's) costs the text a space.
            broken = marker[:at] + joint + marker[at:] if at else f"{marker[0]} {marker[1:]}"
            while marker in text:
                text = text.replace(marker, broken)
        return text

    def _count_markers(self, text: str) -> Counter[str]:
        return Counter(self._structure.findall(text))

    def _split(self, text: str, joint: str) -> list[Piece]:
        pieces: list[Piece] = []
        bos = self.tokenizer.bos if self._is_builtin else None
        if bos is not None:
            pieces.append(Piece(bos.text, bos))
        at_start = True
        for part in text.split(joint):
            pieces += self.tokenizer.split(part, at_start)
            is_marker_last = bool(pieces) and pieces[-1].marker is not None
            at_start = is_marker_last and self.tokenizer.has_inner_prefix
        return pieces

    def _render_checked(
        self, conversations: Sequence[Sequence[Message]], think: bool | None
    ) -> list[str]:
        answers = self._render_dicts(conversations, think)
        for answer in answers:
            if "error" in answer:
                raise UsageError(f"the model's chat template says: {quoted(answer['error'], 200)}")
        return [answer["text"] for answer in answers]

    def _render_dicts(
        self,
        conversations: Sequence[Sequence[Message]],
        think: bool | None = None,
        add_generation_prompt: bool = True,
    ) -> list[dict[str, str]]:
        options: dict[str, object] = {} if think is None else {"enable_thinking": think}
        options |= {"bos_token": "", "eos_token": "", **self.tokenizer.special}
        options |= {"tools": None, "documents": None}
        options["add_generation_prompt"] = add_generation_prompt
        contexts = [
            {"messages": [_as_dict(m) for m in messages], **options} for messages in conversations
        ]
        return self._render(self._template, contexts)


def _map_content(message: Message, change: Callable[[str], str]) -> Message:
    """The message with its texts changed; empty ones stay empty, templates look at that."""
    content, reasoning = (change(t) if t else "" for t in (message.content, message.reasoning))
    return Message(message.role, content, reasoning)


def _as_dict(message: Message) -> dict[str, str]:
    """A message as templates know it."""
    record = {"role": message.role, "content": message.content}
    return record | ({"reasoning_content": message.reasoning} if message.reasoning else {})


def _merge_system(messages: Sequence[Message]) -> list[Message]:
    """For templates without a system role: its text goes before the first turn's."""
    if not messages or messages[0].role != "system":
        return list(messages)
    system, *others = messages
    if others:
        others[0] = Message(others[0].role, f"{system.content}\n\n{others[0].content}")
    return others


def _free_joint(messages: Sequence[Message]) -> str:
    """A character that none of the contents holds."""
    for joint in JOINTS:
        if not any(joint in m.content or joint in m.reasoning for m in messages):
            return joint
    raise UsageError(
        "the conversation holds every private-use character; nothing can mark its roles"
    )


def _weak_point(tokenizer: Tokenizer, text: str) -> int:
    """Where to cut `text` so that its parts never have the tokens of the whole: inside a token.
    0 when every token is one character."""
    ends: set[int] = set()
    for at_start in (True, False):
        decoder, num_chars = StreamDecoder(tokenizer, at_start), 0
        for token_id in tokenizer.encode(text, at_start):
            num_chars += len(decoder.feed((token_id,)))
            ends.add(num_chars)
    inside = [at for at in range(1, len(text)) if at not in ends]
    return inside[len(inside) // 2] if inside else 0


def load_chat_format(source: ModelSource, tokenizer: Tokenizer, name: str | None) -> ChatFormat:
    """The format called `name`, else the model's own template, else plain continuation.

    Raises UsageError for a name that is none, ModelError for a template that cannot be used.
    """
    if name is not None and name not in BUILTIN_FORMATS:
        known = ", ".join(BUILTIN_FORMATS)
        raise UsageError(f'no chat format is called "{quoted(name)}"; there are {known}')
    if name is None and source.chat_template:
        render = TemplateWorker().render
        chat_format = ChatFormat("the model's own", source.chat_template, tokenizer, render)
    else:
        name = name or PLAIN
        chat_format = ChatFormat(name, BUILTIN_FORMATS[name], tokenizer, sandbox.render)
    chat_format.stop_token_ids |= _end_ids(source, tokenizer)
    chat_format.sampling_defaults = generation_defaults(source.generation_config)
    return chat_format


def _end_ids(source: ModelSource, tokenizer: Tokenizer) -> frozenset[int]:
    """Every id that one of the model's files calls the end of a text, and BOS: base models say it
    between two texts."""
    texts = [tokenizer.special.get(name, "") for name in ("eos_token", "bos_token")]
    ids: list[object] = [tokenizer.markers[t].token_id for t in texts if t in tokenizer.markers]
    for config in (source.config, source.generation_config):
        named = config.get("eos_token_id")
        ids += named if isinstance(named, list) else [named]
    return frozenset(i for i in ids if isinstance(i, int))

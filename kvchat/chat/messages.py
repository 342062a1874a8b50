"""What a conversation is made of, and how it leaves kvchat: plain records and their exports."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Message:
    """One message; `reasoning` is what a model thought before it answered."""

    role: str  # system | user | assistant
    content: str
    reasoning: str = ""


def as_markdown(title: str, messages: Iterable[Message]) -> str:
    """The conversation for people; reasoning is quoted."""
    parts = [f"# {title}"]
    for message in messages:
        parts.append(f"## {message.role.capitalize()}")
        if message.reasoning:
            parts.append("\n".join(f"> {line}".rstrip() for line in message.reasoning.splitlines()))
        parts.append(message.content.strip("\n"))
    return "\n\n".join(parts) + "\n"


def as_jsonl(messages: Iterable[Message]) -> str:
    """The conversation for programs: one JSON object a line."""
    lines = []
    for message in messages:
        record = {"role": message.role, "content": message.content}
        if message.reasoning:
            record["reasoning"] = message.reasoning
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    return "".join(lines)

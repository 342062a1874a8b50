"""A session's settings by name, the names being llama.cpp's. Parses, checks and shows them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from kvchat.config import SamplingParams
from kvchat.errors import ModelError, UsageError, quoted

Value = float | int | bool | None | tuple[str, ...]


@dataclass(frozen=True)
class Option:
    """One setting: the SamplingParams field it sets and how its text is read."""

    field: str
    parse: Callable[[str], Value]
    hint: str  # what values there are, for messages and help


def _number(low: float, high: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = float(text)
        if not low <= value <= high:
            raise ValueError
        return value

    return parse


def _count(low: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text)
        if not low <= value < 1 << 31:
            raise ValueError
        return value

    return parse


def parse_switch(text: str) -> bool:
    """on or off, in the usual words."""
    words = {"on": True, "true": True, "1": True, "off": False, "false": False, "0": False}
    if text.lower() not in words:
        raise ValueError
    return words[text.lower()]


def _max_tokens(text: str) -> int | None:
    return None if text == "-1" else _count(1)(text)


def _stop(text: str) -> tuple[str, ...]:
    """One string, or a JSON list of strings; empty clears. JSON escapes (\\n) are understood."""
    if not text.startswith(("[", '"')):
        text = '"' + text.replace('"', '\\"') + '"'
    value = json.loads(text)
    words = value if isinstance(value, list) else [value]
    if not all(isinstance(word, str) and len(word) <= 256 for word in words):
        raise ValueError
    return tuple(word for word in words if word)


# What generation_config.json may say that is about sampling.
_GENERATION_FIELDS = frozenset(
    ("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty")
)

OPTIONS = {
    "temp": Option("temperature", _number(0, 100), "0 (greedy) to 100"),
    "top_k": Option("top_k", _count(0), "a count, 0 is off"),
    "top_p": Option("top_p", _number(0, 1), "0 to 1, 1 is off"),
    "min_p": Option("min_p", _number(0, 1), "0 to 1, 0 is off"),
    "typical_p": Option("typical_p", _number(0, 1), "0 to 1, 1 is off"),
    "repeat_penalty": Option("repetition_penalty", _number(0.01, 100), "1 is off"),
    "frequency_penalty": Option("frequency_penalty", _number(-100, 100), "0 is off"),
    "presence_penalty": Option("presence_penalty", _number(-100, 100), "0 is off"),
    "repeat_last_n": Option("penalty_last_n", _count(-1), "tokens, 0 is off, -1 the context"),
    "dry_multiplier": Option("dry_multiplier", _number(0, 100), "0 is off"),
    "dry_base": Option("dry_base", _number(1, 100), "1 to 100"),
    "dry_allowed_length": Option("dry_allowed_length", _count(1), "tokens"),
    "dry_penalty_last_n": Option("dry_last_n", _count(-1), "tokens, 0 is off, -1 the context"),
    "n": Option("max_tokens", _max_tokens, "tokens a reply may have, -1 is no limit"),
    "stop": Option("stop", _stop, 'text that ends a reply, or a list: ["a", "b"]'),
    "ignore_eos": Option("ignore_eos", parse_switch, "on or off"),
}


def set_sampling(sampling: SamplingParams, name: str, text: str) -> SamplingParams:
    """`sampling` with one option set from its text. Raises UsageError."""
    option = OPTIONS.get(name)
    if option is None:
        raise UsageError(
            f'no option is called "{quoted(name)}"; there are {", ".join(OPTIONS)}, seed and think'
        )
    try:
        value = option.parse(text.strip())
    except ValueError:
        raise UsageError(f'{name} cannot be "{quoted(text)}": {option.hint}') from None
    changes: dict[str, Value] = {option.field: value}
    return replace(sampling, **changes)  # type: ignore[arg-type]


def sampling_options(sampling: SamplingParams) -> dict[str, Value]:
    """Every option's value, by name."""
    return {name: getattr(sampling, option.field) for name, option in OPTIONS.items()}


def generation_defaults(config: Mapping[str, object]) -> dict[str, object]:
    """What generation_config.json says about sampling, by SamplingParams' names. Raises ModelError
    for a value no one can mean."""
    found: dict[str, object] = {}
    for option in OPTIONS.values():
        value = config.get(option.field)
        if option.field in _GENERATION_FIELDS and isinstance(value, int | float):
            try:
                found[option.field] = option.parse(f"{value:g}")
            except ValueError:
                raise ModelError(
                    f"generation_config.json: {option.field} = {value} is not allowed "
                    f"({option.hint})"
                ) from None
    if config.get("do_sample") is False:
        found["temperature"] = 0.0
    return found

"""A session's settings by name, the names being llama.cpp's. Parses, checks and shows them."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from kvchat.config import SamplingParams
from kvchat.errors import ModelError, UsageError, quoted

MAX_SEED = 1 << 32

Value = float | int | bool | None | tuple[str, ...]


@dataclass(frozen=True)
class Option:
    """One setting: the SamplingParams field it sets, how its text is read (ValueError: it cannot
    be), the values it may have, and what to say about them."""

    field: str
    parse: Callable[[str], Value]
    hint: str
    low: float = float("-inf")
    high: float = 1 << 31

    def read(self, text: str) -> Value:
        """The value that `text` means. Raises ValueError."""
        value = self.parse(text.strip())
        if isinstance(value, int | float) and not self.low <= value <= self.high:
            raise ValueError
        return value


def parse_switch(text: str) -> bool:
    """on or off, in the usual words. Raises ValueError."""
    words = {"on": True, "true": True, "1": True, "off": False, "false": False, "0": False}
    if text.lower() not in words:
        raise ValueError
    return words[text.lower()]


def _max_tokens(text: str) -> int | None:
    return None if text == "-1" else int(text)


def _stop(text: str) -> tuple[str, ...]:
    """One string, or a JSON list of strings; escapes such as \\n are understood, empty clears."""
    if not text.startswith(("[", '"')):
        text = '"' + text.replace('"', '\\"') + '"'
    value = json.loads(text)
    words = value if isinstance(value, list) else [value]
    if not all(isinstance(word, str) and len(word) <= 256 for word in words):
        raise ValueError
    return tuple(word for word in words if word)


OPTIONS = {
    "temp": Option("temperature", float, "0 (greedy) to 100", 0, 100),
    "top_k": Option("top_k", int, "a count, 0 is off", 0),
    "top_p": Option("top_p", float, "0 to 1, 1 is off", 0, 1),
    "min_p": Option("min_p", float, "0 to 1, 0 is off", 0, 1),
    "typical_p": Option("typical_p", float, "0 to 1, 1 is off", 0, 1),
    "repeat_penalty": Option("repetition_penalty", float, "1 is off", 0.01, 100),
    "frequency_penalty": Option("frequency_penalty", float, "0 is off", -100, 100),
    "presence_penalty": Option("presence_penalty", float, "0 is off", -100, 100),
    "repeat_last_n": Option("penalty_last_n", int, "tokens, 0 is off, -1 the context", -1),
    "dry_multiplier": Option("dry_multiplier", float, "0 is off", 0, 100),
    "dry_base": Option("dry_base", float, "1 to 100", 1, 100),
    "dry_allowed_length": Option("dry_allowed_length", int, "tokens", 1),
    "dry_penalty_last_n": Option("dry_last_n", int, "tokens, 0 is off, -1 the context", -1),
    "n": Option("max_tokens", _max_tokens, "tokens a reply may have, -1 is no limit", 1),
    "stop": Option("stop", _stop, 'text that ends a reply, or a list: ["a", "b"]'),
    "ignore_eos": Option("ignore_eos", parse_switch, "on or off"),
}
# What generation_config.json may say that is about sampling.
_GENERATION_NAMES = ("temp", "top_k", "top_p", "min_p", "typical_p", "repeat_penalty")


def set_sampling(sampling: SamplingParams, name: str, text: str) -> SamplingParams:
    """`sampling` with one option set from its text. Raises UsageError."""
    option = OPTIONS.get(name)
    if option is None:
        raise UsageError(
            f'no option is called "{quoted(name)}"; there are {", ".join(OPTIONS)}, seed and think'
        )
    try:
        changes = {option.field: option.read(text)}
    except ValueError:
        raise UsageError(f'{name} cannot be "{quoted(text)}": {option.hint}') from None
    return replace(sampling, **changes)  # type: ignore[arg-type]


def sampling_options(sampling: SamplingParams) -> dict[str, Value]:
    """Every option's value, by name."""
    return {name: getattr(sampling, option.field) for name, option in OPTIONS.items()}


def generation_defaults(config: Mapping[str, object]) -> dict[str, object]:
    """What generation_config.json says about sampling, by SamplingParams' names. Raises ModelError
    for a value no one can mean."""
    found: dict[str, object] = {}
    for option in (OPTIONS[name] for name in _GENERATION_NAMES):
        value = config.get(option.field)
        if isinstance(value, int | float):
            try:
                found[option.field] = option.read(f"{value:g}")
            except ValueError:
                raise ModelError(
                    f"generation_config.json: {option.field} = {value} is not allowed: "
                    f"{option.hint}"
                ) from None
    return found | ({"temperature": 0.0} if config.get("do_sample") is False else {})


def read_seed(text: str) -> int:
    """A seed, or -1 for a new random one, as in llama.cpp. Raises UsageError."""
    try:
        seed = int(text)
    except ValueError:
        seed = MAX_SEED
    if not -1 <= seed < MAX_SEED:
        raise UsageError(f"seed must be 0 to {MAX_SEED - 1}, or -1 for a random one")
    return random_seed() if seed == -1 else seed


def random_seed() -> int:
    """A seed nobody chose."""
    return secrets.randbelow(MAX_SEED)

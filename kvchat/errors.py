"""Errors that are shown to a person: what happened, the value seen, what to do. One line each.

KvchatError
  UsageError       2  a flag, path, command or input is wrong
  ModelError       3  a model folder or file is refused
  CapacityError    4  it does not fit: memory, pool or context
  EngineError      4  the engine could not go on with a request
"""


class KvchatError(Exception):
    """Base of every error a person may see; `exit_code` is what the process ends with."""

    exit_code = 2


class UsageError(KvchatError):
    """A flag, path, command or input that cannot be used as given."""


class ModelError(KvchatError):
    """A model folder or file that kvchat refuses, by name and with what would work."""

    exit_code = 3


class CapacityError(KvchatError):
    """Something that does not fit, with the largest size that would."""

    exit_code = 4


class EngineError(KvchatError):
    """A request the engine could not go on with; other sessions are not affected."""

    exit_code = 4


def quoted(text: str, limit: int = 80) -> str:
    """Foreign text for an error line: printable, escaped, the middle cut when above `limit`."""
    if len(text) > limit:
        text = text[: limit // 2] + "..." + text[-(limit // 2) :]
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )

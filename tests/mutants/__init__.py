"""Seeded bugs: a module's source with a snippet replaced, executed in memory, to be caught.

A mutant proves that a check can fail. `load` refuses a snippet that is not in the source exactly
once, so that no mutant vanishes when the code changes.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType


@dataclass(frozen=True)
class Mutant:
    """`edits` are (snippet, replacement) pairs in the source of `module`, a dotted name."""

    name: str
    module: str
    edits: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        return self.name.replace(" ", "-")


def load(mutant: Mutant) -> ModuleType:
    """A fresh module with the edits in it; what others have imported stays as it is."""
    source = inspect.getsource(importlib.import_module(mutant.module))
    for old, new in mutant.edits:
        count = source.count(old)
        assert count == 1, f"{mutant.name}: {count} times in {mutant.module}, not once: {old!r}"
        source = source.replace(old, new)
    module = ModuleType(mutant.module)
    module.__file__ = f"<{mutant.name}>"
    exec(compile(source, module.__file__, "exec"), module.__dict__)
    return module


def kill(mutant: Mutant, check: Callable[[ModuleType], object]) -> Exception:
    """Run `check` on the mutated module; what it raised. Surviving is an AssertionError.

    A NameError or a failed import means that the edit is broken, not that the check works.
    """
    module = load(mutant)
    try:
        check(module)
    except Exception as error:
        cause = error
        while cause is not None:
            assert not isinstance(cause, (NameError, ImportError)), f"{mutant.name}: {cause!r}"
            cause = cause.__cause__
        return error
    raise AssertionError(f"the mutant survived: {mutant.name}")

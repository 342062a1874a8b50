"""Seeded bugs: a module's source with a snippet replaced, executed in memory, to be caught.

A mutant proves that a check can fail. `load` refuses a snippet that is not in the source exactly
once, so that no mutant vanishes when the code changes.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from unittest import mock


@dataclass(frozen=True)
class Mutant:
    """`edits` are (snippet, replacement) pairs in the source of `module`, a dotted name."""

    name: str
    module: str
    edits: tuple[tuple[str, str], ...]
    user: str = ""  # the module to be checked, where that is one that imports `module`

    def __str__(self) -> str:
        return self.name.replace(" ", "-")


def load(mutant: Mutant) -> ModuleType:
    """A fresh module with the edits in it; what others have imported stays as it is.

    Where the mutant has a `user`, that one, fresh too, over the edited one.
    """
    source = inspect.getsource(importlib.import_module(mutant.module))
    for old, new in mutant.edits:
        count = source.count(old)
        assert count == 1, f"{mutant.name}: {count} times in {mutant.module}, not once: {old!r}"
        source = source.replace(old, new)
    module = _execute(mutant.module, source, mutant.name)
    if not mutant.user:
        return module
    with mock.patch.dict(sys.modules, {mutant.module: module}):
        return _execute(
            mutant.user, inspect.getsource(importlib.import_module(mutant.user)), mutant.name
        )


def _execute(module_name: str, source: str, mutant_name: str) -> ModuleType:
    module = ModuleType(module_name)
    module.__file__ = f"<{mutant_name}>"
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


def assemble(module: ModuleType) -> ModuleType:
    """A fresh scheduler module that is built on this one of its parts."""
    if module.__name__ == "kvchat.engine.scheduler":
        return module
    scheduler = load(Mutant("none", "kvchat.engine.scheduler", ()))
    memory = load(Mutant("none", "kvchat.engine.memory", ()))
    scheduler.Memory = memory.Memory
    if module.__name__ == "kvchat.engine.memory":
        scheduler.Memory = module.Memory
    elif module.__name__ == "kvchat.engine.residents":
        memory.Residents = module.Residents
    elif module.__name__ == "kvchat.kv.ladder":
        memory.Ladder = module.Ladder
        memory.Holder = module.Holder
    else:
        scheduler.Roster = module.Roster
    return scheduler

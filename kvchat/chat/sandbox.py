"""Renders a model's own chat template. Run as a script, it is a process of its own that can be
killed: templates come with models, and jinja's sandbox bounds neither time nor memory.

One line of JSON in: {"template": source, "contexts": [{...}]}. One line out: a list with one
{"text": ...} or {"error": ...} for each context. Imports nothing of kvchat's.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jinja2 import Template

MAX_MEMORY_BYTES = 1 << 30  # of the rendering process, where the system can bound it
MAX_CPU_S = 20  # of one request, should nobody be left to kill the process
MAX_OUTPUT_CHARS = 1 << 26


def render(template: str, contexts: Sequence[Mapping[str, object]]) -> list[dict[str, str]]:
    """One {"text": ...} or {"error": ...} for each context."""
    return [_render_one(template, context) for context in contexts]


def _render_one(template: str, context: Mapping[str, object]) -> dict[str, str]:
    parts: list[str] = []
    num_chars = 0
    try:
        for part in _compile(template).generate(**context):
            parts.append(part)
            num_chars += len(part)
            if num_chars > MAX_OUTPUT_CHARS:
                return {"error": f"it makes more than {MAX_OUTPUT_CHARS:,} characters"}
    except Exception as error:  # whatever a template raises is the template's error
        line = getattr(error, "lineno", None)
        return {"error": (f"line {line}: " if line else "") + (str(error) or type(error).__name__)}
    return {"text": "".join(parts)}


@lru_cache(maxsize=8)
def _compile(template: str) -> Template:
    """As transformers does it, so that templates mean the same here."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks what a model said, for training: here only its body counts."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> str:
        raise TemplateError(message)

    def to_json(value: object, ensure_ascii: bool = False, **options: object) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)  # type: ignore[arg-type]

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


def _bound_process() -> None:
    """Limits for memory and for the next request's time, where the system knows them."""
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF)
    cpu_s = int(used.ru_utime + used.ru_stime) + MAX_CPU_S
    for limit, value in ((resource.RLIMIT_AS, MAX_MEMORY_BYTES), (resource.RLIMIT_CPU, cpu_s)):
        _, hard = resource.getrlimit(limit)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(limit, (value, hard))


def main() -> None:
    """Serve requests from stdin until it is closed."""
    for line in sys.stdin:
        _bound_process()
        request = json.loads(line)
        print(json.dumps(render(request["template"], request["contexts"])), flush=True)


if __name__ == "__main__":
    main()

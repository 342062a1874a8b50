"""The process that renders a model's own chat template: asked, timed and, if need be, killed."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence

from kvchat.chat import sandbox
from kvchat.chat.formats import BUILTIN_FORMATS
from kvchat.errors import ModelError

RENDER_TIMEOUT_S = 5.0


class TemplateWorker:
    """Renders in a process of its own, started when first asked and ended with this object."""

    def __init__(self, timeout_s: float = RENDER_TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._process: subprocess.Popen[str] | None = None
        self._end: Callable[[], object] = lambda: None

    def render(
        self, template: str, contexts: Sequence[Mapping[str, object]]
    ) -> list[dict[str, str]]:
        """As sandbox.render. Raises ModelError when it takes too long or dies."""
        process = self._started()
        assert process.stdin and process.stdout, "started without pipes"
        timer = threading.Timer(self._timeout_s, process.kill)
        timer.start()
        line = ""
        try:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps({"template": template, "contexts": contexts}) + "\n")
                process.stdin.flush()
                line = process.stdout.readline()
        finally:
            timer.cancel()
            if not line:
                self.close()
        if not line:
            raise ModelError(
                f"the model's chat template took more than {self._timeout_s:g} s or too much "
                f"memory; choose a built-in one: --chat-format {'|'.join(BUILTIN_FORMATS)}"
            )
        answers: list[dict[str, str]] = json.loads(line)
        return answers

    def close(self) -> None:
        """End the process; the next request starts another."""
        self._end()
        self._process = None

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-P", sandbox.__file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                start_new_session=True,  # Ctrl-C is for the chat, not for its template
            )
            self._end = weakref.finalize(self, _end_process, self._process)
        return self._process


def _end_process(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(BrokenPipeError):
            if pipe is not None:
                pipe.close()

"""llama.cpp's side: its own two benchmarks, a process for each repetition.

Read is samples_ts of `llama-bench -o json`, and pp, tg, pl, t_pp, t_tg, speed_pp and speed_tg of
`llama-batched-bench --output-format jsonl`, as build 5163 (April 2025, the first kind with -d) and
later ones print them. Both draw their tokens at random and choose none.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from comparison.table import Missing, Run, Sample, Shape

_TYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
_TIMEOUT_S = 600


class LlamaCpp:
    """`single` is the path of llama-bench, `batched` that of llama-batched-bench."""

    def __init__(
        self,
        single: Path | None,
        batched: Path | None,
        gguf: Path | None,
        dtype: str,
        device: str,
        num_threads: int,
    ) -> None:
        self._single, self._batched, self._gguf = single, batched, gguf
        self._kv_type = _TYPES[dtype]
        self._common = ["-t", str(num_threads), "-ngl", "0" if device == "cpu" else "99"]

    def programs(self, shape: Shape) -> dict[str, Run]:
        """The one that measures so many chats."""
        if shape.num_sessions == 1:
            return {"llama-bench": self.run_single}
        return {"llama-batched-bench": self.run_batched}

    def run_single(self, shape: Shape, pair: int) -> Sample:
        """llama-bench: the prompt, and apart from it the reply after as many tokens."""
        # it knows no cache of 32 bits
        kv_type = "f16" if self._kv_type == "f32" else self._kv_type
        command = [*self._command(self._single, "--llama-bench"), "-o", "json", "-r", "1"]
        command += ["-ctk", kv_type, "-ctv", kv_type]
        pp = ["-p", str(shape.num_prompt), "-n", "0"]
        tg = ["-p", "0", "-n", str(shape.num_reply), "-d", str(shape.num_prompt)]
        read, written = (_speed(_records(_output([*command, *test]))) for test in (pp, tg))
        whole_s = shape.num_prompt / read + shape.num_reply / written
        return Sample(read, written, shape.num_reply / whole_s)

    def run_batched(self, shape: Shape, pair: int) -> Sample:
        """llama-batched-bench: all prompts, then all replies."""
        num_tokens = shape.num_sessions * (shape.num_prompt + shape.num_reply)
        command = [
            *self._command(self._batched, "--llama-batched-bench"),
            *("--output-format", "jsonl", "-c", str(num_tokens)),
            *("-ctk", self._kv_type, "-ctv", self._kv_type),
            *("-npp", str(shape.num_prompt), "-ntg", str(shape.num_reply)),
            *("-npl", str(shape.num_sessions)),
        ]
        found = _records(_output(command))[0]
        assert (found["pp"], found["tg"], found["pl"]) == (
            shape.num_prompt,
            shape.num_reply,
            shape.num_sessions,
        ), f"llama-batched-bench measured something else: {found}"
        num_replies = shape.num_sessions * shape.num_reply
        whole = num_replies / (found["t_pp"] + found["t_tg"])
        return Sample(found["speed_pp"], found["speed_tg"], whole)

    def _command(self, binary: Path | None, flag: str) -> list[str]:
        if binary is None:
            raise Missing(f"not named ({flag} PATH)")
        if self._gguf is None:
            raise Missing("no model named (--gguf FILE, the same weights)")
        return [str(binary), "-m", str(self._gguf), *self._common]


def _output(command: list[str]) -> str:
    """What the program prints. Raises Missing when it cannot run or fails."""
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Missing(f"does not run ({type(error).__name__})") from None
    if ran.returncode:
        last = (ran.stderr.strip() or "no word").splitlines()[-1][:120]
        raise Missing(f"ended with {ran.returncode}: {last}")
    return ran.stdout


def _records(text: str) -> list[dict[str, Any]]:
    """A JSON list, or JSON objects on lines of their own between others. Raises Missing."""
    try:
        if text.lstrip().startswith("["):
            found: list[dict[str, Any]] = json.loads(text)
        else:
            lines = [line for line in text.splitlines() if line.startswith("{")]
            found = [json.loads(line) for line in lines]
    except ValueError:
        found = []
    if not found:
        raise Missing("printed no result")
    return found


def _speed(records: list[dict[str, Any]]) -> float:
    (record,) = records
    (speed,) = record["samples_ts"]
    return float(speed)

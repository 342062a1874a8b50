"""python -m gpu_checks.ready SHAPE: seconds from the start of a process to its first token.

The checkpoint is a file of zeros with holes, so it takes no disk; the first of two runs brings it
into the page cache and fills the cache of compiled kernels. Tokenizer and template are not in the
times. A line of JSON each run.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from hollow_model import write_zeros

from kvchat.bench.shapes import find_shape

_NUM_RUNS = 2
_NUM_PROMPT = 16


def first_token(folder: str) -> None:
    """Build the engine as `kvchat run` does, and generate one token."""
    from kvchat.config import SamplingParams
    from kvchat.engine.build import EngineOptions, build_engine
    from kvchat.engine.request import Request
    from kvchat.model.families import parse_config
    from kvchat.model.source import resolve

    source = resolve(folder)
    events: list = []
    engine, facts = build_engine(
        source, parse_config(source), EngineOptions(), lambda *_: None, events.extend, frozenset()
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
    engine.submit(Request(1, 1, [1] * _NUM_PROMPT, _NUM_PROMPT, sampling))
    while not events:
        engine.step()
    assert events[0].token_ids, events
    print(f"a token on {facts.device}, {facts.scheduler.num_blocks} blocks")


def main() -> None:
    """Times two processes."""
    with tempfile.TemporaryDirectory() as folder:
        write_zeros(Path(folder), find_shape(sys.argv[1]))
        for _ in range(_NUM_RUNS):
            started = time.perf_counter()
            code = f"from gpu_checks.ready import first_token; first_token({folder!r})"
            subprocess.run([sys.executable, "-P", "-c", code], check=True)
            print(json.dumps({"seconds": round(time.perf_counter() - started, 2)}), flush=True)


if __name__ == "__main__":
    main()

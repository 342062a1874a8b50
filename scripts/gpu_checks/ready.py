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

from kvchat.bench.shapes import find_shape
from kvchat.config import ModelConfig
from kvchat.model.families import tensor_shapes

_NUM_RUNS = 2
_NUM_PROMPT = 16


def write_zeros(folder: Path, config: ModelConfig) -> None:
    """A checkpoint of this shape, bfloat16, all zeros."""
    header: dict[str, dict] = {}
    end = 0
    for name, shape in tensor_shapes(config).items():
        start, end = end, end + 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "BF16", "shape": [*shape], "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    fields = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(fields))


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

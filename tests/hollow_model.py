"""Checkpoints of any size that take no disk: a header, then a hole."""

from __future__ import annotations

import json
from pathlib import Path

from kvchat.config import ModelConfig
from kvchat.model.families import tensor_shapes


def write_zeros(folder: Path, config: ModelConfig, dtype: str = "bfloat16") -> None:
    """A checkpoint of this shape, bfloat16 or float16, all zeros."""
    stored = {"bfloat16": "BF16", "float16": "F16"}[dtype]
    header: dict[str, dict] = {}
    end = 0
    for name, shape in tensor_shapes(config).items():
        start, end = end, end + 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": stored, "shape": [*shape], "data_offsets": [start, end]}
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
        "torch_dtype": dtype,
    }
    (folder / "config.json").write_text(json.dumps(fields))

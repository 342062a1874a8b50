"""Well-known models by name: their shapes, as their config.json has them. No weights, no torch."""

from __future__ import annotations

import difflib
from typing import Any

from kvchat.config import ModelConfig, RopeScaling
from kvchat.errors import UsageError, quoted


def _shape(
    widths: tuple[int, int, int],
    heads: tuple[int, int, int, int],
    max_position: int,
    rope_theta: float,
    **others: Any,  # noqa: ANN401
) -> ModelConfig:
    """widths: vocabulary, hidden, MLP; heads: layers, heads, KV heads, head_dim."""
    vocab_size, hidden_size, intermediate_size = widths
    num_layers, num_heads, num_kv_heads, head_dim = heads
    values: dict[str, Any] = {"family": "llama", "norm_eps": 1e-5, "checkpoint_dtype": "bfloat16"}
    values |= others
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position=max_position,
        rope_theta=rope_theta,
        **values,
    )


def _llama3_scaling(factor: float) -> RopeScaling:
    return RopeScaling("llama3", factor, 8192, low_freq_factor=1.0, high_freq_factor=4.0)


_QWEN2: dict[str, Any] = {"family": "qwen2", "norm_eps": 1e-6, "has_qkv_bias": True}
_QWEN3: dict[str, Any] = {"family": "qwen3", "norm_eps": 1e-6, "has_qk_norm": True}
_TIED = {"tie_word_embeddings": True}

SHAPES = {
    "stories15m": _shape(
        (32000, 288, 768), (6, 6, 6, 48), 256, 1e4, checkpoint_dtype="float32", **_TIED
    ),
    "stories42m": _shape(
        (32000, 512, 1376), (8, 8, 8, 64), 1024, 1e4, checkpoint_dtype="float32", **_TIED
    ),
    "smollm-135m": _shape((49152, 576, 1536), (30, 9, 3, 64), 2048, 1e4, **_TIED),
    "smollm2-1.7b": _shape((49152, 2048, 8192), (24, 32, 32, 64), 8192, 1.3e5, **_TIED),
    "tinyllama-1.1b": _shape((32000, 2048, 5632), (22, 32, 4, 64), 2048, 1e4),
    "llama2-7b": _shape(
        (32000, 4096, 11008), (32, 32, 32, 128), 4096, 1e4, checkpoint_dtype="float16"
    ),
    "llama2-13b": _shape(
        (32000, 5120, 13824), (40, 40, 40, 128), 4096, 1e4, checkpoint_dtype="float16"
    ),
    "llama3-8b": _shape((128256, 4096, 14336), (32, 32, 8, 128), 8192, 5e5),
    "llama3.1-8b": _shape(
        (128256, 4096, 14336), (32, 32, 8, 128), 131072, 5e5, rope_scaling=_llama3_scaling(8.0)
    ),
    "llama3.2-1b": _shape(
        (128256, 2048, 8192),
        (16, 32, 8, 64),
        131072,
        5e5,
        rope_scaling=_llama3_scaling(32.0),
        **_TIED,
    ),
    "llama3-70b": _shape((128256, 8192, 28672), (80, 64, 8, 128), 8192, 5e5),
    "mistral-7b": _shape((32768, 4096, 14336), (32, 32, 8, 128), 32768, 1e6, family="mistral"),
    "qwen2.5-0.5b": _shape((151936, 896, 4864), (24, 14, 2, 64), 32768, 1e6, **_QWEN2, **_TIED),
    "qwen2.5-7b": _shape((152064, 3584, 18944), (28, 28, 4, 128), 32768, 1e6, **_QWEN2),
    "qwen3-0.6b": _shape((151936, 1024, 3072), (28, 16, 8, 128), 40960, 1e6, **_QWEN3, **_TIED),
    "qwen3-8b": _shape((151936, 4096, 12288), (36, 32, 8, 128), 40960, 1e6, **_QWEN3),
}


def find_shape(name: str) -> ModelConfig:
    """The shape of this name; UsageError with the nearest names when there is none."""
    found = SHAPES.get(name.lower())
    if found is not None:
        return found
    near = difflib.get_close_matches(name.lower(), SHAPES, n=3, cutoff=0.4) or list(SHAPES)
    raise UsageError(f"no shape {quoted(name, 40)}; kvchat knows {', '.join(near)}")

"""What decode attention costs by codec: the cpu backend over pools of random K and V, one layer."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from kvchat.attention import AttentionBatch
from kvchat.attention.backends import make_backend
from kvchat.attention.rope import build_rope
from kvchat.config import KVSpec, ModelConfig
from kvchat.kv.cache import KVCache
from kvchat.kv.codecs import encode
from kvchat.kv.layout import BlockLayout, Codec, pack_entry

NUM_KV_HEADS, GROUP, HEAD_DIM, BLOCK_SIZE = 8, 4, 128, 16  # Llama 3 8B
DTYPES = ("bfloat16", "float32")
LOADS = ((1, 2048), (1, 8192), (8, 2048), (8, 8192))  # sequences, tokens of each
NUM_REPEATS = 15
_NUM_DRAWN = 64  # blocks of random numbers, repeated over the pool


@dataclass(frozen=True)
class AttentionCost:
    """One layer's decode attention for one new token of each sequence: medians of repeats."""

    dtype: str
    num_seqs: int
    num_tokens: int  # of each sequence
    codec: Codec
    time_us: float
    num_bytes: int  # K and V that are read, scales included
    ratio: float  # the time over that of native blocks: the median of pairs, one after the other

    @property
    def gb_per_s(self) -> float:
        """Bytes of the pool that are read in a second, in 10^9."""
        return self.num_bytes / self.time_us / 1e3


def run_attention_bench(
    progress: Callable[[str, int, int], None],
    dtypes: tuple[str, ...] = DTYPES,
    loads: tuple[tuple[int, int], ...] = LOADS,
    num_repeats: int = NUM_REPEATS,
) -> list[AttentionCost]:
    """A row for each dtype, load and codec. progress(what, done, of how many)."""
    costs = []
    for i, (dtype, load) in enumerate((dtype, load) for dtype in dtypes for load in loads):
        progress("measuring attention", i, len(dtypes) * len(loads))
        costs += measure_attention(dtype, *load, num_repeats)
    progress("measuring attention", 1, 1)
    return costs


def measure_attention(
    dtype: str, num_seqs: int, num_tokens: int, num_repeats: int
) -> list[AttentionCost]:
    """A row for each codec; repeats of the codecs take turns, so that all meet the same noise."""
    loads = [_Load(dtype, num_seqs, num_tokens, codec) for codec in Codec]
    for load in loads:
        load.attend()
    times = [[_time_us(load.attend) for load in loads] for _ in range(num_repeats)]
    return [
        AttentionCost(
            dtype, num_seqs, num_tokens, codec,
            statistics.median(row[codec] for row in times),
            loads[codec].num_bytes,
            statistics.median(row[codec] / row[Codec.NATIVE] for row in times),
        )
        for codec in Codec
    ]  # fmt: skip


def format_attention(costs: list[AttentionCost]) -> str:
    """A markdown table."""
    lines = [
        f"Decode attention of one layer, {NUM_KV_HEADS} kv heads x {GROUP} queries x {HEAD_DIM},"
        f" blocks of {BLOCK_SIZE}, {torch.get_num_threads()} threads.\n",
        "| pool | sequences x tokens | codec | µs | MB read | GB/s | time / native |",
        "|---|---:|---|---:|---:|---:|---:|",
    ]
    for cost in costs:
        load, mb = f"{cost.num_seqs} x {cost.num_tokens}", f"{cost.num_bytes / 1e6:.1f}"
        figures = f"{cost.time_us:.0f} | {mb} | {cost.gb_per_s:.1f} | {cost.ratio:.2f}"
        lines.append(f"| {cost.dtype} | {load} | {cost.codec.name.lower()} | {figures} |")
    return "\n".join(lines)


class _Load:
    """Sequences of random K and V in a pool of one layer, all of one codec, each with a native
    block for its newest token; and that step, planned."""

    def __init__(self, dtype: str, num_seqs: int, num_tokens: int, codec: Codec) -> None:
        spec = KVSpec(1, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, dtype)
        num_blocks = num_tokens // BlockLayout(spec, codec).span_tokens(codec)
        cache = KVCache(spec, 1 + num_seqs * (num_blocks + 1), lowest=codec)
        _fill(cache, codec)
        generator = torch.Generator().manual_seed(1)
        ids = (1 + torch.randperm(cache.num_blocks - 1, generator=generator)).view(num_seqs, -1)
        spans = range(cache.layout.span_blocks[codec])
        tables = [
            [pack_entry(block_id, codec, i) for block_id in past for i in spans] + [newest]
            for *past, newest in ids.tolist()
        ]
        config = _config(num_tokens + 1)
        self._backend = make_backend("cpu", config, cache, build_rope(config, num_tokens + 1))
        self._backend.plan(AttentionBatch([1] * num_seqs, [num_tokens + 1] * num_seqs, tables))
        q = torch.randn(num_seqs, config.num_heads, HEAD_DIM, generator=generator)
        k, v = torch.randn(2, num_seqs, NUM_KV_HEADS, HEAD_DIM, generator=generator)
        pool_dtype = cache.blocks.dtype
        q, k, v = (x.to(pool_dtype) for x in (q, k, v))
        self._q = self._backend.write_kv(0, q, k, v)
        self.num_bytes = num_seqs * num_blocks * cache.layout.bytes_used(codec)

    def attend(self) -> None:
        """One layer of the step."""
        self._backend.attend(0, self._q)


def _fill(cache: KVCache, codec: Codec) -> None:
    """Random K and V in all blocks but the null block; a few draws again and again."""
    generator, layout = torch.Generator().manual_seed(0), cache.layout
    shape = (2, _NUM_DRAWN, 1, NUM_KV_HEADS, layout.span_tokens(codec), HEAD_DIM)
    k, v = torch.randn(shape, generator=generator)
    drawn = torch.arange(cache.num_blocks - 1) % _NUM_DRAWN
    if codec == Codec.NATIVE:
        cache.blocks[1:] = torch.stack((k, v), 2)[drawn].to(cache.blocks.dtype)
    else:
        payload, side = encode(codec, k, v, layout)
        cache.payload[1:], cache.side[1:] = payload[drawn], side[drawn]


def _config(max_position: int) -> ModelConfig:
    return ModelConfig(
        family="llama",
        vocab_size=1,
        hidden_size=NUM_KV_HEADS * GROUP * HEAD_DIM,
        intermediate_size=1,
        num_layers=1,
        num_heads=NUM_KV_HEADS * GROUP,
        num_kv_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        max_position=max_position,
        norm_eps=1e-5,
        rope_theta=500000.0,
    )


def _time_us(call: Callable[[], None]) -> float:
    started = time.perf_counter()
    call()
    return (time.perf_counter() - started) * 1e6

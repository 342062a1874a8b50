"""How many more tokens compression gets into a pool's bytes, counted on real tensors: the second
table of `kvchat bench capacity`.

One chat grows, block by block, in a real pool under the real ladder until the pool says no; its
values are noise that is written, encoded and at the end decoded and compared. Three ratios against
native, never to be mixed up:

    block      native bytes of a compressed block's tokens over the bytes that it uses
    pool       tokens in all the bytes of a pool's tensors, side array, null block and reserve
               included, over those of a native pool of as many bytes; no sinks, no window
    session    native bytes of a session's tokens over all bytes of the blocks that it holds, side
               pieces as reserved, with its sinks and window
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvchat.config import KVPolicy, KVSpec
from kvchat.engine.kv_mode import choose_kv_mode
from kvchat.kv import codecs
from kvchat.kv.block_pool import BlockPool
from kvchat.kv.cache import KVCache
from kvchat.kv.ladder import Holder, Ladder, Warmth
from kvchat.kv.layout import Codec, unpack_entry

MODES = ("auto", "auto4")
HEAD_DIMS = (128, 64)
SESSIONS = (2048, 8192, 32_768)  # tokens
SINK, WINDOW = 64, 128
_POOL_BYTES = 4 * 2**20
_SEED = 1


@dataclass(frozen=True)
class Ratios:
    """One head_dim and mode: the block's codec, and the three ratios; sessions are (tokens held
    when the pool said no, ratio)."""

    head_dim: int
    mode: str
    codec: Codec
    block: float
    pool: float
    sessions: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class FullPool:
    """A pool that has said no. The errors are relative, RMS, of what is decoded, by codec."""

    cache: KVCache
    num_tokens: int
    num_blocks: int  # that hold them
    errors: dict[Codec, float]

    @property
    def bytes_per_token(self) -> float:
        """All bytes of the tensors over the tokens held."""
        return self.cache.num_bytes / self.num_tokens

    @property
    def held_bytes(self) -> float:
        """All bytes of the blocks that hold the tokens."""
        return self.num_blocks * self.cache.num_bytes / self.cache.num_blocks


def run_ratio_bench(block_size: int = 16, dtype: str = "bfloat16") -> list[Ratios]:
    """One row for each of HEAD_DIMS and MODES."""
    specs = [KVSpec(1, 1, head_dim, block_size, dtype) for head_dim in HEAD_DIMS]
    return [measure_ratios(spec, mode) for spec in specs for mode in MODES]


def measure_ratios(spec: KVSpec, mode: str, lengths: Sequence[int] = SESSIONS) -> Ratios:
    """All three ratios, of `lengths` the third."""
    num_native_blocks = _POOL_BYTES // spec.bytes_per_block
    native = fill_pool(spec, KVPolicy(), num_native_blocks)
    policy = _policy(spec, mode, 0, 0)
    lowest = Codec(policy.rungs[-1][1])
    reserved_bytes = KVCache(spec, 1, lowest=lowest).num_bytes
    full = fill_pool(spec, policy, _POOL_BYTES // reserved_bytes)
    span_tokens = full.cache.layout.span_tokens(lowest)
    native_block_bytes = native.cache.num_bytes / native.cache.num_blocks
    native_bytes = native_block_bytes * span_tokens / spec.block_size
    return Ratios(
        spec.head_dim,
        mode,
        lowest,
        native_bytes / full.cache.block_bytes(lowest),
        native.bytes_per_token / full.bytes_per_token,
        tuple(_measure_session(spec, mode, length, native_block_bytes) for length in lengths),
    )


def fill_pool(spec: KVSpec, policy: KVPolicy, num_blocks: int) -> FullPool:
    """Let one chat grow until there is no block left and nothing more to compress."""
    lowest = Codec(len(policy.span_blocks) - 1)
    cache = KVCache(spec, num_blocks, lowest=lowest)
    pool = BlockPool(
        num_blocks,
        spec.block_size,
        span_blocks=policy.span_blocks,
        num_reserved=policy.num_reserved,
    )
    seq = pool.alloc([])
    ladder = Ladder(policy, pool, lambda: [Holder(seq, Warmth.RUNNING, False, 0)])
    generator = torch.Generator().manual_seed(_SEED)
    token_ids: list[int] = []
    written: list[Tensor] = []  # each [num_layers, 2, num_kv_heads, block_size, head_dim]
    while True:
        ladder.begin_step()
        while (ops := pool.append(seq, spec.block_size)) is None:
            if not (made := [c.op for c in iter(ladder.compress, None)]):
                break
            cache.apply([*made])
        if ops is None:
            break
        written.append(torch.randn(cache.blocks.shape[1:], generator=generator))
        cache.blocks[seq.table[-1]] = written[-1].to(cache.blocks.dtype)
        token_ids += [0] * spec.block_size
        pool.seal(seq, token_ids, len(token_ids))
        ladder.touch(seq)
    return FullPool(cache, seq.num_tokens, seq.num_blocks, _errors(cache, seq.table, written))


def format_ratios(rows: Sequence[Ratios]) -> str:
    """A markdown table."""
    names = [f"session of {length:,}" for length in SESSIONS]
    lines = [
        f"| head dim | KV cache | compressed block | pool | {' | '.join(names)} |",
        "|---:|:---|---:|---:|" + "---:|" * len(names),
    ]
    for row in rows:
        sessions = [f"{ratio:.2f}" for _, ratio in row.sessions]
        lines.append(
            f"| {row.head_dim} | {row.mode} | {row.codec.name} {row.block:.3f} | {row.pool:.3f}"
            f" | {' | '.join(sessions)} |"
        )
    return "\n".join(lines)


def _policy(spec: KVSpec, mode: str, window: int, sink: int) -> KVPolicy:
    return choose_kv_mode(mode, window, sink, spec, Codec.INT4).policy


def _measure_session(
    spec: KVSpec, mode: str, length: int, native_block_bytes: float
) -> tuple[int, float]:
    """A pool made for one session of `length`, filled."""
    policy = _policy(spec, mode, WINDOW, SINK)
    num_blocks = policy.peak_blocks(length, spec.block_size) + policy.num_reserved + 1
    full = fill_pool(spec, policy, num_blocks)
    native_bytes = full.num_tokens / spec.block_size * native_block_bytes
    return full.num_tokens, native_bytes / full.held_bytes


def _errors(cache: KVCache, table: list[int], written: list[Tensor]) -> dict[Codec, float]:
    """Decode every block that the table names and compare it with what was written there."""
    squares: dict[Codec, list[Tensor]] = {}
    for idx, entry in enumerate(table):
        block_id, codec, span_idx = unpack_entry(entry)
        if span_idx:
            continue
        payload, side = cache.payload[block_id], cache.side[block_id]
        kv = torch.stack(codecs.decode(codec, payload, side, cache.layout), 1)
        expected = torch.cat(written[idx : idx + cache.layout.span_blocks[codec]], dim=3)
        squares.setdefault(codec, []).append((kv - expected).square().mean())
    return {codec: float(torch.stack(parts).mean().sqrt()) for codec, parts in squares.items()}

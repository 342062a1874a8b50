"""Pools, tables and queries of any shape and codec on a GPU, for timing: random numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kvchat.config import KVSpec
from kvchat.kv.cache import KVCache
from kvchat.kv.layout import BlockLayout, Codec, pack_entry

if TYPE_CHECKING:
    from torch import Tensor

HEAD_DIM, BLOCK_SIZE, DTYPE = 128, 16, "bfloat16"
_TURN = 64  # positions after which a mixed row changes its codec: a multiple of every span


@dataclass(frozen=True)
class DecodeShape:
    """Rows of one length; codecs by turns along each row."""

    num_rows: int
    num_tokens: int
    num_heads: int
    num_kv_heads: int
    codecs: tuple[Codec, ...] = (Codec.NATIVE,)

    @property
    def label(self) -> str:
        """As in B8@32k 32/8 int8."""
        codec = "mixed" if len(self.codecs) > 1 else self.codecs[0].name.lower()
        heads = f"{self.num_heads}/{self.num_kv_heads}"
        return f"B{self.num_rows}@{self.num_tokens // 1024}k {heads} {codec}"

    @property
    def layout(self) -> BlockLayout:
        """Of a pool of one layer."""
        spec = KVSpec(1, self.num_kv_heads, HEAD_DIM, BLOCK_SIZE, DTYPE)
        return BlockLayout(spec, max(self.codecs))


@dataclass
class DecodeTensors:
    """What a launch of a shape takes; num_bytes: what it must read of the pool."""

    cache: KVCache
    tables: Tensor  # int32 [rows, entries]
    seq_lens: Tensor  # int32 [rows]
    q: Tensor  # [rows, heads, HEAD_DIM]
    q_rotated: Tensor  # the same, float16
    num_bytes: int


def make_tensors(shape: DecodeShape) -> DecodeTensors:
    """Random K, V and q on the GPU, in shuffled blocks."""
    layout = shape.layout
    spans = [
        codec
        for turn in range(shape.num_tokens // _TURN)
        for codec in [shape.codecs[turn * len(shape.codecs) * _TURN // shape.num_tokens]]
        for _ in range(_TURN // layout.span_tokens(codec))
    ]
    num_blocks = 1 + shape.num_rows * len(spans)
    ids = iter((torch.randperm(num_blocks - 1) + 1).tolist())
    tables = [
        [
            pack_entry(block_id, codec, idx)
            for codec, block_id in zip(spans, ids, strict=False)
            for idx in range(layout.span_blocks[codec])
        ]
        for _ in range(shape.num_rows)
    ]
    cache = KVCache(layout.spec, num_blocks, "cuda", layout.lowest)
    _fill(cache, tables)
    num_queries = (shape.num_rows, shape.num_heads, HEAD_DIM)
    return DecodeTensors(
        cache,
        torch.tensor(tables, dtype=torch.int32, device="cuda"),
        torch.full((shape.num_rows,), shape.num_tokens, dtype=torch.int32, device="cuda"),
        torch.randn(num_queries, device="cuda").to(getattr(torch, DTYPE)),
        torch.randn(num_queries, device="cuda").half(),
        shape.num_rows * sum(layout.bytes_used(codec) for codec in spans),
    )


def _fill(cache: KVCache, tables: list[list[int]]) -> None:
    """Normal numbers in native blocks; random codes and one scale for all in the others."""
    cache.payload.random_(0, 255)
    if cache.layout.side_bytes:
        cache.side.view(torch.float16).fill_(0.01)
    native = {entry for table in tables for entry in table if not entry >> 28}
    for ids in torch.tensor(sorted(native), dtype=torch.long, device="cuda").split(4096):
        cache.blocks[ids] = torch.randn(
            (len(ids), *cache.blocks.shape[1:]), device="cuda", dtype=cache.blocks.dtype
        )

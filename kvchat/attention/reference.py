"""The oracle: torch, blocks gathered and decoded, dense softmax in float32. Slow and obvious on
purpose."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvchat.attention import AttentionBatch
from kvchat.attention.rope import RopeTable, apply_rope
from kvchat.attention.slots import plan_positions, plan_slots
from kvchat.config import ModelConfig
from kvchat.kv.cache import KVCache
from kvchat.kv.codecs import decode
from kvchat.kv.layout import BLOCK_ID_BITS, BLOCK_ID_MASK, CODEC_SHIFT, SPAN_INDEX_MASK, Codec


class ReferenceBackend:
    """Every step gathers all of each sequence's K and V of a layer, one sequence at a time."""

    def __init__(self, config: ModelConfig, cache: KVCache, rope: RopeTable) -> None:
        self.bytes_gathered = 0
        self._config = config
        self._cache = cache
        self._rope = rope

    def warm_up(self, progress: Callable[[int, int], None]) -> None:
        """Nothing to compile."""

    def plan(self, batch: AttentionBatch) -> None:
        """Slots and angles of the new tokens, and each sequence's table as a tensor."""
        device, block_size = self._cache.blocks.device, self._cache.spec.block_size
        positions = torch.tensor(plan_positions(batch), device=device)
        slots = torch.tensor(plan_slots(batch, block_size), device=device)
        self._batch = batch
        self._cos, self._sin = self._rope.cos[positions], self._rope.sin[positions]
        self._block_ids, self._offsets = slots // block_size, slots % block_size
        self._tables = [
            torch.tensor(table[: -(-seq_len // block_size)], device=device)
            for table, seq_len in zip(batch.block_tables, batch.seq_lens, strict=True)
        ]

    def write_kv(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See AttentionBackend.write_kv; the rotated q comes as float32."""
        blocks = self._cache.layer(layer_idx)
        blocks[self._block_ids, 0, :, self._offsets] = apply_rope(k, self._cos, self._sin)
        blocks[self._block_ids, 1, :, self._offsets] = v
        return apply_rope(q.float(), self._cos, self._sin)

    def attend(self, layer_idx: int, q: Tensor) -> Tensor:
        """See AttentionBackend.attend."""
        config, batch = self._config, self._batch
        window = config.layer_windows[layer_idx] if config.layer_windows else 0
        out = [
            _attend_dense(chunk, *self._gather(layer_idx, idx), window, config.attention_scale)
            for idx, chunk in enumerate(q.split(batch.query_lens))
        ]
        return torch.cat(out).to(self._cache.blocks.dtype)

    def _gather(self, layer_idx: int, seq_idx: int) -> tuple[Tensor, Tensor]:
        """K and V of one sequence, float32, each [num_kv_heads, seq_len, head_dim]."""
        spec, entries = self._cache.spec, self._tables[seq_idx]
        shape = (2, spec.num_kv_heads, entries.numel(), spec.block_size, spec.head_dim)
        kv, codecs = torch.empty(shape, device=entries.device), entries >> CODEC_SHIFT
        for codec in Codec:
            is_codec = codecs == codec
            if is_codec.any():
                kv[:, :, is_codec] = self._decode(layer_idx, codec, entries[is_codec])
        k, v = kv.flatten(2, 3)[:, :, : self._batch.seq_lens[seq_idx]]
        return k, v

    def _decode(self, layer_idx: int, codec: Codec, entries: Tensor) -> Tensor:
        """K and V of entries of one codec: float32 [2, num_kv_heads, entries, T, head_dim]."""
        layout, block_size = self._cache.layout, self._cache.spec.block_size
        ids, places = (entries & BLOCK_ID_MASK).unique(return_inverse=True)
        payload, side = self._cache.payload[ids, layer_idx], self._cache.side[ids, layer_idx]
        self.bytes_gathered += payload.nbytes + side[..., : layout.side_used(codec)].nbytes
        kv = torch.stack(decode(codec, payload, side, layout))  # [2, blocks, heads, S, head_dim]
        spans = kv.unflatten(3, (-1, block_size))
        span_idxs = entries >> BLOCK_ID_BITS & SPAN_INDEX_MASK
        picked: Tensor = spans[:, places, :, span_idxs]  # indexed dims first
        return picked.permute(1, 2, 0, 3, 4)


def _attend_dense(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> Tensor:
    """softmax(scale q k^T) v, where query i of n stands at position seq_len - n + i.

    q: [n, num_heads, head_dim]; k, v: [num_kv_heads, seq_len, head_dim]; float32 in q's shape
    comes back. A window of w lets a query see itself and the w - 1 tokens before it; 0: no window.
    """
    num_new, seq_len = q.shape[0], k.shape[1]
    key_positions = torch.arange(seq_len, device=q.device)
    query_positions = key_positions[seq_len - num_new :, None]
    is_seen = key_positions <= query_positions
    if window:
        is_seen &= key_positions > query_positions - window
    # head h of q reads kv head h // group: [num_kv_heads, group, n, head_dim]
    grouped = q.float().unflatten(1, (k.shape[0], -1)).permute(1, 2, 0, 3)
    scores = grouped @ k.float()[:, None].mT * scale
    weights = scores.masked_fill(~is_seen, float("-inf")).softmax(dim=-1)
    out: Tensor = weights @ v.float()[:, None]
    return out.permute(2, 0, 1, 3).flatten(1, 2)

"""The cpu backend: kernels read the blocks in place; only a long chunk gathers its own sequence.

New tokens that come one or a few at a time (decodes) go through compiled loops over the pool. A
longer chunk copies one layer of its one sequence into a scratch, decoded, and uses torch's
attention. Both kinds may stand in a step, in any order, and a row's result does not depend on its
neighbours: splits have a fixed size and are merged in the order of their positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kvchat.attention import AttentionBatch
from kvchat.attention import cpu_jit as jit
from kvchat.attention import cpu_kernels as kernels
from kvchat.attention.rope import RopeTable
from kvchat.attention.slots import plan_positions, plan_slots, stored_bytes
from kvchat.config import ModelConfig
from kvchat.kv.cache import KVCache
from kvchat.kv.codecs import rotation_signs, rotation_size
from kvchat.kv.layout import CODEC_SHIFT, Codec, v_group

_KINDS = {
    torch.float32: jit.FLOAT32,
    torch.bfloat16: jit.BFLOAT16,
    torch.float16: jit.FLOAT16,
}
SPLIT_TOKENS = 512  # positions of one unit of work; a multiple of the longest span (8 * 32)
# A chunk of more is gathered. About there one pass of torch's attention for all of its tokens costs
# as much as a pass of the kernel for each (measured with 256 and 2048 tokens of context).
MAX_KERNEL_TOKENS = 6
_QUERY_TILE = 128  # queries per call of torch's attention, which bounds the mask
# Multiply-adds, or values copied, below which waking other threads costs more than it gains.
_MIN_SHARED_WORK = 1_000_000


@dataclass(frozen=True)
class _Work:
    """What the kernels do in a step, for layers of one window."""

    splits: jit.Ints  # [S, 4] see attend_splits
    bounds: list[int]  # shares of the S * num_kv_heads units, one a thread
    sums: jit.Floats  # [S, num_heads, head_dim]
    stats: jit.Floats  # [S, num_heads, 2]


@dataclass(frozen=True)
class _Chunk:
    """New tokens first .. last - 1 of the step, the end of one sequence of seq_len tokens."""

    first: int
    last: int
    seq_len: int
    table: jit.Table


class CpuBackend:
    """See AttentionBackend. One thread at a time may use it; its kernels share out over threads."""

    def __init__(self, config: ModelConfig, cache: KVCache, rope: RopeTable) -> None:
        self.bytes_gathered = 0
        self._config = config
        self._spec, self._layout = cache.spec, cache.layout
        self._dtype = cache.blocks.dtype
        self._kind = _KINDS[self._dtype]
        self._pool = _as_array(cache.blocks)
        self._has_codes = cache.layout.lowest != Codec.NATIVE
        self._payload = cache.payload.numpy()
        self._side = cache.side.view(torch.uint16).numpy() if self._has_codes else None
        dim = cache.spec.head_dim
        self._v_group = v_group(dim) if self._has_codes else dim
        self._signs = (rotation_signs(dim) * rotation_size(dim) ** -0.5).numpy()
        self._rope = rope
        self._num_threads = torch.get_num_threads()
        # The calling thread takes the first share.
        self._helpers = ThreadPoolExecutor(max(1, self._num_threads - 1), "kvchat-attention")

    def warm_up(self, progress: Callable[[int, int], None]) -> None:
        """Compile or load this pool's kernels."""
        kernels.compile_kernels(self._kind, self._has_codes, progress)

    def plan(self, batch: AttentionBatch) -> None:
        """Slots and angles of the new tokens; who goes through the kernels and who is gathered."""
        positions = torch.tensor(plan_positions(batch))
        self._slots = np.array(plan_slots(batch, self._spec.block_size))
        self._cos = self._rope.cos[positions].numpy()
        self._sin = self._rope.sin[positions].numpy()
        rows: list[tuple[int, int, int]] = []  # token of the step, its table's start, its position
        entries: list[int] = []
        self._chunks: list[_Chunk] = []
        first = 0
        for num_new, seq_len, table in zip(
            batch.query_lens, batch.seq_lens, batch.block_tables, strict=True
        ):
            used = table[: -(-seq_len // self._spec.block_size)]
            if num_new > MAX_KERNEL_TOKENS:
                blocks = np.array(used, np.int32)
                self._chunks.append(_Chunk(first, first + num_new, seq_len, blocks))
            else:
                rows += [(first + i, len(entries), seq_len - num_new + i) for i in range(num_new)]
                entries += used
            first += num_new
        self._tables = np.array(entries, np.int32)
        # Queries are rotated for INT8 keys alone.
        has_int8 = bool((self._tables >> CODEC_SHIFT == Codec.INT8).any())
        self._rotated_tokens = np.array([token_idx for token_idx, _, _ in rows if has_int8], int)
        windows = set(self._config.layer_windows) or {0}
        self._work = {window: self._plan_work(rows, window) for window in windows} if rows else {}
        num_blocks = max((chunk.table.size for chunk in self._chunks), default=0)
        # K and V of one layer of the longest gathered sequence; given back with the step.
        self._scratch = np.empty(
            2 * num_blocks * self._spec.num_kv_heads * self._spec.block_size * self._spec.head_dim,
            np.float32,
        )

    def write_kv(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See AttentionBackend.write_kv; the rotated q comes as float32."""
        rotated = torch.empty(q.shape)
        kernels.rope_write(
            rotated.numpy(),
            self._pool,
            layer_idx,
            self._slots,
            _as_array(q.contiguous()),
            _as_array(k.contiguous()),
            _as_array(v.contiguous()),
            self._cos,
            self._sin,
            self._kind,
        )
        return rotated

    def attend(self, layer_idx: int, q: Tensor) -> Tensor:
        """See AttentionBackend.attend; q float32, as write_kv gave it."""
        window = self._config.layer_windows[layer_idx] if self._config.layer_windows else 0
        out = torch.empty(q.shape)
        if self._work:
            self._attend_rows(layer_idx, q.numpy(), out.numpy(), self._work[window])
        for chunk in self._chunks:
            rows = slice(chunk.first, chunk.last)
            out[rows] = self._attend_chunk(layer_idx, q[rows], chunk, window)
        return out.to(self._dtype)

    def _plan_work(self, rows: list[tuple[int, int, int]], window: int) -> _Work:
        """Cut every row's positions into splits, and the splits' kv heads into equal shares."""
        config = self._config
        splits = np.array(
            [
                (
                    token_idx,
                    table_start,
                    max(start, oldest),
                    min(start + SPLIT_TOKENS, position + 1),
                )
                for token_idx, table_start, position in rows
                for oldest in (max(0, position + 1 - window) if window else 0,)
                for start in range(oldest - oldest % SPLIT_TOKENS, position + 1, SPLIT_TOKENS)
            ]
        )
        done = (splits[:, 3] - splits[:, 2]).repeat(config.num_kv_heads).cumsum()  # [units]
        group = config.num_heads // config.num_kv_heads
        num_shares = self._num_shares(int(done[-1]) * config.head_dim * group)
        targets = done[-1] * np.arange(1, num_shares) / num_shares
        bounds = [0, *np.searchsorted(done, targets).tolist(), done.size]
        heads = (len(splits), config.num_heads)
        sums = np.empty((*heads, config.head_dim), np.float32)
        return _Work(splits, bounds, sums, np.empty((*heads, 2), np.float32))

    def _attend_rows(self, layer_idx: int, q: jit.Floats, out: jit.Floats, work: _Work) -> None:
        """Fill the rows of out that `work` names. q, out: [num_tokens, num_heads, head_dim]."""
        scale, rotated_q = self._config.attention_scale * math.log2(math.e), q
        if self._rotated_tokens.size:
            rotated_q = np.empty_like(q)
            kernels.rotate_heads(rotated_q, q, self._rotated_tokens, self._signs)
        self._share_out(
            lambda first, last: kernels.attend_splits(
                work.sums, work.stats, q, rotated_q, self._pool, self._payload, self._side,
                self._v_group, layer_idx, self._tables, work.splits, scale, self._kind, first, last,
            ),
            work.bounds,
        )  # fmt: skip
        kernels.merge_splits(out, work.sums, work.stats, work.splits)

    def _attend_chunk(self, layer_idx: int, q: Tensor, chunk: _Chunk, window: int) -> Tensor:
        """q and the result: [n, num_heads, head_dim] float32 of one chunk's tokens."""
        num_new, num_kv_heads = q.shape[0], self._spec.num_kv_heads
        start = chunk.seq_len - num_new  # position of the first query
        oldest = max(0, start + 1 - window) if window else 0
        first_key, k, v = self._gather(layer_idx, chunk, oldest)
        group = q.shape[1] // num_kv_heads
        grouped = q.unflatten(1, (num_kv_heads, group)).permute(1, 2, 0, 3)
        out = torch.empty(grouped.shape)
        for tile in range(0, num_new, _QUERY_TILE):
            queries = torch.arange(start + tile, start + min(tile + _QUERY_TILE, num_new))[:, None]
            num_keys = int(queries[-1]) + 1 - first_key
            keys = torch.arange(first_key, first_key + num_keys)
            is_seen = keys <= queries
            if window:
                is_seen &= keys > queries - window
            # One kv head serves its group through a stride of 0: nothing is repeated in memory.
            out[:, :, tile : tile + _QUERY_TILE] = F.scaled_dot_product_attention(
                grouped[:, :, tile : tile + _QUERY_TILE],
                k[:, None, :num_keys].expand(-1, group, -1, -1),
                v[:, None, :num_keys].expand(-1, group, -1, -1),
                attn_mask=is_seen,
                scale=self._config.attention_scale,
            )
        return out.permute(2, 0, 1, 3).flatten(1, 2)

    def _gather(self, layer_idx: int, chunk: _Chunk, oldest: int) -> tuple[int, Tensor, Tensor]:
        """K and V from the block of position `oldest` on: (its first position, K, V).

        K and V: [num_kv_heads, tokens, head_dim] float32, in the step's scratch.
        """
        spec, skipped = self._spec, oldest // self._spec.block_size
        table = chunk.table[skipped:]
        shape = (2, spec.num_kv_heads, table.size, spec.block_size, spec.head_dim)
        scratch = self._scratch[: math.prod(shape)].reshape(shape)
        last_tokens = chunk.seq_len - (chunk.table.size - 1) * spec.block_size
        num_units = 2 * spec.num_kv_heads
        num_shares = min(self._num_shares(scratch.size), num_units)
        self._share_out(
            lambda first, last: kernels.gather_blocks(
                scratch, self._pool, self._payload, self._side, self._signs, self._v_group,
                layer_idx, table, last_tokens, self._kind, first, last,
            ),
            [num_units * i // num_shares for i in range(num_shares + 1)],
        )  # fmt: skip
        first_key = skipped * spec.block_size
        self.bytes_gathered += spec.num_kv_heads * stored_bytes(
            self._layout, table, skipped, last_tokens
        )
        k, v = torch.from_numpy(scratch).flatten(2, 3)
        return first_key, k, v

    def _num_shares(self, work: int) -> int:
        return self._num_threads if work >= _MIN_SHARED_WORK else 1

    def _share_out(self, kernel: Callable[[int, int], None], bounds: list[int]) -> None:
        """kernel(first, last) for each two neighbours of `bounds`, at the same time."""
        shares = list(pairwise(bounds))
        others = [self._helpers.submit(kernel, *share) for share in shares[1:]]
        kernel(*shares[0])
        for other in others:
            other.result()


def _as_array(x: Tensor) -> jit.Elements:
    """x without a copy; 16-bit floats as the uint16 that hold them."""
    return (x if x.dtype == torch.float32 else x.view(torch.uint16)).numpy()

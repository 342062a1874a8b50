"""The cuda backend: kernels of kernels_cu/ read the pool in place; long chunks gather, for torch.

A new token is a row of paged_decode, whatever its blocks' codecs. A chunk of several copies its
sequence's K and V of one layer into a scratch, decoded, and uses torch's flash attention; so does
every token of a model whose head_dim paged_decode is not written for.

A step is planned from a batch, by `plan`, where a few tokens at a time are rows, too; or, by
`plan_rows` and `plan_chunks`, from tensors of fixed place and size that somebody else fills
(engine/decode_rows, engine/chunk_graphs), so that a CUDA graph may capture it with the layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from kvchat.attention import AttentionBatch
from kvchat.attention.cuda_ops import BlockOps, Load
from kvchat.attention.flash import ChunkTensors, Flash, find_flash
from kvchat.attention.kernels import load_kernel
from kvchat.attention.paged_decode import PagedDecode, is_supported
from kvchat.attention.rope import RopeTable
from kvchat.attention.slots import plan_positions, plan_slots, stored_bytes
from kvchat.config import ModelConfig
from kvchat.kv.cache import KVCache
from kvchat.kv.host_memory import send
from kvchat.kv.layout import Codec

# A chunk of more tokens is gathered: a pass of paged_decode for each would cost as much.
MAX_ROWS_OF_CHUNK = 8
_QUERY_TILE = 512  # queries of a call with a mask, which bounds the mask
# cuDNN's attention is left out: it plans anew for every length, longer than a prompt may take.
_SDPA = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True)
class RowTensors:
    """What plan_rows reads, int32, all of as many rows; a row that is padding has slot, position
    and length 0."""

    positions: Tensor  # [num_rows] of the new token
    slots: Tensor  # [num_rows] where its K and V go
    seq_lens: Tensor  # [num_rows] its position + 1
    tables: Tensor  # [num_rows, entries]

    def first(self, num_rows: int) -> RowTensors:
        """Views of the first rows."""
        return RowTensors(
            self.positions[:num_rows],
            self.slots[:num_rows],
            self.seq_lens[:num_rows],
            self.tables[:num_rows],
        )


@dataclass(frozen=True)
class _Chunk:
    """New tokens first .. last - 1 of the step, the end of one sequence of seq_len tokens."""

    first: int
    last: int
    seq_len: int
    table: Tensor  # int32 [entries], on the device
    entries: np.ndarray  # the same, here


@dataclass(frozen=True)
class _Step:
    """The planned step. row_idxs: which of its tokens are rows; None: all, in their order. packed:
    all of it, if plan_chunks has planned it."""

    positions: Tensor
    slots: Tensor
    num_rows: int
    row_idxs: Tensor | None
    chunks: list[_Chunk]
    packed: ChunkTensors | None = None


class CudaBackend:
    """See AttentionBackend. max_rows: rows of a step at most; max_len: tokens of a sequence.

    `load` gives the kernels: kernels.load_kernel, or the emulator in tests, on CPU tensors. flash:
    what plan_chunks needs; None: torch's, where it has one.
    """

    def __init__(
        self,
        config: ModelConfig,
        cache: KVCache,
        rope: RopeTable,
        max_rows: int,
        max_len: int,
        load: Load = load_kernel,
        flash: Flash | None = None,
    ) -> None:
        self.bytes_gathered = 0
        self.device = cache.blocks.device
        self.max_rows = max_rows
        self._config, self._cache, self._rope = config, cache, rope
        layout, num_heads = cache.layout, config.num_heads
        self.block_ops = BlockOps(cache, load)
        self._has_codes = layout.lowest != Codec.NATIVE
        spec = layout.spec
        self._flash = flash or find_flash(self.device, spec.head_dim)
        self.max_entries = -(-max_len // spec.block_size)  # that can be gathered at a time
        num_gathered = 2 * spec.num_kv_heads * self.max_entries * spec.block_size * spec.head_dim
        self._gathered = torch.zeros(num_gathered, dtype=cache.blocks.dtype, device=self.device)
        self._windows = sorted(set(config.layer_windows) or {0})
        self._decode = None
        if is_supported(layout):
            device = str(self.device)
            self._decode = PagedDecode(layout, num_heads, max_rows, max_len, device, load=load)
            self._plans = {window: self._decode.make_plan() for window in self._windows}

    @property
    def has_decode_kernel(self) -> bool:
        """Rows are read in place; else every token goes through a gathered copy, slower."""
        return self._decode is not None

    @property
    def can_plan_chunks(self) -> bool:
        """Whether torch has the attention that plan_chunks needs, on this GPU."""
        return self._flash is not None

    def warm_up(self, progress: Callable[[int, int], None]) -> None:
        """The constructor has compiled and loaded all."""

    def plan(self, batch: AttentionBatch) -> None:
        """Who goes through paged_decode and who is gathered; all of it sent to the device."""
        block_size = self._cache.spec.block_size
        positions, slots = plan_positions(batch), plan_slots(batch, block_size)
        row_idxs: list[int] = []
        row_tables: list[list[int]] = []
        chunks: list[tuple[int, int, int, list[int]]] = []
        first = 0
        for num_new, seq_len, used in zip(
            batch.query_lens, batch.seq_lens, batch.used_tables(block_size), strict=True
        ):
            if self._is_rows(num_new, len(row_idxs)):
                row_idxs += range(first, first + num_new)
                row_tables += [used] * num_new
            else:
                chunks.append((first, first + num_new, seq_len, used))
            first += num_new
        sent_positions, sent_slots = self._send([positions, slots])
        is_all = len(row_idxs) == len(positions)
        self._step = _Step(
            sent_positions,
            sent_slots,
            len(row_idxs),
            None if is_all else send(row_idxs, torch.int64, self.device),
            [_Chunk(*chunk[:3], self._send([chunk[3]])[0], np.array(chunk[3])) for chunk in chunks],
        )
        if row_idxs:
            num_entries = max(map(len, row_tables))
            padded = [table + [0] * (num_entries - len(table)) for table in row_tables]
            seq_lens = [positions[idx] + 1 for idx in row_idxs]
            self._plan_kernels(self._send(padded), self._send([seq_lens])[0])

    def plan_rows(self, rows: RowTensors) -> None:
        """Plan a step of one token for each row, from what the tensors hold when it runs."""
        num_rows = rows.positions.shape[0]
        self._step = _Step(rows.positions, rows.slots, num_rows, None, [])
        self._plan_kernels(rows.tables, rows.seq_lens)

    def plan_chunks(self, chunks: ChunkTensors) -> None:
        """Plan a step of chunks from what the tensors hold when it runs. The sequences' blocks are
        max_entries at most; `count_gathered` is to be told of every run."""
        assert self._flash is not None, "chunks are planned where can_plan_chunks"
        self._step = _Step(chunks.positions, chunks.slots, 0, None, [], chunks)

    def count_gathered(self, seq_lens: list[int], tables: list[list[int]]) -> None:
        """Add to bytes_gathered what a run of plan_chunks' step copies in all the layers. tables:
        used_tables of the step's batch."""
        for seq_len, table in zip(seq_lens, tables, strict=True):
            self._count_gathered(np.array(table), 0, seq_len, self._cache.spec.num_layers)

    def write_kv(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See AttentionBackend.write_kv."""
        rotated = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        self._q_codes = None  # what INT8 keys are met with
        if self._has_codes:
            self._q_codes = torch.empty(q.shape, dtype=torch.float16, device=q.device)
        angles = self._rope.cos, self._rope.sin
        step = self._step
        self.block_ops.write(
            layer_idx, (rotated, self._q_codes), (q, k, v), angles, step.positions, step.slots
        )
        return rotated

    def attend(self, layer_idx: int, q: Tensor) -> Tensor:
        """See AttentionBackend.attend."""
        window = self._config.layer_windows[layer_idx] if self._config.layer_windows else 0
        step, q_codes = self._step, self._q_codes
        if step.packed is not None:
            return self._attend_packed(layer_idx, q, step.packed, window)
        if step.row_idxs is None:
            return self._attend_rows(layer_idx, q, q_codes, window)
        out = torch.empty_like(q)
        if step.num_rows:
            q_codes = q_codes if q_codes is None else q_codes[step.row_idxs]
            out[step.row_idxs] = self._attend_rows(layer_idx, q[step.row_idxs], q_codes, window)
        for chunk in step.chunks:
            rows = slice(chunk.first, chunk.last)
            out[rows] = self._attend_chunk(layer_idx, q[rows], chunk, window)
        return out

    def _is_rows(self, num_new: int, num_rows: int) -> bool:
        return (
            self._decode is not None
            and num_new <= MAX_ROWS_OF_CHUNK
            and num_rows + num_new <= self.max_rows
        )

    def _send(self, numbers: list[list[int]]) -> Tensor:
        return send(numbers, torch.int32, self.device)

    def _plan_kernels(self, tables: Tensor, seq_lens: Tensor) -> None:
        assert self._decode is not None, "rows are planned where paged_decode is supported"
        for window, plan in self._plans.items():
            self._decode.plan(plan, tables, seq_lens, window)

    def _attend_rows(
        self, layer_idx: int, q: Tensor, q_codes: Tensor | None, window: int
    ) -> Tensor:
        assert self._decode is not None, "rows are planned where paged_decode is supported"
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        plan, scale = self._plans[window], self._config.attention_scale
        self._decode.attend(out, q, q_codes, self._cache, plan, layer_idx, scale)
        return out

    def _attend_packed(
        self, layer_idx: int, q: Tensor, chunks: ChunkTensors, window: int
    ) -> Tensor:
        """All chunks at once. Of layers with a window more is gathered than is read."""
        assert self._flash is not None, "chunks are planned where can_plan_chunks"
        num_tokens = self.max_entries * self._cache.spec.block_size
        k, v = gathered = self._scratch(num_tokens)
        self.block_ops.gather(layer_idx, gathered, chunks.table, chunks.num_entries)
        scale = self._config.attention_scale
        return self._flash(q, k.transpose(0, 1), v.transpose(0, 1), chunks, scale, window)

    def _attend_chunk(self, layer_idx: int, q: Tensor, chunk: _Chunk, window: int) -> Tensor:
        """q and the result: [n, num_heads, head_dim] of one chunk's tokens."""
        start = chunk.seq_len - q.shape[0]  # position of the first query
        oldest = max(0, start + 1 - window) if window else 0
        first_key, k, v = self._gather(layer_idx, chunk, oldest)
        queries = q.transpose(0, 1)[None]  # [1, num_heads, n, head_dim]
        with sdpa_kernel(_SDPA):
            if window and chunk.seq_len > window:
                out = self._attend_window(queries, k, v, start - first_key, window)
            else:
                out = F.scaled_dot_product_attention(
                    queries, k, v, attn_mask=causal_lower_right(queries.shape[2], k.shape[2]),
                    scale=self._config.attention_scale, enable_gqa=queries.shape[1] != k.shape[1],
                )  # fmt: skip
        return out[0].transpose(0, 1)

    def _attend_window(
        self, queries: Tensor, k: Tensor, v: Tensor, start: int, window: int
    ) -> Tensor:
        """The same where queries see `window` keys: by tiles, each with its mask.

        queries: [1, num_heads, n, head_dim], the first of which stands at key `start`.
        """
        group = queries.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        tiles = []
        for first in range(0, queries.shape[2], _QUERY_TILE):
            tile = queries[:, :, first : first + _QUERY_TILE]
            places = torch.arange(start + first, start + first + tile.shape[2], device=k.device)
            oldest, end = max(0, start + first + 1 - window), start + first + tile.shape[2]
            keys = torch.arange(oldest, end, device=k.device)
            is_seen = (keys <= places[:, None]) & (keys > places[:, None] - window)
            seen_k, seen_v = k[:, :, oldest:end], v[:, :, oldest:end]
            scale = self._config.attention_scale
            tiles.append(
                F.scaled_dot_product_attention(tile, seen_k, seen_v, attn_mask=is_seen, scale=scale)
            )
        return torch.cat(tiles, dim=2)

    def _gather(self, layer_idx: int, chunk: _Chunk, oldest: int) -> tuple[int, Tensor, Tensor]:
        """K and V from the block of position `oldest` on: (its first position, K, V).

        K and V: [1, num_kv_heads, tokens, head_dim] in the pool's dtype.
        """
        skipped = oldest // self._cache.spec.block_size
        first_key = skipped * self._cache.spec.block_size
        scratch = self._scratch(chunk.seq_len - first_key)
        self.block_ops.gather(layer_idx, scratch, chunk.table[skipped:])
        self._count_gathered(chunk.entries, skipped, chunk.seq_len, 1)
        return first_key, scratch[:1], scratch[1:]

    def _scratch(self, num_tokens: int) -> Tensor:
        """[2 (K, V), num_kv_heads, num_tokens, head_dim], the same memory every time."""
        spec = self._cache.spec
        shape = (2, spec.num_kv_heads, num_tokens, spec.head_dim)
        return self._gathered[: math.prod(shape)].view(shape)

    def _count_gathered(
        self, entries: np.ndarray, skipped: int, seq_len: int, num_layers: int
    ) -> None:
        """entries: of the whole sequence, of which the first `skipped` are not gathered."""
        layout = self._cache.layout
        last_tokens = seq_len - (entries.size - 1) * layout.spec.block_size
        num_bytes = stored_bytes(layout, entries[skipped:], skipped, last_tokens)
        self.bytes_gathered += num_layers * layout.spec.num_kv_heads * num_bytes

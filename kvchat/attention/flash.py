"""torch's flash attention for sequences side by side whose lengths only the device knows.

What a CUDA graph needs: its launches depend on the shapes of tensors alone. The sequences' ends are
aligned, so the last new token sees all keys (Dao, FlashAttention-2, 2023).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_MIN_CAPABILITY = (8, 0)
_MAX_HEAD_DIM = 256
_ARGUMENTS = ("cum_seq_q", "cum_seq_k", "window_size_left", "window_size_right", "seqused_k")


@dataclass(frozen=True)
class ChunkTensors:
    """New tokens of up to so many sequences, side by side and padded, int32. Padding has slot and
    position 0, and of it the result may be anything; chunks that are not there have length 0 and
    start where the last one ends. Filled by engine/chunk_graphs."""

    positions: Tensor  # [num_tokens]
    slots: Tensor  # [num_tokens] where their K and V go
    starts: Tensor  # [num_chunks + 1] of each chunk among the tokens
    key_starts: Tensor  # [num_chunks + 1] of each sequence among the gathered keys: whole blocks
    seq_lens: Tensor  # [num_chunks]
    table: Tensor  # [entries] of all the sequences, one after another; behind them anything
    num_entries: Tensor  # [1] how many of them are in use


# flash(q, k, v, chunks, scale, window) -> [num_tokens, num_heads, head_dim]; q has that shape, k
# and v are [num_keys, num_kv_heads, head_dim], strided in tokens and heads if they like; window:
# keys that a query sees, 0 for all.
Flash = Callable[[Tensor, Tensor, Tensor, ChunkTensors, float, int], Tensor]


def find_flash(device: torch.device, head_dim: int) -> Flash | None:
    """None where torch has none: on a CPU, before Ampere, for other head dims, or one whose
    arguments have changed."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < _MIN_CAPABILITY:
        return None
    # Not public: torch.nn.attention.varlen wraps it, with another signature in every release.
    schema = torch.ops.aten._flash_attention_forward.default._schema
    is_known = {argument.name for argument in schema.arguments}.issuperset(_ARGUMENTS)
    is_there = is_known and torch.backends.cuda.is_flash_attention_available()
    return _flash if is_there and head_dim % 8 == 0 and head_dim <= _MAX_HEAD_DIM else None


def _flash(
    q: Tensor, k: Tensor, v: Tensor, chunks: ChunkTensors, scale: float, window: int
) -> Tensor:
    out: Tensor = torch.ops.aten._flash_attention_forward.default(
        q, k, v, chunks.starts, chunks.key_starts, q.shape[0], k.shape[0], 0.0, True, False,
        scale=scale, window_size_left=window - 1 if window else -1, window_size_right=0,
        seqused_k=chunks.seq_lens,
    )[0]  # fmt: skip
    return out

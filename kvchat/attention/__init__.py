"""Attention over the paged pool: one protocol, several backends.

Once a step `plan`, then once per layer `write_kv` and `attend`. A backend is built over one
KVCache and one RoPE table and keeps the step's plan between the calls.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class AttentionBatch:
    """One step as a backend sees it; sequences in row order, their new tokens one after another.

    query_lens[i] new tokens of sequence i end at position seq_lens[i] - 1. block_tables[i] holds
    one entry per block_size positions, as kv/layout packs it (a native one equals its block id).
    """

    query_lens: list[int]
    seq_lens: list[int]
    block_tables: list[list[int]]

    @property
    def num_tokens(self) -> int:
        """New tokens over all sequences: the length of input_ids."""
        return sum(self.query_lens)

    def used_tables(self, block_size: int) -> list[list[int]]:
        """The entries that hold a sequence's seq_len tokens."""
        return [
            table[: -(-seq_len // block_size)]
            for seq_len, table in zip(self.seq_lens, self.block_tables, strict=True)
        ]


class AttentionBackend(Protocol):
    """What the decoder calls. Tensors are in the pool's dtype unless said.

    bytes_gathered counts the bytes of the pool, as they are stored and with their scales, whose K
    and V were copied out of it so far (scratch for chunks).
    """

    bytes_gathered: int

    def warm_up(self, progress: Callable[[int, int], None]) -> None:
        """Compile what the first step would wait for; progress(kernels done, of how many)."""

    def plan(self, batch: AttentionBatch) -> None:
        """Prepare one step: slots, positions, work lists. Called before the first layer."""

    def write_kv(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Rotate q and k by position, store k and v in the planned slots, return the rotated q.

        q: [num_tokens, num_heads, head_dim]; k, v: [num_tokens, num_kv_heads, head_dim]. The
        rotated q is for attend alone, and may be of a wider dtype.
        """

    def attend(self, layer_idx: int, q: Tensor) -> Tensor:
        """Causal attention of rotated q over each sequence's blocks, window as the layer has it.

        q and the result: [num_tokens, num_heads, head_dim].
        """

"""The pool's tensors: K and V of every block. Knows block ids; never tokens, tables or owners."""

from __future__ import annotations

import torch
from torch import Tensor

from kvchat.config import NULL_BLOCK_ID, KVSpec
from kvchat.errors import CapacityError
from kvchat.kv.block_pool import BlockOp, CopyBlock


class KVCache:
    """One tensor for the whole run; its strides are the layout that every backend is told.

    blocks: [num_blocks, num_layers, 2 (K, V), num_kv_heads, block_size, head_dim] in spec.dtype.
    On a CPU the memory is reserved and not touched, so that memory in use grows with the chats;
    the null block is zero and stays zero.
    """

    def __init__(self, spec: KVSpec, num_blocks: int, device: torch.device | str = "cpu") -> None:
        self.spec = spec
        shape = (num_blocks, spec.num_layers, 2, spec.num_kv_heads, spec.block_size, spec.head_dim)
        try:
            self.blocks = torch.empty(shape, dtype=getattr(torch, spec.dtype), device=device)
        except RuntimeError as error:  # torch's out of memory, on any device
            size = num_blocks * spec.bytes_per_block
            raise CapacityError(
                f"a KV pool of {size} bytes could not be reserved; lower --kv-mem"
            ) from error
        self.blocks[NULL_BLOCK_ID].zero_()

    @property
    def num_blocks(self) -> int:
        """Blocks reserved, the null block included."""
        return self.blocks.shape[0]

    @property
    def num_bytes(self) -> int:
        """Bytes reserved: exactly num_blocks * spec.bytes_per_block."""
        return self.blocks.nbytes

    def layer(self, layer_idx: int) -> Tensor:
        """A view of one layer: [num_blocks, 2, num_kv_heads, block_size, head_dim]."""
        return self.blocks[:, layer_idx]

    def apply(self, ops: list[BlockOp]) -> None:
        """Do the block operations, in order: one may read what one before it wrote."""
        for op in ops:
            assert isinstance(op, CopyBlock), f"{op} is not known yet"
            self.blocks[op.dst].copy_(self.blocks[op.src])

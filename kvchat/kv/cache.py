"""The pool's tensors: K and V of every block. Knows block ids; never tokens, tables or owners."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kvchat.config import NULL_BLOCK_ID, KVSpec
from kvchat.errors import CapacityError
from kvchat.kv import codecs
from kvchat.kv.block_ops import BlockOp, CompressSpan, CopyBlock, ParkBlock, RestoreBlock
from kvchat.kv.layout import BlockLayout, Codec

# Float32 K and V encoded at a time: a few times this is the scratch, and it fits a CPU's cache.
ENCODE_BYTES = 4 * 2**20


@dataclass(frozen=True)
class PoolBytes:
    """Where the bytes of the pool's tensors are; they add up to KVCache.num_bytes."""

    by_codec: dict[Codec, int]  # of blocks that hold tokens: payload and the side bytes they use
    unused_side: int  # of the same blocks: side bytes that a lower codec would need
    free: int  # all of the blocks that hold nothing, the null block included


class KVCache:
    """The tensors for the whole run; their strides are the layout that every backend is told.

    blocks: [num_blocks, num_layers, 2 (K, V), num_kv_heads, block_size, head_dim] in spec.dtype.
    payload: the same memory as uint8 [num_blocks, num_layers, 2, num_kv_heads, part_bytes].
    side: scales and zeros, uint8 [num_blocks, num_layers, num_kv_heads, side_bytes].
    host_payload, host_side: the same of num_host_slots parked blocks, in main memory (pinned where
    the device is a GPU, so that it copies without the CPU).
    On a CPU the memory is reserved and not touched, so that memory in use grows with the chats;
    the null block is zero and stays zero.
    """

    def __init__(
        self,
        spec: KVSpec,
        num_blocks: int,
        device: torch.device | str = "cpu",
        lowest: Codec = Codec.NATIVE,
        num_host_slots: int = 0,
    ) -> None:
        self.spec = spec
        self.layout = BlockLayout(spec, lowest)
        shape = (num_blocks, spec.num_layers, 2, spec.num_kv_heads, spec.block_size, spec.head_dim)
        side_shape = (num_blocks, spec.num_layers, spec.num_kv_heads, self.layout.side_bytes)
        try:
            self.blocks = torch.empty(shape, dtype=getattr(torch, spec.dtype), device=device)
            self.side = torch.empty(side_shape, dtype=torch.uint8, device=device)
        except RuntimeError as error:  # torch's out of memory, on any device
            size = num_blocks * self.layout.bytes_per_block
            raise CapacityError(
                f"a KV pool of {size} bytes could not be reserved; lower --kv-mem"
            ) from error
        self.payload = self.blocks.view(torch.uint8).flatten(-2)
        self.payload[NULL_BLOCK_ID].zero_()
        self.side[NULL_BLOCK_ID].zero_()
        self._reserve_host(num_host_slots)

    def _reserve_host(self, num_slots: int) -> None:
        is_pinned = num_slots > 0 and self.blocks.is_cuda
        shapes = [(num_slots, *x.shape[1:]) for x in (self.payload, self.side)]
        try:
            self.host_payload, self.host_side = (
                torch.empty(shape, dtype=torch.uint8, pin_memory=is_pinned) for shape in shapes
            )
        except RuntimeError as error:
            size = num_slots * self.layout.bytes_per_block
            raise CapacityError(
                f"{size} bytes of main memory could not be reserved; lower --host-mem"
            ) from error

    @property
    def num_blocks(self) -> int:
        """Blocks reserved, the null block included."""
        return self.blocks.shape[0]

    @property
    def num_bytes(self) -> int:
        """Bytes reserved: exactly num_blocks * layout.bytes_per_block."""
        return self.blocks.nbytes + self.side.nbytes

    @property
    def num_host_bytes(self) -> int:
        """Bytes reserved in main memory for parked blocks."""
        return self.host_payload.nbytes + self.host_side.nbytes

    def layer(self, layer_idx: int) -> Tensor:
        """A view of one layer: [num_blocks, 2, num_kv_heads, block_size, head_dim]."""
        return self.blocks[:, layer_idx]

    def block_bytes(self, codec: Codec) -> int:
        """Bytes of both tensors that one block of this codec uses, counted on the tensors."""
        side = self.side[NULL_BLOCK_ID, ..., : self.layout.side_used(codec)]
        return self.payload[NULL_BLOCK_ID].nbytes + side.nbytes

    def audit(self, num_held: Mapping[Codec, int]) -> PoolBytes:
        """All bytes of the tensors, counted anew, when so many blocks of each codec hold tokens."""
        by_codec = {codec: n * self.block_bytes(codec) for codec, n in num_held.items()}
        total = sum(x.untyped_storage().nbytes() for x in (self.blocks, self.side))
        reserved = sum(num_held.values()) * (total // self.num_blocks)
        return PoolBytes(by_codec, reserved - sum(by_codec.values()), total - reserved)

    def apply(self, ops: list[BlockOp]) -> None:
        """Do the block operations, in order: one may read what one before it wrote."""
        for run in _runs(ops):
            if isinstance(run, list):
                self._compress(run)
            elif isinstance(run, CopyBlock):
                self.payload[run.dst].copy_(self.payload[run.src])
                self.side[run.dst].copy_(self.side[run.src])
            # In the order of the device's stream, which alone looks at the slots.
            elif isinstance(run, ParkBlock):
                self.host_payload[run.slot].copy_(self.payload[run.src], non_blocking=True)
                self.host_side[run.slot].copy_(self.side[run.src], non_blocking=True)
            else:
                self.payload[run.dst].copy_(self.host_payload[run.slot], non_blocking=True)
                self.side[run.dst].copy_(self.host_side[run.slot], non_blocking=True)

    def _compress(self, ops: list[CompressSpan]) -> None:
        """Do ops of one kind in pieces of about ENCODE_BYTES: many spans, or some layers of one."""
        spec, num_tokens = self.spec, self.layout.span_tokens(ops[0].codec)
        layer_bytes = 2 * spec.num_kv_heads * num_tokens * spec.head_dim * 4
        num_layers = max(1, min(ENCODE_BYTES // layer_bytes, spec.num_layers))
        num_ops = max(1, ENCODE_BYTES // (layer_bytes * spec.num_layers))
        for i in range(0, len(ops), num_ops):
            for j in range(0, spec.num_layers, num_layers):
                self._encode(ops[i : i + num_ops], slice(j, j + num_layers))

    def _encode(self, ops: list[CompressSpan], layers: slice) -> None:
        """Read the sources of all ops, these layers, then write all targets."""
        src_codec, codec = ops[0].src_codec, ops[0].codec
        srcs = [src for op in ops for src in op.srcs]
        # whole pieces, as indexing with a tensor would go byte by byte
        payload = torch.stack([self.payload[src, layers] for src in srcs])
        side = torch.stack([self.side[src, layers] for src in srcs])
        values = codecs.decode(src_codec, payload, side, self.layout)
        # [ops * srcs, layers, heads, tokens, D] -> [ops, layers, heads, srcs * tokens, D]
        k, v = (x.unflatten(0, (len(ops), -1)).movedim(1, 3).flatten(3, 4) for x in values)
        encoded = codecs.encode(codec, k, v, self.layout)
        for op, op_payload, op_side in zip(ops, *encoded, strict=True):
            self.payload[op.dst, layers].copy_(op_payload)
            self.side[op.dst, layers].copy_(op_side)


_Move = CopyBlock | ParkBlock | RestoreBlock


def _runs(ops: list[BlockOp]) -> Iterator[_Move | list[CompressSpan]]:
    """The operations in order; compressions of one kind that follow each other come together
    unless one reads or writes what another of them wrote.
    """
    run: list[CompressSpan] = []
    written: set[int] = set()
    for op in ops:
        if run and not _fits(op, run[0], written):
            yield run
            run, written = [], set()
        if isinstance(op, CompressSpan):
            run.append(op)
            written.add(op.dst)
        else:
            yield op
    if run:
        yield run


def _fits(op: BlockOp, first: CompressSpan, written: set[int]) -> bool:
    """Whether op may be done with compressions like `first` that write these blocks."""
    return (
        isinstance(op, CompressSpan)
        and (op.src_codec, op.codec) == (first.src_codec, first.codec)
        and written.isdisjoint((op.dst, *op.srcs))
    )

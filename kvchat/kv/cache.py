"""The pool's tensors: K and V of every block. Knows block ids; never tokens, tables or owners."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol, cast

import torch
from torch import Tensor

from kvchat.config import NULL_BLOCK_ID, KVSpec
from kvchat.errors import CapacityError
from kvchat.kv import codecs, host_memory
from kvchat.kv.block_ops import (
    BlockOp,
    CompressSpan,
    CopyBlock,
    ParkBlock,
    RestoreBlock,
    batches,
)
from kvchat.kv.layout import BlockLayout, Codec
from kvchat.kv.transfers import CudaStreams, DirectStreams, Streams, Transfers

# Float32 K and V encoded at a time: a few times this is the scratch, and it fits a CPU's cache.
ENCODE_BYTES = 4 * 2**20


@dataclass(frozen=True)
class PoolBytes:
    """Where the bytes of the pool's tensors are; they add up to KVCache.num_bytes."""

    by_codec: dict[Codec, int]  # of blocks that hold tokens: payload and the side bytes they use
    unused_side: int  # of the same blocks: side bytes that a lower codec would need
    free: int  # all of the blocks that hold nothing, the null block included


class BlockKernels(Protocol):
    """Copying and compressing over the same tensors, by kernels that the current stream queues."""

    def copy(self, pairs: Tensor) -> None:
        """pairs: int32 [n, 2] of (source, destination); no destination is in another pair."""

    def compress(self, src: Codec, dst: Codec, jobs: Tensor) -> None:
        """jobs: int32 [n, 1 + sources] of a destination and its sources in order of position;
        no destination is in another job."""


class KVCache:
    """The tensors for the whole run; their strides are the layout that every backend is told.

    blocks: [num_blocks, num_layers, 2 (K, V), num_kv_heads, block_size, head_dim] in spec.dtype.
    payload: the same memory as uint8 [num_blocks, num_layers, 2, num_kv_heads, part_bytes].
    side: scales and zeros, uint8 [num_blocks, num_layers, num_kv_heads, side_bytes].
    host_payload, host_side: the same of num_host_slots parked blocks, in main memory (page-locked
    where the device is a GPU, so that it copies without the CPU). To be read after `synchronize`.
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
        streams: Streams | None = None,
    ) -> None:
        """`streams` are the device's own unless given."""
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
        self._kernels: BlockKernels | None = None
        self._reserve_host(num_host_slots)
        is_gpu = self.blocks.is_cuda
        streams = streams or (CudaStreams(self.blocks.device) if is_gpu else DirectStreams())
        tensors = (self.payload, self.side), (self.host_payload, self.host_side)
        self._transfers = Transfers(streams, *tensors)
        if is_gpu:
            address = self.host_payload.data_ptr() if num_host_slots else None
            weakref.finalize(self, _finish, streams, address).atexit = False

    def _reserve_host(self, num_slots: int) -> None:
        """Both from one piece of memory."""
        payload, side = self.payload[0], self.side[0]
        end = num_slots * payload.nbytes
        num_bytes = end + num_slots * side.nbytes
        memory = host_memory.reserve(num_bytes, num_slots > 0 and self.blocks.is_cuda)
        self.host_payload: Tensor = memory[:end].view(num_slots, *payload.shape)
        self.host_side: Tensor = memory[end:].view(num_slots, *side.shape)

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

    def use_kernels(self, kernels: BlockKernels) -> None:
        """Copy and compress by these from now on, not by torch and the codecs' definition."""
        self._kernels = kernels

    def apply(self, ops: list[BlockOp]) -> None:
        """Do the block operations, in order: one may read what one before it wrote.

        On a GPU they are queued. What is launched next may read all blocks, and write those that
        it has named to `await_copies`.
        """
        for kind, group in groupby(ops, type):
            run = [*group]
            if kind is CompressSpan:
                self._compress(cast("list[CompressSpan]", run))
            elif kind is CopyBlock:
                self._copy(cast("list[CopyBlock]", run))
            elif kind is ParkBlock:
                self._transfers.park(cast("list[ParkBlock]", run))
            else:
                self._transfers.restore(cast("list[RestoreBlock]", run))

    def await_copies(self, block_ids: Iterable[int]) -> None:
        """What is launched next may write these blocks: it waits for the parks that read them."""
        self._transfers.await_copies(block_ids)

    def synchronize(self) -> None:
        """Wait here until what was parked is in the host's tensors."""
        self._transfers.synchronize()

    def _copy(self, ops: list[CopyBlock]) -> None:
        self.await_copies(op.dst for op in ops)
        if self._kernels is not None:
            pairs = host_memory.send(
                [(op.src, op.dst) for op in ops], torch.int32, self.blocks.device
            )
            for batch in batches(ops, is_at_once=True):
                self._kernels.copy(pairs[batch])
            return
        for op in ops:
            self.payload[op.dst].copy_(self.payload[op.src])
            self.side[op.dst].copy_(self.side[op.src])

    def _compress(self, ops: list[CompressSpan]) -> None:
        self.await_copies(op.dst for op in ops)
        for (src_codec, codec), group in groupby(ops, lambda op: (op.src_codec, op.codec)):
            run = [*group]
            if self._kernels is not None:
                jobs = host_memory.send(
                    [(op.dst, *op.srcs) for op in run], torch.int32, self.blocks.device
                )
                for batch in batches(run, is_at_once=True):
                    self._kernels.compress(src_codec, codec, jobs[batch])
                continue
            for batch in batches(run, is_at_once=False):
                self._encode_all(run[batch])

    def _encode_all(self, ops: list[CompressSpan]) -> None:
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


def _finish(streams: Streams, locked_address: int | None) -> None:
    """Before the tensors of a cache on a GPU are given back."""
    streams.synchronize()
    if locked_address is not None:
        host_memory.unlock(locked_address)

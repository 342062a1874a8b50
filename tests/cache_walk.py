"""A random walk over a cache whose work is done late: parks, restores, copies, compressions, rows.

Beside it goes a model in which every operation is done at once, in the order of emission. There
are few blocks and fewer slots, so that what is copied is soon written again. What the host finds
in the slots after `synchronize`, and all blocks when everything is done, must be the model's.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from types import ModuleType

import torch

from kvchat.config import KVSpec
from kvchat.kv.block_ops import CompressSpan, CopyBlock, ParkBlock, RestoreBlock
from kvchat.kv.layout import Codec

NUM_BLOCKS, NUM_SLOTS = 14, 5
KINDS = ((Codec.NATIVE, Codec.INT8), (Codec.NATIVE, Codec.INT4), (Codec.INT8, Codec.INT4))
SPEC = KVSpec(num_layers=1, num_kv_heads=1, head_dim=8, block_size=16, dtype="bfloat16")


def mix(pieces: list[torch.Tensor], src_codec: Codec, codec: Codec) -> torch.Tensor:
    """Bytes that tell which pieces they are made of, in which order, and of which codecs."""
    mixed = torch.full_like(pieces[0], 1 + codec + 7 * src_codec)
    for piece in pieces:
        mixed = mixed * 3 + piece
    return mixed


class LateKernels:
    """cache.BlockKernels that only queue their work; of a launch nothing is done in order."""

    def __init__(self, tensors: list[torch.Tensor], launch: Callable[[Callable], None]) -> None:
        self.tensors, self.launch = tensors, launch
        self.num_launches = 0

    def copy(self, pairs: torch.Tensor) -> None:
        self._queue([(dst, (src,)) for src, dst in pairs.tolist()], lambda pieces: pieces[0])

    def compress(self, src: Codec, dst: Codec, jobs: torch.Tensor) -> None:
        rows = [(dst_id, tuple(srcs)) for dst_id, *srcs in jobs.tolist()]
        self._queue(rows, lambda pieces: mix(pieces, src, dst))

    def _queue(self, jobs: list[tuple[int, tuple[int, ...]]], make: Callable) -> None:
        self.num_launches += 1
        written = [dst for dst, _ in jobs]
        assert len(written) == len({*written}), f"a block is written twice: {jobs}"
        assert {*written}.isdisjoint(src for _, srcs in jobs for src in srcs), f"a race: {jobs}"

        def work() -> None:
            for dst, srcs in jobs:
                for blocks in self.tensors:
                    blocks[dst] = make([blocks[src] for src in srcs])

        self.launch(work)


class Model:
    """All at once: tensors on the CPU, in pairs of (blocks, slots)."""

    def __init__(self, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.pairs = [(blocks.cpu().clone(), slots.clone()) for blocks, slots in pairs]

    def apply(self, op) -> None:
        for blocks, slots in self.pairs:
            if isinstance(op, ParkBlock):
                slots[op.slot] = blocks[op.src]
            elif isinstance(op, RestoreBlock):
                blocks[op.dst] = slots[op.slot]
            elif isinstance(op, CopyBlock):
                blocks[op.dst] = blocks[op.src]
            else:
                blocks[op.dst] = mix([blocks[src] for src in op.srcs], op.src_codec, op.codec)

    def write_row(self, row: tuple[int, int]) -> None:
        write_row([blocks for blocks, _ in self.pairs], row)


def write_row(tensors: list[torch.Tensor], row: tuple[int, int]) -> None:
    """As a row of a step: it reads blocks and writes into one."""
    read_id, written_id = row
    for blocks in tensors:
        blocks[written_id] = mix([blocks[read_id], blocks[written_id]], *KINDS[0])


class CacheWalk:
    """One walk with `module`.KVCache (a mutated one in the tests of the tests) over `streams`;
    `launch` queues work beside the cache's own."""

    def __init__(
        self,
        module: ModuleType,
        rng: random.Random,
        launch: Callable[[Callable], None],
        spec: KVSpec = SPEC,
        **placed: object,
    ) -> None:
        self.rng, self.launch = rng, launch
        self.cache = cache = module.KVCache(
            spec, NUM_BLOCKS, lowest=Codec.INT4, num_host_slots=NUM_SLOTS, **placed
        )
        self.tensors = [cache.payload, cache.side]
        generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
        for tensor in (*self.tensors, cache.host_payload, cache.host_side):
            tensor.copy_(
                torch.randint(0, 256, tensor.shape, generator=generator, dtype=torch.uint8)
            )
        self.parked: list[int] = []
        self.kernels = LateKernels(self.tensors, launch)
        cache.use_kernels(self.kernels)
        self.model = Model([*zip(self.tensors, (cache.host_payload, cache.host_side), strict=True)])

    def step(self) -> None:
        """As a runner does one: the operations, then rows that read and write blocks."""
        ops = [self.draw() for _ in range(self.rng.choice((0, 1, 1, 2, 6, 12)))]
        self.parked = [*self.parked, *(op.src for op in ops if isinstance(op, ParkBlock))][-4:]
        rows = [self.draw_row() for _ in range(self.rng.choice((0, 1, 2)))]
        self.cache.apply(ops)
        for op in ops:
            self.model.apply(op)
        self.cache.await_copies(written_id for _, written_id in rows)
        for row in rows:
            self.launch(lambda row=row: write_row(self.tensors, row))
            self.model.write_row(row)

    def draw_row(self) -> tuple[int, int]:
        """What was parked of late is soon written again."""
        written_id = self.rng.choice([*self.parked, *range(1, 5)])
        return self.rng.choice([i for i in range(1, NUM_BLOCKS) if i != written_id]), written_id

    def draw(self):
        """Any operation; parks and restores mostly in stretches."""
        rng = self.rng
        block_id, slot = rng.randrange(1, NUM_BLOCKS), rng.randrange(NUM_SLOTS)
        kind = rng.choices((ParkBlock, RestoreBlock, CopyBlock, CompressSpan), (12, 3, 5, 5))[0]
        if kind in (ParkBlock, RestoreBlock):
            block_id = slot + rng.choice((1, 2)) if rng.random() < 0.7 else block_id
            return ParkBlock(block_id, slot) if kind is ParkBlock else RestoreBlock(slot, block_id)
        if kind is CopyBlock:
            return CopyBlock(*rng.sample(range(1, NUM_BLOCKS), 2))
        src_codec, codec = rng.choice(KINDS)
        spans = self.cache.layout.span_blocks
        dst, *srcs = rng.sample(range(1, NUM_BLOCKS), 1 + spans[codec] // spans[src_codec])
        return CompressSpan(tuple(srcs), src_codec, dst, codec)

    def check_slots(self) -> None:
        """The host reads them, whatever else is still to be done."""
        self.cache.synchronize()
        slots = (self.cache.host_payload, self.cache.host_side)
        for found, (_, expected) in zip(slots, self.model.pairs, strict=True):
            assert torch.equal(found, expected), "a slot has other bytes"

    def check_blocks(self) -> None:
        """When all is done."""
        for found, (expected, _) in zip(self.tensors, self.model.pairs, strict=True):
            wrong = [i for i in range(NUM_BLOCKS) if not torch.equal(found[i].cpu(), expected[i])]
            assert not wrong, f"blocks {wrong} have other bytes"

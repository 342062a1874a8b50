"""The pool's tensors: exact bytes, memory that is reserved and not touched, ops in order."""

import subprocess
import sys

import pytest
import torch

from kvchat.config import DTYPE_BYTES, KVSpec
from kvchat.errors import CapacityError
from kvchat.kv import cache as cache_module
from kvchat.kv import codecs
from kvchat.kv.block_ops import CompressSpan, CopyBlock, ParkBlock, RestoreBlock
from kvchat.kv.cache import KVCache
from kvchat.kv.layout import Codec

SPEC = KVSpec(num_layers=3, num_kv_heads=2, head_dim=8, block_size=16, dtype="float32")


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
def test_bytes_are_exactly_those_of_the_blocks(dtype):
    cache = KVCache(KVSpec(3, 2, 8, 32, dtype), 5)

    assert cache.num_bytes == 5 * 3 * 2 * 2 * 32 * 8 * DTYPE_BYTES[dtype]
    assert cache.num_bytes == cache.num_blocks * cache.spec.bytes_per_block
    assert cache.blocks.shape == (5, 3, 2, 2, 32, 8)
    assert cache.blocks.is_contiguous()


def test_layer_is_a_view_of_the_pool():
    cache = KVCache(SPEC, 4)

    cache.layer(2)[3, 1, 0, 15, 7] = 42.0

    assert cache.blocks[3, 2, 1, 0, 15, 7] == 42.0
    assert cache.layer(1).shape == (4, 2, 2, 16, 8)


def test_block_operations_run_in_order_on_whole_blocks():
    cache = KVCache(SPEC, 5)
    for block_id in range(1, 5):
        cache.blocks[block_id] = float(block_id)

    cache.apply([CopyBlock(1, 2), CopyBlock(2, 3), CopyBlock(4, 1)])

    assert [cache.blocks[i].unique().tolist() for i in range(5)] == [[0], [4], [1], [1], [4]]


def test_a_pool_that_cannot_be_reserved_is_refused_in_words():
    with pytest.raises(CapacityError, match=r"pool of \d+ bytes could not be reserved; lower"):
        KVCache(SPEC, 1 << 50)


def filled_cache(dtype="bfloat16", num_blocks=40, lowest=Codec.INT4) -> KVCache:
    """A cache whose blocks but the null block hold random values."""
    cache = KVCache(KVSpec(3, 2, 24, 16, dtype), num_blocks, lowest=lowest)
    generator = torch.Generator().manual_seed(3)
    cache.blocks[1:] = torch.randn(cache.blocks[1:].shape, generator=generator).to(
        cache.blocks.dtype
    )
    cache.side[1:] = 0xFF
    return cache


def decoded(cache: KVCache, block_id: int, codec: Codec):
    """k and v of one block, [layers, heads, tokens, head_dim]."""
    return codecs.decode(codec, cache.payload[block_id], cache.side[block_id], cache.layout)


def joined(cache: KVCache, block_ids: tuple[int, ...], codec: Codec):
    """k and v of blocks in a row, [layers, heads, tokens, head_dim]."""
    parts = [decoded(cache, block_id, codec) for block_id in block_ids]
    return [torch.cat(tensors, -2) for tensors in zip(*parts, strict=True)]


def snapshot(cache: KVCache):
    return cache.payload.clone(), cache.side.clone()


def do_one_by_one(cache: KVCache, ops) -> None:
    """What apply must come to, by the definition, one op after another."""
    for op in ops:
        if isinstance(op, CopyBlock):
            cache.blocks[op.dst] = cache.blocks[op.src].clone()
            cache.side[op.dst] = cache.side[op.src].clone()
            continue
        values = joined(cache, op.srcs, op.src_codec)
        cache.payload[op.dst], cache.side[op.dst] = codecs.encode(op.codec, *values, cache.layout)


def counting(sizes: list[int], encode):
    """`encode`, noting the bytes of what it is given."""

    def counted(codec, k, v, layout):
        sizes.append(k.nbytes + v.nbytes)
        return encode(codec, k, v, layout)

    return counted


def test_the_side_array_is_counted_and_indexed_by_block():
    cache = KVCache(KVSpec(3, 2, 128, 16, "bfloat16"), 5, lowest=Codec.INT4)

    assert cache.side.shape == (5, 3, 2, cache.layout.side_bytes)
    assert cache.payload.shape == (5, 3, 2, 2, 16 * 128 * 2)
    assert cache.payload.data_ptr() == cache.blocks.data_ptr()
    assert cache.num_bytes == 5 * cache.layout.bytes_per_block
    assert cache.num_bytes == cache.blocks.nbytes + cache.side.nbytes
    assert not cache.side[0].any()
    assert KVCache(SPEC, 4).side.shape == (4, 3, 2, 0)


def test_a_copy_takes_the_side_piece_along():
    cache = filled_cache()
    cache.apply([CompressSpan((1, 2), Codec.NATIVE, 3, Codec.INT8)])

    cache.apply([CopyBlock(3, 4)])

    assert torch.equal(cache.payload[4], cache.payload[3])
    assert torch.equal(cache.side[4], cache.side[3])
    assert not torch.equal(cache.side[4], cache.side[5])


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
@pytest.mark.parametrize(
    ("src_codec", "codec"),
    [(Codec.NATIVE, Codec.INT8), (Codec.NATIVE, Codec.INT4), (Codec.INT8, Codec.INT4)],
)
def test_a_span_is_encoded_in_order_of_its_sources(src_codec, codec, dtype):
    cache = filled_cache(dtype)
    spans = cache.layout.span_blocks
    num_srcs = spans[codec] // spans[src_codec]
    srcs = tuple(range(9, 9 - num_srcs, -1))
    if src_codec == Codec.INT8:
        for i, src in enumerate(srcs):
            natives = tuple(range(10 + i * spans[codec], 10 + i * spans[codec] + spans[Codec.INT8]))
            cache.apply([CompressSpan(natives, Codec.NATIVE, src, Codec.INT8)])
    k, v = joined(cache, srcs, src_codec)
    before = snapshot(cache)

    cache.apply([CompressSpan(srcs, src_codec, 30, codec)])

    payload, side = codecs.encode(codec, k, v, cache.layout)
    assert torch.equal(cache.payload[30], payload)
    assert torch.equal(cache.side[30], side)
    for now, then in zip(snapshot(cache), before, strict=True):
        now[30] = then[30]
        assert torch.equal(now, then)


def test_operations_that_depend_on_each_other_are_done_in_order():
    def native_to_int8(first: int, dst: int) -> CompressSpan:
        return CompressSpan((first, first + 1), Codec.NATIVE, dst, Codec.INT8)

    ops = [
        native_to_int8(1, 20),
        native_to_int8(3, 1),  # writes what the first one read
        CompressSpan((20, 1), Codec.INT8, 3, Codec.INT4),  # reads what both wrote
        native_to_int8(5, 21),
        native_to_int8(7, 21),  # writes it again
        CopyBlock(21, 22),
        CopyBlock(9, 5),
        native_to_int8(5, 23),  # reads a copy
        CompressSpan((11, 12, 13, 14), Codec.NATIVE, 24, Codec.INT4),
        CompressSpan((15, 16, 17, 18), Codec.NATIVE, 11, Codec.INT4),
        CopyBlock(11, 25),
        native_to_int8(29, 30),
        native_to_int8(30, 31),  # takes bytes of an INT8 block for values: order is all that counts
    ]
    grouped, alone = filled_cache(), filled_cache()
    alone.blocks[31] = grouped.blocks[31] = 1.0

    grouped.apply(ops)
    do_one_by_one(alone, ops)

    assert torch.equal(grouped.payload, alone.payload)
    assert torch.equal(grouped.side, alone.side)
    assert not grouped.payload[0].any()
    assert not grouped.side[0].any()


@pytest.mark.parametrize(
    "encode_bytes", [1, 2 * 2 * 32 * 24 * 4, 3 * 2 * 2 * 32 * 24 * 4 * 2, 1 << 30]
)
def test_the_bytes_encoded_at_a_time_change_no_bit(monkeypatch, encode_bytes):
    ops = [CompressSpan((i, i + 1), Codec.NATIVE, 20 + i, Codec.INT8) for i in range(1, 19, 2)]
    whole, pieces = filled_cache(), filled_cache()
    whole.apply(ops)
    sizes: list[int] = []
    monkeypatch.setattr(cache_module, "ENCODE_BYTES", encode_bytes)
    monkeypatch.setattr(codecs, "encode", counting(sizes, codecs.encode))

    pieces.apply(ops)

    one_layer = 2 * 2 * 32 * 24 * 4
    assert max(sizes) <= max(encode_bytes, one_layer)
    assert sum(sizes) == 9 * 3 * one_layer
    assert torch.equal(pieces.payload, whole.payload)
    assert torch.equal(pieces.side, whole.side)


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
def test_parked_blocks_of_every_codec_come_back_bit_for_bit(dtype):
    full = filled_cache(dtype)
    cache = KVCache(full.spec, full.num_blocks, lowest=Codec.INT4, num_host_slots=4)
    cache.payload.copy_(full.payload)
    cache.side.copy_(full.side)
    num_8, num_4 = cache.layout.span_blocks[1:]
    natives = tuple(range(1, 1 + num_4))
    cache.apply(
        [
            CompressSpan(natives[:num_8], Codec.NATIVE, 20, Codec.INT8),
            CompressSpan(natives, Codec.NATIVE, 21, Codec.INT4),
        ]
    )
    payload, side = snapshot(cache)

    cache.apply([ParkBlock(20, 3), ParkBlock(21, 0), ParkBlock(9, 1)])
    assert all(map(torch.equal, snapshot(cache), (payload, side)))
    for block_id in (20, 21, 9):
        cache.blocks[block_id], cache.side[block_id] = -1.0, 0
    # In order: a slot is read before it is taken again, a block before it is overwritten.
    cache.apply([RestoreBlock(3, 30), ParkBlock(8, 3), RestoreBlock(0, 8), RestoreBlock(1, 31)])
    cache.apply([RestoreBlock(3, 32)])

    for src, dst in ((20, 30), (21, 8), (9, 31), (8, 32)):
        assert torch.equal(cache.payload[dst], payload[src])
        assert torch.equal(cache.side[dst], side[src])
    assert cache.num_host_bytes == 4 * cache.layout.bytes_per_block
    assert not cache.payload[0].any()


def test_without_slots_nothing_is_reserved_on_the_host():
    assert KVCache(SPEC, 4).num_host_bytes == 0
    with pytest.raises(CapacityError, match=r"\d+ bytes of main memory .*; lower --host-mem"):
        KVCache(SPEC, 4, num_host_slots=1 << 50)


def test_an_audit_counts_every_byte_once():
    cache = KVCache(KVSpec(3, 2, 128, 16, "bfloat16"), 50, lowest=Codec.INT4)
    num_held = {Codec.NATIVE: 7, Codec.INT8: 5, Codec.INT4: 3}

    counted = cache.audit(num_held)

    layout = cache.layout
    assert counted.by_codec == {c: n * layout.bytes_used(c) for c, n in num_held.items()}
    assert counted.free == 35 * layout.bytes_per_block
    assert sum(counted.by_codec.values()) + counted.unused_side + counted.free == cache.num_bytes


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/statm")
def test_memory_is_reserved_and_grows_with_the_blocks_used():
    code = """
import resource
from pathlib import Path
import torch
from kvchat.config import KVSpec
from kvchat.kv.cache import KVCache
from kvchat.kv.layout import Codec
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
spec = KVSpec(4, 8, 64, 16, "bfloat16")  # 128 KiB a block
torch.zeros(1000).sum()
before = resident()
cache = KVCache(spec, 8192, lowest=Codec.INT4)
reserved = resident() - before
cache.blocks[100:356] = 1.0
print(cache.num_bytes, reserved, resident() - before - reserved, bool(cache.blocks[0].any()))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    num_bytes, reserved, touched, is_null_block_set = out.stdout.split()
    assert int(num_bytes) == (1 << 30) + 8192 * 4 * 8 * 336
    assert int(reserved) < 8 << 20
    assert 32 << 20 <= int(touched) < 40 << 20
    assert is_null_block_set == "False"
